"""Who is loaded, who makes room, who waits: without a process, a clock or a sleep."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from capibara_flow.domain.hosting import MIB, TOKEN_BYTES, Admit, Deed, Hosting, Limits, Need, Refuse, Rest, Start, Stop, estimated_mib
from capibara_flow.errors import EngineBusy, EngineUnreachable

PLENTY = 1_000_000


def hosting(*needs: Need, **limits: object) -> Hosting:
    made = Hosting(Limits(**{"auto_unload_after_s": None, **limits}))  # type: ignore[arg-type]
    for need in needs:
        made.add(need)
    return made


def loaded(*names: str, now: float = 0, **limits: object) -> Hosting:
    """A host that has loaded *names*, one after the other, each used in the second of its place."""
    made = hosting(*(Need(name) for name in names), **{"max_loaded": len(names), **limits})
    for number, name in enumerate(names):
        use(made, name, now + number)
    return made


def use(made: Hosting, name: str, now: float) -> None:
    """Load *name* if need be, and be done with it at once."""
    ticket = 1_000_000 + int(now * 1000)
    made.ask(name, ticket, now)
    if Start(name) in made.decide(now, PLENTY):
        made.loaded(name, now)
        assert Admit(ticket) in made.decide(now, PLENTY)
    made.leave(ticket, now)


def stops(deeds: Iterable[Deed]) -> list[tuple[str, str]]:
    return [(deed.name, deed.why) for deed in deeds if isinstance(deed, Stop)]


def refusals(deeds: Iterable[Deed]) -> dict[int, str]:
    return {deed.ticket: str(deed.error) for deed in deeds if isinstance(deed, Refuse)}


# --- loading ----------------------------------------------------------------------------------------------------


def test_many_requests_make_one_load_and_go_on_together() -> None:
    made = hosting(Need("a"))
    for ticket in range(3):
        made.ask("a", ticket, 0)
    assert made.decide(0, PLENTY) == [Start("a")]
    assert made.decide(1, PLENTY) == []
    made.loaded("a", 2)
    assert made.decide(2, PLENTY) == [Admit(0), Admit(1), Admit(2)]


def test_a_load_is_known_by_earlier_ones_the_newest_counting_most() -> None:
    made = hosting(Need("a", load_seconds=10))
    made.ask("a", 1, 100)
    made.decide(100, PLENTY)
    assert made.eta("a", 104) == 6
    assert made.eta("a", 111) is None  # overdue: nobody knows
    made.loaded("a", 120)
    assert made.facts(120)["a"]["load_seconds"] == pytest.approx(0.3 * 20 + 0.7 * 10)


def test_the_first_load_is_all_that_is_known_at_first() -> None:
    made = hosting(Need("a"))
    made.ask("a", 1, 0)
    made.decide(0, PLENTY)
    assert made.eta("a", 0) is None
    made.loaded("a", 7)
    assert made.facts(7)["a"]["load_seconds"] == 7


# --- making room ------------------------------------------------------------------------------------------------


def test_the_longest_unused_makes_room() -> None:
    made = loaded("a", "b", max_loaded=2)
    made.add(Need("c"))
    use(made, "a", 500)
    made.ask("c", 1, 600)
    assert made.decide(600, PLENTY) == [Stop("b", "evicted")]
    assert made.decide(600, PLENTY) == []
    made.stopped("b")
    assert made.decide(601, PLENTY) == [Start("c")]


def test_of_those_unused_for_as_long_the_one_of_least_priority_makes_room() -> None:
    made = hosting(Need("dear", priority=5), Need("cheap", priority=1), Need("c"), max_loaded=2)
    use(made, "dear", 0)
    use(made, "cheap", 20)
    made.ask("c", 1, 30)
    assert stops(made.decide(30, PLENTY)) == [("cheap", "evicted")]


def test_one_long_unused_makes_room_however_dear_it_is() -> None:
    made = hosting(Need("dear", priority=5), Need("cheap", priority=1), Need("c"), max_loaded=2)
    use(made, "dear", 0)
    use(made, "cheap", 300)
    made.ask("c", 1, 310)
    assert stops(made.decide(310, PLENTY)) == [("dear", "evicted")]


def test_an_idle_one_makes_room_before_a_cheap_one_in_use() -> None:
    made = hosting(Need("dear", priority=5), Need("cheap", priority=1), Need("c"), max_loaded=2)
    use(made, "dear", 0)
    use(made, "cheap", 1)
    made.ask("cheap", 1, 2)
    made.decide(2, PLENTY)
    made.ask("c", 2, 3)
    assert stops(made.decide(3, PLENTY)) == [("dear", "evicted")]


def test_whom_a_crash_cut_off_does_not_keep_the_next_engine_busy() -> None:
    made = hosting(Need("a"), Need("b"), max_loaded=1, crash_base_s=1)
    made.ask("a", 1, 0)
    made.decide(0, PLENTY)
    made.loaded("a", 0)
    made.decide(0, PLENTY)
    made.crashed("a", "it burnt", 1)
    use(made, "a", 5)
    made.ask("b", 2, 6)
    assert stops(made.decide(6, PLENTY)) == [("a", "evicted")]


def test_one_in_use_is_let_finish_but_takes_nobody_new() -> None:
    made = hosting(Need("a"), Need("b"), max_loaded=1)
    made.ask("a", 1, 0)
    made.decide(0, PLENTY)
    made.loaded("a", 1)
    made.decide(1, PLENTY)
    made.ask("b", 2, 2)
    made.ask("a", 3, 3)
    assert made.decide(3, PLENTY) == []
    assert made.eta("b", 3) is None
    made.leave(1, 4)
    assert made.decide(4, PLENTY) == [Stop("a", "evicted")]
    made.stopped("a")
    assert made.decide(5, PLENTY) == [Start("b")]
    made.loaded("b", 6)
    assert made.decide(6, PLENTY) == [Admit(2)]


def test_who_waits_for_the_one_that_is_loaded_now_goes_before_the_others() -> None:
    made = hosting(Need("a"), Need("b"), max_loaded=1)
    made.ask("a", 1, 0)
    made.decide(0, PLENTY)
    made.ask("b", 2, 1)
    made.ask("a", 3, 2)
    made.loaded("a", 5)
    assert made.decide(5, PLENTY) == [Admit(1), Admit(3)]


def test_it_takes_new_ones_again_when_nobody_waits_for_its_place() -> None:
    made = loaded("a", max_loaded=1)
    made.add(Need("b"))
    made.ask("a", 1, 1)
    made.decide(1, PLENTY)
    made.ask("b", 2, 2)
    made.ask("a", 3, 2)
    made.decide(2, PLENTY)
    made.leave(2, 3)
    assert made.decide(3, PLENTY) == [Admit(3)]


def test_several_small_ones_make_room_for_a_large_one() -> None:
    made = hosting(Need("a", memory_mib=400), Need("b", memory_mib=400), Need("large", memory_mib=900), max_loaded=3, reserve_mib=100)
    use(made, "a", 0)
    use(made, "b", 1)
    made.ask("large", 1, 2)
    assert stops(made.decide(2, 300)) == [("a", "evicted"), ("b", "evicted")]
    made.stopped("a")
    assert made.decide(3, 700) == []
    made.stopped("b")
    assert made.decide(4, 1100) == [Start("large")]


def test_memory_that_a_load_has_not_taken_yet_is_promised() -> None:
    made = hosting(Need("a", memory_mib=600), Need("b", memory_mib=600), max_loaded=2, reserve_mib=0)
    made.ask("a", 1, 0)
    made.ask("b", 2, 0)
    assert made.decide(0, 1000) == [Start("a")]
    made.loaded("a", 1, 300)
    assert made.decide(1, 700) == [Admit(1), Start("b")]


def test_a_small_one_does_not_slip_past_a_large_one_that_waits() -> None:
    made = hosting(Need("busy", memory_mib=500), Need("large", memory_mib=900), Need("small", memory_mib=10), max_loaded=3, reserve_mib=0)
    made.ask("busy", 1, 0)
    made.decide(0, 1000)
    made.loaded("busy", 0)
    made.decide(0, 500)
    made.ask("large", 2, 1)
    made.ask("small", 3, 1)
    assert made.decide(1, 500) == []


def test_what_cannot_fit_is_refused_in_numbers() -> None:
    made = hosting(Need("large", memory_mib=9000), reserve_mib=500)
    made.ask("large", 1, 0)
    assert refusals(made.decide(0, 8000)) == {
        1: "large needs 9000 MiB of memory, and with all other experts unloaded there would be 7500 (with 500 kept in reserve)"
    }
    assert made.queued == 0


def test_an_estimate_gives_way_to_what_was_seen_and_the_operators_word_does_not() -> None:
    made = hosting(Need("guessed", estimate_mib=900), Need("told", memory_mib=900), max_loaded=2, reserve_mib=0)
    for name in ("guessed", "told"):
        use(made, name, 0)
        made.measured(name, 300)
        made.measured(name, 200)
    facts = made.facts(0)
    assert (facts["guessed"]["memory_mib"], facts["told"]["memory_mib"]) == (300, 900)


def test_an_estimate_is_the_weights_with_a_fifth_and_the_context() -> None:
    assert estimated_mib(1000 * MIB, 0) == 1200
    assert estimated_mib(1000 * MIB, 8192) == 1200 + 8192 * TOKEN_BYTES // MIB
    assert estimated_mib(None, 8192) is None


# --- letting go -------------------------------------------------------------------------------------------------


def test_unused_it_rests_and_then_goes() -> None:
    made = loaded("a", auto_unload_after_s=100)
    assert made.due(10) == 40
    assert made.decide(49, PLENTY) == []
    assert made.decide(50, PLENTY) == [Rest("a")]
    assert made.decide(60, PLENTY) == []
    assert made.due(60) == 40
    assert made.decide(100, PLENTY) == [Stop("a", "idle")]
    assert made.due(100) is None


def test_used_again_it_starts_to_count_anew() -> None:
    made = loaded("a", auto_unload_after_s=100)
    made.decide(60, PLENTY)
    use(made, "a", 90)
    made.decide(90, PLENTY)
    assert made.decide(139, PLENTY) == []
    assert made.decide(141, PLENTY) == [Rest("a")]


def test_in_use_it_never_goes() -> None:
    made = loaded("a", auto_unload_after_s=100)
    made.ask("a", 1, 1)
    made.decide(1, PLENTY)
    assert made.decide(1000, PLENTY) == []
    assert made.due(1000) is None


def test_it_may_stay_for_ever() -> None:
    made = loaded("a", auto_unload_after_s=None)
    assert made.decide(1e9, PLENTY) == []
    assert made.due(1e9) is None


def test_a_retired_one_finishes_and_goes() -> None:
    made = loaded("a")
    made.ask("a", 1, 1)
    made.decide(1, PLENTY)
    made.retire("a")
    assert made.decide(2, PLENTY) == []
    with pytest.raises(EngineUnreachable, match="no longer served"):
        made.ask("a", 2, 2)
    made.leave(1, 3)
    assert made.decide(3, PLENTY) == [Stop("a", "retired")]


def test_a_changed_one_is_loaded_anew_once_it_is_not_used() -> None:
    made = loaded("a")
    made.ask("a", 1, 1)
    made.decide(1, PLENTY)
    made.add(Need("a", memory_mib=5))
    made.ask("a", 2, 2)
    assert made.decide(2, PLENTY) == []
    made.leave(1, 3)
    assert made.decide(3, PLENTY) == [Stop("a", "retired")]
    made.stopped("a")
    assert made.decide(4, PLENTY) == [Start("a")]


# --- crashes and queues -----------------------------------------------------------------------------------------


def test_the_pause_after_a_crash_doubles_up_to_a_cap() -> None:
    made = hosting(Need("a"), crash_base_s=1, crash_cap_s=5)
    now, pauses = 0.0, []
    for ticket in range(5):
        made.ask("a", ticket, now)
        assert Start("a") in made.decide(now, PLENTY)
        made.crashed("a", "it burnt", now)
        assert refusals(made.decide(now, PLENTY)).keys() == {ticket}
        pauses.append(next(pause for pause in (1, 2, 4, 5) if not made.blocked("a", now + pause)))
        now += 5
    assert pauses == [1, 2, 4, 5, 5]


def test_while_it_pauses_it_is_out_of_reach_and_says_why() -> None:
    made = hosting(Need("a"), crash_base_s=8)
    made.crashed("a", "it burnt", 0)
    with pytest.raises(EngineUnreachable, match=r"it burnt; it is tried again in 5\.0 s"):
        made.ask("a", 1, 3)
    made.ask("a", 1, 8)


@pytest.mark.parametrize(("lived", "pause"), [(59, 4), (60, 1)])
def test_after_a_healthy_time_it_is_forgiven(lived: float, pause: float) -> None:
    made = hosting(Need("a"), crash_base_s=1, healthy_s=60, auto_unload_after_s=None)
    made.crashed("a", "x", 0)
    made.crashed("a", "x", 1)
    use(made, "a", 10)
    made.crashed("a", "x", 10 + lived)
    assert made.blocked("a", 10 + lived + pause - 0.1)
    assert not made.blocked("a", 10 + lived + pause)


def test_beyond_the_queue_it_is_busy_but_not_for_those_who_need_not_wait() -> None:
    made = loaded("a", queue_size=1, max_loaded=2)
    made.add(Need("b"))
    made.ask("b", 1, 1)
    made.decide(1, PLENTY)
    with pytest.raises(EngineBusy, match="1 requests wait"):
        made.ask("b", 2, 1)
    made.ask("a", 3, 1)
    assert made.decide(1, PLENTY) == [Admit(3)]


# --- whatever happens -------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


class Host(RuleBasedStateMachine):
    """Requests come, finish and leave, engines load, crash and end, in any order; the memory is as the engines take it."""

    @initialize(
        most=st.integers(1, 3),
        queue=st.integers(1, 6),
        sizes=st.lists(st.integers(1, 600), min_size=len(NAMES), max_size=len(NAMES)),
        priorities=st.lists(st.integers(0, 5), min_size=len(NAMES), max_size=len(NAMES)),
    )
    def begin(self, most: int, queue: int, sizes: list[int], priorities: list[int]) -> None:
        self.limits = Limits(max_loaded=most, queue_size=queue, auto_unload_after_s=100, reserve_mib=100, crash_base_s=1, crash_cap_s=4)
        self.hosting = Hosting(self.limits)
        self.sizes = dict(zip(NAMES, sizes, strict=True))
        for name, priority in zip(NAMES, priorities, strict=True):
            self.hosting.add(Need(name, priority, memory_mib=self.sizes[name]))
        self.now, self.ticket = 0.0, 0
        self.waiting: dict[int, str] = {}
        self.served: dict[int, str] = {}
        self.phases = dict.fromkeys(NAMES, "cold")

    def do(self) -> None:
        free = 1000 - sum(self.sizes[name] for name, phase in self.phases.items() if phase in ("warm", "stopping"))
        for deed in self.hosting.decide(self.now, free):
            match deed:
                case Start(name):
                    assert self.phases[name] == "cold"
                    assert name in self.waiting.values()
                    self.phases[name] = "loading"
                case Stop(name):
                    assert self.phases[name] == "warm"
                    assert name not in self.served.values(), "one in use must stay"
                    self.phases[name] = "stopping"
                case Admit(ticket):
                    name = self.waiting.pop(ticket)
                    assert self.phases[name] == "warm"
                    self.served[ticket] = name
                case Refuse(ticket):
                    del self.waiting[ticket]

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        self.ticket += 1
        try:
            self.hosting.ask(name, self.ticket, self.now)
        except (EngineBusy, EngineUnreachable):
            return
        self.waiting[self.ticket] = name
        self.do()

    @precondition(lambda self: self.served or self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([*self.served, *self.waiting]))
        self.served.pop(ticket, None)
        self.waiting.pop(ticket, None)
        self.hosting.leave(ticket, self.now)
        self.do()

    @precondition(lambda self: set(self.phases.values()) & {"loading", "stopping"})
    @rule(data=st.data(), well=st.booleans())
    def goes_on(self, data: st.DataObject, well: bool) -> None:
        name = data.draw(st.sampled_from([name for name, phase in self.phases.items() if phase in ("loading", "stopping")]))
        self.settle(name, well=well)

    def settle(self, name: str, *, well: bool) -> None:
        if self.phases[name] == "stopping":
            self.phases[name] = "cold"
            self.hosting.stopped(name)
        elif well:
            self.phases[name] = "warm"
            self.hosting.loaded(name, self.now)
        else:
            self.phases[name] = "cold"
            self.hosting.crashed(name, "it burnt", self.now)
        self.do()

    @precondition(lambda self: "warm" in self.phases.values())
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, phase in self.phases.items() if phase == "warm"]))
        self.phases[name] = "cold"
        self.served = {ticket: each for ticket, each in self.served.items() if each != name}
        self.hosting.crashed(name, "it burnt", self.now)
        self.do()

    @rule(seconds=st.floats(0.1, 200))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do()

    @invariant()
    def never_too_many(self) -> None:
        if hasattr(self, "phases"):
            assert sum(phase != "cold" for phase in self.phases.values()) <= self.limits.max_loaded

    @invariant()
    def never_too_much(self) -> None:
        if hasattr(self, "phases"):
            taken = sum(self.sizes[name] for name, phase in self.phases.items() if phase != "cold")
            assert taken <= 1000 - self.limits.reserve_mib

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "phases"):
            assert {name: self.hosting.phase(name) for name in NAMES} == self.phases
            assert self.hosting.queued == len(self.waiting) <= self.limits.queue_size + len(NAMES)

    def teardown(self) -> None:
        """Everybody who waits is served, or refused for a reason, once others finish."""
        if not hasattr(self, "phases"):
            return
        for _ in range(200):
            if not (self.waiting or self.served):
                return
            for ticket in list(self.served):
                del self.served[ticket]
                self.hosting.leave(ticket, self.now)
            self.do()
            for name in [name for name, phase in self.phases.items() if phase in ("loading", "stopping")]:
                self.settle(name, well=True)
        pytest.fail(f"still waiting: {self.waiting}, {self.hosting.facts(self.now)}")


TestHost = Host.TestCase
TestHost.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=30), st.integers(1, 3))
def test_whoever_came_first_is_loaded_first(asked: list[str], most: int) -> None:
    """With every answer as short as can be, experts are loaded in the order in which they were first asked for."""
    made = hosting(*(Need(name) for name in NAMES), max_loaded=most)
    for ticket, name in enumerate(asked):
        made.ask(name, ticket, 0)
    started: list[str] = []
    while made.queued:
        for deed in made.decide(0, PLENTY):
            match deed:
                case Start(name):
                    started.append(name)
                case Admit(ticket):
                    made.leave(ticket, 0)
                case Stop(name):
                    made.stopped(name)
        for name in started:
            if made.phase(name) == "loading":
                made.loaded(name, 0)
    assert started == list(dict.fromkeys(asked))
