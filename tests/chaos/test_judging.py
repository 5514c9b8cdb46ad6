"""The judge itself: every character that is lost, repeated or made up is seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.judging import Pause, Slips, counted, longest_pause, slips

ANSWER = counted(60)


@pytest.mark.parametrize("complete", [True, False])
def test_what_is_right_has_no_slips(complete: bool) -> None:
    assert slips(ANSWER, ANSWER, complete=complete) == Slips()


def test_an_answer_that_was_stopped_may_end_early_but_a_complete_one_may_not() -> None:
    assert slips(ANSWER, ANSWER[:50], complete=False) == Slips()
    assert slips(ANSWER, "", complete=False) == Slips()
    assert slips(ANSWER, ANSWER[:50], complete=True) == Slips(missing=len(ANSWER) - 50)


@given(at=st.integers(0, len(ANSWER)), length=st.integers(1, 40), complete=st.booleans())
def test_a_piece_that_came_twice_is_counted(at: int, length: int, complete: bool) -> None:
    again = ANSWER[max(0, at - length) : at]
    assert slips(ANSWER, ANSWER[:at] + again + ANSWER[at:], complete=complete) == Slips(duplicated=len(again))


@given(at=st.integers(0, len(ANSWER) - 60), length=st.integers(1, 40), complete=st.booleans())
def test_a_piece_that_never_came_is_counted(at: int, length: int, complete: bool) -> None:
    assert slips(ANSWER, ANSWER[:at] + ANSWER[at + length :], complete=complete) == Slips(missing=length)


@given(got=st.text("0123456789 x", max_size=80), complete=st.booleans())
def test_only_the_right_text_is_without_slips(got: str, complete: bool) -> None:
    found = slips(ANSWER, got, complete=complete)
    right = got == ANSWER if complete else ANSWER.startswith(got)
    assert (found == Slips()) == right
    assert min(found.duplicated, found.missing) >= 0


def test_the_longest_pause_is_what_exceeds_the_pace() -> None:
    found = longest_pause([1.0, 1.025, 3.05, 3.075], 0.025)
    assert (found.seconds, found.since) == (pytest.approx(2.0), 1.025)
    assert longest_pause([1.0], 0.025) == longest_pause([], 0.025) == Pause()
