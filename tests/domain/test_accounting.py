"""What a call counts for: an answer once, whatever it took to make it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.accounting import spent
from capibara_flow.domain.answering import Account
from capibara_flow.domain.continuing import held
from capibara_flow.errors import BadRequest
from capibara_flow.ports import Finish, Recalled, Spent, Tally, Text
from topics.chat import PASSED_ON, ExpertCalled
from topics.output import Usage

ENDED = 1785585600.25


def called(**more: object) -> ExpertCalled:
    return ExpertCalled(
        **{"turn": "T", "expert": "one", "branch": "main", "attempt": 1, "outcome": "stop", "started": ENDED - 1, "ended": ENDED} | more
    )


def account(expert: str, attempt: int, said: list, way: str, words: int, *, told: bool) -> tuple[Account, list]:
    """An attempt that said so many *words*, and what the client has then."""
    made = Account(turn="T", branch="main", expert=expert, attempt=attempt, started=ENDED, holds=held(said), way=way)
    outputs = [output for number in range(words) for output in made.take(Text(f"w{number} "), ENDED)]
    if told:
        made.take(Tally(7, words), ENDED)
        made.take(Finish("stop"), ENDED)
    return made, [*said, *outputs]


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 8))
def test_an_answer_counts_once_and_as_its_client_was_told_however_many_gave_up_before(before: list[int], last: int):
    said: list = []
    facts = []
    for number, words in enumerate(before, 1):
        attempt, said = account(f"e{number}", number, said, "prefill" if said else "fresh", words, told=False)
        facts.append(attempt.event(ENDED + number, f"{PASSED_ON}engine broke"))
    attempt, said = account("last", len(before) + 1, said, "prefill" if said else "fresh", last, told=True)
    facts.append(attempt.event(ENDED + 9))
    [usage] = [each for each in attempt.ending(ENDED + 9) if isinstance(each, Usage)]
    [counted] = [found for fact in facts if (found := spent(fact, "acme"))]
    assert (counted.expert, counted.tenant) == ("last", "acme")
    assert (counted.prompt_tokens, counted.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert counted.completion_tokens == sum(before) + last


def test_what_a_call_counts_for():
    counted = spent(called(prompt_tokens=3, completion_tokens=5, burnt_tokens=99, branch="two"), "acme")
    assert counted is not None
    assert counted == Spent("acme", "one", 3, 5, counted.when, "T", "two")
    assert counted.when.timestamp() == ENDED
    assert spent(called(outcome="cancelled", completion_tokens=2), "acme") is not None
    assert spent(called(outcome=f"{PASSED_ON}engine busy", completion_tokens=2), "acme") is None


def test_an_answer_from_the_cache_counts_as_it_was_told():
    attempt = Account(turn="T", branch="main", expert="one", attempt=1, started=ENDED)
    for piece in (Recalled(), Text("hola"), Tally(3, 1), Finish("stop")):
        attempt.take(piece, ENDED)
    fact = attempt.event(ENDED)
    counted = spent(fact, "acme")
    assert (fact.cached, fact.burnt_tokens) == (True, 0)
    assert counted is not None
    assert (counted.prompt_tokens, counted.completion_tokens) == (3, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": -1},
        {"completion_tokens": 2**31},
        {"completion_tokens": 10**30},
        {"ended": -1.0},
        {"ended": 1e18},
        {"ended": float("nan")},
        {"ended": float("inf")},
    ],
)
def test_what_no_engine_can_have_counted_and_no_clock_told_is_refused(wrong: dict[str, float]):
    with pytest.raises(BadRequest):
        spent(called(**wrong), "acme")
