"""Bars, rows and what is kept of them."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.client import Story
from tests.chaos.faults import FAULTS
from tests.chaos.judging import counted
from tests.chaos.ledger import Run
from tests.chaos.phases import judged
from tests.chaos.plan import PREFILLER, Ask, Pattern
from tests.chaos.report import Row, broken, record, table

GOOD = Row("kill-caller", turns=10, complete=10, prefills=2, longest_pause=2.5, stopped=2, aborted=2, repeated=2)


def failures(*rows: Row, timed: bool = True) -> list[str]:
    return list(broken(rows, ack_wait=2, timed=timed))


def test_a_good_run_breaks_no_bar() -> None:
    assert failures(GOOD, replace(GOOD, fault="term-edge", longest_pause=0.1, repeated=0)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"duplicated": 1}, "1 duplicated characters"),
        ({"missing": 3}, "3 missing characters"),
        ({"orphaned": 1}, "1 orphaned runs"),
        ({"resets": 1}, "1 resets"),
        ({"aborted": 1}, "1 runs or turns that went on after a cancel"),
        ({"complete": 9, "failed": 1}, "less than 99%"),
        ({"longest_pause": 3.1}, "a pause of 3.10 s is longer than 3 s"),
    ],
)
def test_each_bar_is_held(change: dict[str, float], words: str) -> None:
    assert [words in failure for failure in failures(replace(GOOD, **change))] == [True]


def test_one_turn_in_a_hundred_may_fail_but_none_of_a_rolling_restart() -> None:
    assert failures(replace(GOOD, turns=100, complete=99, failed=1)) == []
    term = replace(GOOD, fault="term-router", longest_pause=0, repeated=0, turns=100, complete=99, failed=1)
    assert failures(term) == ["term-router: 1 of 100 turns failed"]


def test_where_nothing_calls_for_another_run_there_must_be_none() -> None:
    calm = Row("kill-edge", turns=3, complete=3, repeated=1)
    assert failures(calm) == ["kill-edge: 1 runs that nothing called for"]


def test_times_are_no_bar_where_they_are_not_wanted() -> None:
    assert failures(replace(GOOD, longest_pause=60), timed=False) == []
    assert failures(replace(GOOD, fault="zombie-caller", longest_pause=60)) == []


def test_rows_add_up_and_keep_the_longest_pause() -> None:
    both = GOOD + replace(GOOD, longest_pause=1, longest_skip=4, notes=("a",))
    assert (both.turns, both.aborted, both.longest_pause, both.longest_skip, both.notes) == (20, 4, 2.5, 4, ("a",))


def test_the_table_has_a_line_for_each_fault_and_one_for_all() -> None:
    console = Console(file=io.StringIO(), width=140)
    shown = table([GOOD, replace(GOOD, fault="cancel")], Pattern(seed=7))
    console.print(shown)
    assert all(column.header for column in shown.columns)
    told = console.file.getvalue()
    assert [name in told for name in ("kill-caller", "cancel", "all", "seed 7", "2/2", "4/4")] == [True] * 6


def test_figures_are_kept_with_what_they_depend_on(tmp_path: Path) -> None:
    file = tmp_path / "figures.csv"
    record([GOOD], Pattern(seed=7), busy=3, path=file)
    record([GOOD], Pattern(seed=8), busy=3, path=file)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["seed"], row["fault"], row["complete"], row["longest_pause"]) for row in rows] == [
        ("7", "kill-caller", "10", "2.500"),
        ("8", "kill-caller", "10", "2.500"),
    ]
    assert all(row["cpu"] and row["commit"] and row["nats_server"] and row["ack_wait"] == "2" for row in rows)


# --- turns ---------------------------------------------------------------------------------------------------


def lived(ask: Ask, **what: object) -> Story:
    story = Story(ask, turn="T", text=counted(ask.upto), arrivals=[1.0, 1.1], end="stop")
    for name, value in what.items():
        setattr(story, name, value)
    return story


def run(began: float, ended: float | None, how: str = "done") -> Run:
    return Run("q", began, ended, how)


PATTERN = Pattern(pace=0.1)
STAYS, CANCELS = Ask(1, 9, PREFILLER, 0), Ask(1, 9, PREFILLER, 0, "cancel", 1)


def test_a_turn_is_complete_when_its_text_is_exactly_right() -> None:
    row = judged("calm", lived(STAYS), [run(1, 2)], PATTERN)
    assert (row.turns, row.complete, row.failed, row.repeated, row.notes) == (1, 1, 0, 0, ())
    short = judged("calm", lived(STAYS, text="1 2 3"), [run(1, 2)], PATTERN)
    assert (short.complete, short.failed, short.missing, len(short.notes)) == (0, 1, len(counted(9)) - 5, 1)


@pytest.mark.parametrize("end", ["", "cancelled", "length", "engine broke: it went away"])
def test_any_other_end_is_none(end: str) -> None:
    assert judged("calm", lived(STAYS, end=end), [], PATTERN).failed == 1


def test_who_cancelled_wants_a_beginning_and_an_end() -> None:
    row = judged("cancel", lived(CANCELS, end="cancelled", text="1 2 ", stopped=1.5), [run(1, 2, "aborted")], PATTERN)
    assert (row.complete, row.stopped, row.aborted, row.missing) == (1, 1, 1, 0)
    assert judged("cancel", lived(CANCELS, end="cancelled", text="1 3 ", stopped=1.5), [], PATTERN).failed == 1


def test_a_run_that_ends_late_or_not_at_all_was_not_aborted() -> None:
    runs = [run(1, 1.2), run(1, 2.4, "aborted"), run(1, 2.6, "aborted"), run(1.6, None, "running")]
    row = judged("cancel", lived(CANCELS, end="cancelled", text="", stopped=1.5), runs, PATTERN)
    assert (row.stopped, row.aborted, row.repeated) == (3, 1, 3)


@pytest.mark.parametrize(
    ("fault", "ended", "aborted"), [("cancel", 2.4, 1), ("cancel", 2.6, 0), ("kill-undertaker", 4.4, 1), ("cancel", None, 0)]
)
def test_a_turn_that_still_waited_must_have_its_end(fault: str, ended: float | None, aborted: int) -> None:
    row = judged(fault, lived(CANCELS, end="cancelled", text="", stopped=1.5, ended=ended), [], PATTERN)
    assert (row.stopped, row.aborted) == (1, aborted)


def test_the_pause_of_an_answer_that_was_said_again_is_kept_apart() -> None:
    row = judged("kill-caller", lived(STAYS, arrivals=[1.0, 4.0], continued=["skip"]), [], PATTERN)
    assert (row.longest_pause, row.longest_skip) == (0, pytest.approx(2.9))
    row = judged("kill-caller", lived(STAYS, arrivals=[1.0, 4.0], continued=["prefill"]), [], PATTERN)
    assert (row.longest_pause, row.longest_skip) == (pytest.approx(2.9), 0)


def test_every_fault_goes_by_its_name() -> None:
    assert all(name == fault.name for name, fault in FAULTS.items())
