"""The circuit breaker, and who takes work."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from capibara_flow.domain.health import Breaker, Fault, Thresholds, takes_work

LIMITS = Thresholds(faults=3, rest_seconds=2, most_rest_seconds=10, trial_seconds=60)
FAULTS: list[Fault] = ["refused", "unreachable", "broke"]


def opened(fault: Fault = "broke", now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(LIMITS.faults):
        breaker = breaker.failed(now, fault, LIMITS)
    return breaker


@pytest.mark.parametrize("fault", ["unreachable", "broke"])
def test_it_opens_after_so_many_faults_in_a_row(fault: Fault) -> None:
    breaker = Breaker().failed(0, fault, LIMITS).failed(0, fault, LIMITS)
    assert breaker.admits(0)
    assert not breaker.failed(0, fault, LIMITS).admits(1.9)
    assert breaker.succeeded().failed(0, fault, LIMITS).admits(0)


def test_a_refused_connection_opens_it_at_once() -> None:
    breaker = Breaker().failed(0, "refused", LIMITS)
    assert breaker.state == "open"
    assert not breaker.admits(1.9)
    assert breaker.admits(2)


def test_one_trial_at_a_time_is_let_through() -> None:
    trial = opened().admitted(2, LIMITS)
    assert (trial.state, trial.admits(3)) == ("half_open", False)
    assert trial.admits(62)  # nobody has heard of it for a minute
    assert trial.let_go().admits(3)
    assert trial.succeeded() == Breaker()


def test_each_trial_that_fails_makes_the_rest_longer_up_to_a_limit() -> None:
    breaker, now, rests = opened(), 0.0, []
    for _ in range(4):
        now = breaker.until
        breaker = breaker.admitted(now, LIMITS).failed(now, "broke", LIMITS)
        rests.append(breaker.until - now)
    assert rests == [4, 8, 10, 10]


def test_the_first_of_an_answer_lets_others_follow_on_probation() -> None:
    trial = opened().admitted(2, LIMITS).began(LIMITS)
    assert trial.admits(2)
    assert not trial.failed(2, "broke", LIMITS).admits(2)
    assert trial.succeeded().failed(2, "broke", LIMITS).admits(2)


def test_a_sign_of_life_disproves_what_a_probe_could_have_seen_only() -> None:
    assert opened("refused").alive() == opened("unreachable").alive() == Breaker()
    assert not opened("broke").alive().admits(1)
    assert opened("broke").failed(0, "refused", LIMITS).alive().admits(0)  # it was gone: that explains the broken answers
    assert Breaker().failed(0, "unreachable", LIMITS).alive() == Breaker()
    twice = Breaker().failed(0, "broke", LIMITS).failed(0, "broke", LIMITS)
    assert not twice.alive().failed(0, "broke", LIMITS).admits(0)


def test_calls_that_were_made_before_it_opened_tell_nothing_new() -> None:
    breaker = opened("broke")
    assert breaker.failed(1, "broke", LIMITS).until == breaker.until


class Life(RuleBasedStateMachine):
    """Whatever happens to an engine, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now = 0.0
        self.row = 0

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.admits(self.now))
    @rule()
    def a_call_is_made(self) -> None:
        was = self.breaker
        self.breaker = was.admitted(self.now, LIMITS)
        assert (self.breaker == was) == (was.state == "closed")
        assert was.state == "closed" or not self.breaker.admits(self.now)  # the trial is alone

    @rule(fault=st.sampled_from(FAULTS))
    def something_fails(self, fault: Fault) -> None:
        self.row += 1
        was, self.breaker = self.breaker, self.breaker.failed(self.now, fault, LIMITS)
        assert self.breaker.state == "open" or (was.state == "closed" and self.row < LIMITS.faults and fault != "refused")

    @rule()
    def an_answer_begins(self) -> None:
        self.breaker = self.breaker.began(LIMITS)
        assert self.breaker.admits(self.now)

    @rule()
    def an_answer_is_complete(self) -> None:
        self.row = 0
        self.breaker = self.breaker.succeeded()
        assert self.breaker == Breaker()

    @rule()
    def a_probe_is_well(self) -> None:
        hidden, self.breaker = self.breaker.hidden, self.breaker.alive()
        assert hidden or self.breaker == Breaker()
        self.row = self.breaker.faults

    @rule()
    def a_call_is_given_up(self) -> None:
        was, self.breaker = self.breaker, self.breaker.let_go()
        assert was.state == self.breaker.state

    @invariant()
    def nobody_is_shut_out_for_ever(self) -> None:
        assert self.breaker.until <= self.now + LIMITS.trial_seconds
        assert self.breaker.admits(max(self.now, self.breaker.until))

    @invariant()
    def an_open_one_rests_within_its_limits(self) -> None:
        if self.breaker.state == "open":
            assert self.breaker.until <= self.now + LIMITS.most_rest_seconds
            assert self.breaker.openings >= 1


TestLife = Life.TestCase


def report(process: str, **available: bool) -> dict[str, Any]:
    return {"process": process, "facts": {"experts": {name: {"available": told} for name, told in available.items()}}}


@pytest.mark.parametrize(
    ("available", "reports", "takes"),
    [
        (True, [report("b", phi=True)], True),
        (False, [], True),  # the turn goes on to another expert, or ends with an honest error
        (False, [report("b", phi=False), report("c", other=True)], True),
        (False, [report("a", phi=True)], True),  # what we said of ourselves a moment ago
        (False, [report("b", phi=True)], False),
        (False, [report("b", phi=False), report("c", phi=True)], False),
    ],
)
def test_who_takes_work(available: bool, reports: list[dict[str, Any]], takes: bool) -> None:
    assert takes_work("phi", available, "a", reports) is takes


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["facts", "experts", "phi", "available"]), inner, max_size=3)
    ),
)


@given(st.booleans(), st.lists(st.dictionaries(st.sampled_from(["process", "facts"]), ANYTHING), max_size=3))
def test_reports_of_any_form_are_borne(available: bool, reports: list[dict[str, Any]]) -> None:
    assert takes_work("phi", available, "a", reports) or not available
