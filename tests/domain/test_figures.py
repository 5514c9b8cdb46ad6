"""What a router tells of its decisions."""

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.figures import Choices
from topics.chat import Decision


def decision(route: str, confidence: float = 0.5) -> Decision:
    return Decision(model_id=f"expert of {route}", route_name=route, complexity="simple", confidence=confidence, reasoning="")


def test_nothing_decided_is_told_as_such() -> None:
    assert Choices().facts() == {"decisions": 0, "routes": {}, "complexities": {}, "experts": {}}


def test_decisions_are_counted_and_the_most_frequent_come_first() -> None:
    choices = Choices()
    for route, seconds in (("math", 0.1), ("programming", 0.2), ("programming", 0.3)):
        choices.add(decision(route), seconds)
    facts = choices.facts()
    assert list(facts["routes"].items()) == [("programming", 2), ("math", 1)]
    assert facts["complexities"] == {"simple": 3}
    assert facts["experts"]["expert of math"] == 1
    assert facts["seconds"] == {"median": 0.2, "p95": 0.3}


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=700))
def test_medians_are_of_late_and_counts_of_all(given_: list[tuple[float, float]]) -> None:
    choices = Choices()
    for seconds, confidence in given_:
        choices.add(decision("r", confidence), seconds)
    facts, late = choices.facts(), [seconds for seconds, _ in given_[-500:]]
    assert facts["decisions"] == len(given_)
    assert min(late) <= facts["seconds"]["median"] <= facts["seconds"]["p95"] <= max(late)
    assert 0 <= facts["confidence_median"] <= 1
