"""A feed with a tap: batches are taken where they arrive, and whatever cannot be taken so comes to the reader, in order."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.ports import Batch, Feed, Identity
from capibara_flow.runtime import turns
from capibara_flow.runtime.client import Hear, TokenClient
from capibara_flow.runtime.turns import Follower, NatsTurns
from tests.runtime.memory import MemoryClient
from tests.runtime.rig import QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import RouteTurn
from topics.output import Done, Failed, Output, Token, parse

ANA = Identity(principal="ana", tenant="acme")
DONE = Done(turn="T1", finish_reason="stop", model_id="phi")
LATE = Failed(turn="T1", title="late", status=500, detail="after the end")

Takes = Callable[[], bool]


def token(text: object) -> Token:
    return Token(turn="T1", text=str(text))


def outputs(count: int) -> list[Output]:
    """That many, the last one final."""
    return [*map(token, range(count - 1)), DONE]


def always() -> bool:
    return True


class Clock:
    """The timers of a follower, which ring when a test says so."""

    def __init__(self) -> None:
        self.timers: dict[Callable[[], None], float] = {}
        self._callbacks = itertools.count()

    def create_future(self) -> asyncio.Future[bool]:
        return asyncio.get_running_loop().create_future()

    def call_later(self, delay: float, callback: Callable[[], None]) -> "Timer":
        return Timer(self, delay, callback)

    def ring(self) -> None:
        """Let the one timer ring that is set."""
        [(callback, _)] = self.timers.items()
        self.timers.clear()
        callback()

    @property
    def delays(self) -> list[float]:
        return list(self.timers.values())


class Timer:
    """As ``asyncio.TimerHandle``."""

    def __init__(self, clock: Clock, delay: float, callback: Callable[[], None]) -> None:
        self._clock, self._callback = clock, callback
        clock.timers[callback] = delay

    def cancel(self) -> None:
        self._clock.timers.pop(self._callback, None)


class Reader:
    """Reads with a tap that takes what *takes* says; *got* is everything, *groups* what woke the reader, *tapped* counts the rest."""

    def __init__(self, feed: Feed, takes: Takes = always) -> None:
        self.got: list[Output] = []
        self.groups: list[list[Output]] = []
        self.offered = self.tapped = 0
        self._takes = takes
        feed.tap(self._take)
        self.task = asyncio.create_task(self._read(feed))

    def _take(self, batch: Batch) -> bool:
        self.offered += 1
        if not self._takes():
            return False
        self.tapped += 1
        self.got += map(parse, batch.lines)
        return True

    async def _read(self, feed: Feed) -> None:
        async with aclosing(feed):
            async for group in feed:
                self.groups.append([parse(each) for batch in group for each in batch.lines])
                self.got += self.groups[-1]

    async def ended(self) -> list[Output]:
        """Everything, once the reading has ended by itself."""
        async with asyncio.timeout(40):
            await self.task
        return self.got


class Following:
    """A ``ports.Feed`` over one follower of a stream in memory, with a clock that is rung by hand."""

    def __init__(self, client: MemoryClient) -> None:
        self.clock = Clock()
        self._follower = Follower(cast(TokenClient, client), "T1", "main", 0)
        self._follower._loop = cast(Any, self.clock)
        self.tap = self._follower.tap
        self.start, self.receive = self._follower.start, self._follower._receive

    def __aiter__(self) -> AsyncIterator[Sequence[Batch]]:
        return self._follower.batches(backfill=False)

    async def aclose(self) -> None:
        await self._follower.stop()


async def settled() -> None:
    """Return when every task that could go on has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def memory() -> MemoryClient:
    return MemoryClient()


@pytest.fixture
async def following(memory: MemoryClient) -> Following:
    feed = Following(memory)
    await feed.start()
    return feed


async def reading(feed: Feed, takes: Takes = always) -> Reader:
    """A reader that waits."""
    reader = Reader(feed, takes)
    await settled()
    return reader


def choosing(*choices: bool | type[Exception]) -> Takes:
    """Takes, refuses or raises in turn; takes everything after that."""
    left = iter(choices)

    def takes() -> bool:
        choice = next(left, True)
        if isinstance(choice, type):
            raise choice("a tap that hurts")
        return choice

    return takes


# --- in memory -------------------------------------------------------------------------------------------------


async def test_what_is_tapped_comes_once_and_in_order_and_wakes_nobody(memory: MemoryClient, following: Following):
    reader = await reading(following)
    for each in outputs(50):
        memory.say(each)
        await asyncio.sleep(0)
    assert await reader.ended() == outputs(50)
    assert (reader.tapped, reader.groups, memory.asked) == (50, [], 0)


async def test_several_outputs_of_one_message_are_tapped_as_one_batch(memory: MemoryClient, following: Following):
    reader = await reading(following)
    memory.deliver(memory.store(outputs(5)))
    assert await reader.ended() == outputs(5)
    assert reader.tapped == 1


async def test_what_is_refused_and_all_behind_it_comes_to_the_reader_together(memory: MemoryClient, following: Following):
    reader = await reading(following, choosing(True, False))
    memory.say(*map(token, range(5)))
    await settled()
    memory.say(token(5))
    assert reader.groups == [[token(1), token(2), token(3), token(4)]]
    assert (reader.got, reader.tapped, reader.offered) == ([*map(token, range(6))], 2, 3)
    memory.say(DONE)
    assert await reader.ended() == [*map(token, range(6)), DONE]
    assert memory.asked == 0


async def test_a_final_batch_that_is_refused_ends_the_reading_at_the_reader(memory: MemoryClient, following: Following):
    reader = await reading(following, choosing(True, False))
    memory.say(token("a"), DONE, token("b"), LATE)
    assert await reader.ended() == [token("a"), DONE]
    assert reader.groups == [[DONE]]


@pytest.mark.parametrize("lost", [0, 1])
async def test_nothing_is_read_beyond_an_end_that_was_tapped(memory: MemoryClient, following: Following, lost: int):
    reader = await reading(following)
    memory.say(token("a"), DONE)
    for each in (token("b"), LATE)[lost:]:  # a gap behind the end is no reason to look there
        memory.store([each])
        memory.deliver(len(memory.messages) - 1)
    assert await reader.ended() == [token("a"), DONE]
    assert (reader.groups, memory.asked) == ([], 0)


@pytest.mark.parametrize("lost", [{0}, {1}, {0, 1, 2}, {1, 3}, {2, 3, 4}])
async def test_what_got_lost_in_the_middle_is_healed(memory: MemoryClient, following: Following, lost: set[int]):
    reader = await reading(following)
    for place, each in enumerate(outputs(6)):
        memory.store([each])
        if place not in lost:
            memory.deliver(place)
            await settled()
    assert await reader.ended() == outputs(6)
    assert reader.tapped > 0
    assert memory.asked > 0


async def test_a_lost_end_is_found_at_the_next_silence_although_words_came_before(memory: MemoryClient, following: Following):
    reader = await reading(following)
    for number in range(3):
        memory.say(token(number))
        following.clock.ring()  # not silent: it is set anew
        await settled()
        assert (memory.asked, following.clock.delays) == (0, [turns._IDLE_FIRST])
    memory.store([DONE])
    following.clock.ring()
    assert await reader.ended() == [*map(token, range(3)), DONE]
    assert (memory.asked, reader.groups) == (1, [[DONE]])


async def test_a_turn_that_speaks_again_is_asked_for_soon_again(memory: MemoryClient, following: Following):
    reader = await reading(following)
    for delay in (1.0, 2.0, 4.0):
        assert following.clock.delays == [delay]
        following.clock.ring()
        await settled()
    memory.say(token("a"))
    assert following.clock.delays == [turns._IDLE_FIRST]  # at once, not when the long wait would have ended
    following.clock.ring()
    assert following.clock.delays == [turns._IDLE_FIRST]
    following.clock.ring()
    await settled()
    assert following.clock.delays == [2 * turns._IDLE_FIRST]
    memory.say(DONE)
    assert await reader.ended() == [token("a"), DONE]


async def test_a_tap_that_raises_loses_nothing(memory: MemoryClient, following: Following):
    reader = await reading(following, choosing(True, ValueError))
    memory.say(*map(token, range(4)))
    await settled()
    memory.say(DONE)
    assert await reader.ended() == [*map(token, range(4)), DONE]
    assert reader.groups == [[token(1), token(2), token(3)]]


@pytest.mark.parametrize("tapped", [True, False])
async def test_output_that_nobody_can_read_is_told_to_the_reader(memory: MemoryClient, following: Following, tapped: bool):
    reader = await reading(following, lambda: tapped)
    memory.say(token("a"))
    await settled()
    memory.messages.append(b"no output")
    memory.deliver(1)
    with pytest.raises(ValueError, match="subsection not found"):
        await reader.ended()
    assert reader.got == [token("a")]
    assert not memory.listened


async def test_a_reader_that_is_being_cancelled_is_tapped_no_more(memory: MemoryClient, following: Following):
    reader = await reading(following)
    memory.say(token("a"))
    reader.task.cancel()
    memory.say(token("b"), DONE)
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert reader.got == [token("a")]


async def test_a_tapped_reading_that_ends_early_leaves_nothing_behind(memory: MemoryClient, following: Following):
    reader = await reading(following)
    memory.say(token("a"))
    following.clock.ring()  # so that the timer is a later one than the first
    assert following.clock.timers
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert not following.clock.timers
    assert not memory.ears
    memory.store([DONE])
    following.receive(b"", b"NATS/1.0\r\nNats-Sequence: 14\r\nNats-Last-Sequence: 11\r\n\r\n", DONE.line())  # it was under way
    assert (reader.got, reader.offered) == ([token("a")], 1)


deeds = st.lists(st.tuples(st.sampled_from(["say", "say", "store", "deliver", "pass", "pass", "ring"]), st.integers(0, 30)), max_size=60)


@given(st.integers(1, 14), deeds, st.lists(st.sampled_from([True, True, False, ValueError]), max_size=30))
async def test_whatever_is_lost_repeated_late_or_refused_everything_comes_once_and_in_order(
    count: int, script: list[tuple[str, int]], choices: list[bool | type[Exception]]
):
    memory = MemoryClient()
    feed = Following(memory)
    await feed.start()
    reader = await reading(feed, choosing(*choices))
    unsaid = [*outputs(count), token("behind the end"), LATE]
    for deed, number in script:
        if deed in {"say", "store"} and unsaid:
            place = memory.store([unsaid.pop(0)])
            if deed == "say":
                memory.deliver(place)
        elif deed == "deliver" and memory.messages:
            memory.deliver(number % len(memory.messages))
        elif deed == "ring" and feed.clock.timers:
            feed.clock.ring()
        elif deed == "pass":
            await asyncio.sleep(0)
    for each in unsaid:
        memory.store([each])
    for _ in range(3):  # a first silence may only be the one after what was just tapped
        await settled()
        if feed.clock.timers:
            feed.clock.ring()
    assert await reader.ended() == outputs(count)
    assert not feed.clock.timers
    assert not memory.ears


# --- on a real broker ------------------------------------------------------------------------------------------


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


@pytest.fixture
def door(client: Line) -> NatsTurns:
    return NatsTurns(client, ())


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No help from the poll of a silent feed."""
    monkeypatch.setattr(turns, "_IDLE_FIRST", 600)
    monkeypatch.setattr(turns, "_IDLE_MOST", 600)


async def opened(door: NatsTurns) -> Feed:
    return await door.open(RouteTurn(turn="T1", request=QUESTION), ANA, time.time() + 60)


async def say(rig: Rig, *said: Output) -> None:
    async with (await rig.answers()).open("T1", "main") as answer:
        for each in said:
            await answer.finish(each)


def through(client: Line, feed: Callable[[Callable[[], None]], None]) -> None:
    """Let every live message go through *feed*, which gets a function that delivers it."""

    def overhear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        if subject.startswith(b"cf.live."):
            feed(lambda: ear(subject, headers, data))
        else:
            ear(subject, headers, data)

    client.overhear = overhear


async def test_a_whole_answer_is_tapped_and_the_reader_sleeps(rig: Rig, door: NatsTurns, client: Line, never_idle: None):
    reader = await reading(await opened(door))
    await say(rig, *outputs(300))
    assert await reader.ended() == outputs(300)
    assert (reader.tapped, reader.groups) == (300, [])
    assert not client._ears
    assert door.facts()["streams_open"] == 0


async def test_what_is_stored_is_read_and_what_comes_is_tapped(rig: Rig, door: NatsTurns, never_idle: None):
    async with (await rig.answers()).open("T1", "main") as answer:
        for each in outputs(9)[:4]:
            await answer.finish(each)
        reader = Reader(await door.follow("T1"))
        await until(lambda: len(reader.got) == 4)
        await settled()
        for each in outputs(9)[4:]:
            await answer.finish(each)
    assert await reader.ended() == outputs(9)
    assert (reader.groups, reader.tapped) == ([outputs(9)[:4]], 5)


@pytest.mark.parametrize("seed", range(8))
async def test_a_feed_that_loses_repeats_and_jumps_under_a_tap_that_is_moody(
    rig: Rig, door: NatsTurns, client: Line, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(turns, "_IDLE_FIRST", 0.05)
    chance = random.Random(seed)
    kept: list[Callable[[], None]] = []

    def keep(deliver: Callable[[], None]) -> None:
        kept.extend([deliver] * chance.choices([0, 1, 2, 3], [1, 9, 1, 1])[0])
        if chance.random() < 0.1:
            chance.shuffle(kept)
        for each in [kept.pop(0) for _ in range(max(0, len(kept) - chance.choice([0, 0, 0, 2])))]:
            each()

    through(client, keep)
    reader = await reading(await opened(door), lambda: chance.random() < 0.8)
    async with (await rig.answers()).open("T1", "main") as answer:
        for each in outputs(60):
            await answer.finish(each)
            await settled()  # a reader that heals all the time has nothing tapped
    assert await reader.ended() == outputs(60)
    assert reader.tapped
    assert reader.groups
    assert not client._ears


async def test_a_broker_that_dies_under_a_tap_loses_nothing(rig: Rig, door: NatsTurns, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_IDLE_FIRST", 0.1)
    reader = await reading(await opened(door))
    async with (await rig.answers()).open("T1", "main") as answer:
        for number, each in enumerate(outputs(60)):
            await answer.finish(each)
            if number in {19, 39}:
                await rig.restart()
    assert await reader.ended() == outputs(60)


async def test_a_tap_that_raises_harms_no_other_reader_of_the_connection(rig: Rig, door: NatsTurns, never_idle: None):
    hurt = await reading(await opened(door), choosing(*[ValueError] * 100))
    other = await reading(await door.follow("T1"))
    await say(rig, *outputs(40))
    assert await hurt.ended() == await other.ended() == outputs(40)
    assert hurt.tapped == 0
    assert other.tapped == 40


async def test_closing_a_tapped_reading_early_leaves_nothing_behind(rig: Rig, door: NatsTurns, client: Line):
    reader = await reading(await opened(door))
    await say(rig, token("a"), token("b"))
    await until(lambda: reader.tapped == 2)
    assert client._ears
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert not client._ears
    assert not any(each._subject.startswith("cf.live.") for each in client._subs.values())
    assert door.facts()["streams_open"] == 0
