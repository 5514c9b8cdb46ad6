"""The door's side of the broker: a feed that loses, repeats and jumps, and a broker that is full, lacks things or dies."""

import asyncio
import gc
import itertools
import random
import time
from collections.abc import AsyncIterable, Callable, Sequence
from contextlib import aclosing

import pytest
import stamina
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from capibara_flow.errors import BrokerUnavailable, QueueFull, TooLarge
from capibara_flow.ports import Batch, Feed, Identity
from capibara_flow.runtime import output, turns
from capibara_flow.runtime.answers import FencedAnswer
from capibara_flow.runtime.client import Hear, TokenClient
from capibara_flow.runtime.output import Stored, fits, last_message, stored
from capibara_flow.runtime.turns import Follower, NatsTurns
from tests.runtime.rig import EXPERT, QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import CancelTurn, ChatMessage, ChatRequest, RouteTurn
from topics.message import DEADLINE, PRINCIPAL, TENANT
from topics.output import Done, Failed, Output, Token, parse
from topics.streams import caller_consumer, router_consumer

ANA = Identity(principal="ana", tenant="acme")
DONE = Done(turn="T1", finish_reason="stop", model_id="phi")
DATA, LIVE = "cf.out.T1.data.main", "cf.live.T1.main"
CONSUMERS = (router_consumer(), EXPERT)


def token(text: object) -> Token:
    return Token(turn="T1", text=str(text))


def outputs(count: int) -> list[Output]:
    """That many, the last one final."""
    return [*map(token, range(count - 1)), DONE]


async def say(rig: Rig, *said: Output, turn: str = "T1") -> None:
    """Store *said*, each in a message of its own."""
    async with (await rig.answers()).open(turn, "main") as answer:
        await write(answer, *said)


async def write(answer: FencedAnswer, *said: Output) -> None:
    for each in said:
        await answer.finish(each)


async def heard(batches: AsyncIterable[Sequence[Batch]]) -> list[Batch]:
    """All of a reading, to its end."""
    async with asyncio.timeout(40):
        return [batch async for group in batches for batch in group]


def read(batches: list[Batch]) -> list[Output]:
    return [parse(each) for batch in batches for each in batch.lines]


def command(turn: str = "T1", text: str | None = None) -> RouteTurn:
    request = QUESTION if text is None else ChatRequest(messages=(ChatMessage(role="user", content=text),))
    return RouteTurn(turn=turn, request=request)


async def opened(door: NatsTurns, turn: str = "T1") -> Feed:
    return await door.open(command(turn), ANA, time.time() + 60)


def listening(client: TokenClient) -> list[str]:
    """The subjects of live feeds that *client* is subscribed to."""
    return [each._subject for each in client._subs.values() if each._subject.startswith("cf.live.")]


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


@pytest.fixture
def door(client: Line) -> NatsTurns:
    return NatsTurns(client, CONSUMERS)


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No help from the poll of a silent feed."""
    monkeypatch.setattr(turns, "_IDLE_FIRST", 600)
    monkeypatch.setattr(turns, "_IDLE_MOST", 600)


@pytest.fixture
def soon_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_IDLE_FIRST", 0.1)


Deliver = Callable[[], None]


def through(client: Line, feed: Callable[[Deliver], None]) -> None:
    """Let every live message go through *feed*, which gets a function that delivers it."""

    def overhear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        if subject == LIVE.encode():
            feed(lambda: ear(subject, headers, data))
        else:
            ear(subject, headers, data)

    client.overhear = overhear


# --- reading ---------------------------------------------------------------------------------------------------


async def test_an_opened_turn_is_followed_from_its_first_output_to_its_last(rig: Rig, door: NatsTurns, never_idle: None):
    batches = await opened(door)
    await say(rig, *outputs(300))
    found = await heard(batches)
    assert read(found) == outputs(300)
    assert [batch.final for batch in found] == [False] * 299 + [True]
    assert [batch.sequence for batch in found] == sorted({batch.sequence for batch in found})


async def test_several_outputs_of_one_message_are_one_batch(rig: Rig, door: NatsTurns):
    router = await rig.client("router")
    await router.jetstream().publish(DATA, b"\n".join(each.line() for each in outputs(3)))
    [batch] = await heard(await door.follow("T1"))
    assert batch.final
    assert read([batch]) == outputs(3)


async def test_following_from_any_edge_after_any_sequence_gives_the_rest(rig: Rig, door: NatsTurns, never_idle: None):
    await say(rig, token("of another turn"), turn="T0")
    await say(rig, *outputs(6))
    elsewhere = NatsTurns(await rig.client("edge"), ())
    whole = await heard(await elsewhere.follow("T1"))
    assert read(whole) == outputs(6)
    last = whole[-1].sequence
    for after in (last, last + 1, 2**62):
        assert await heard(await door.follow("T1", after)) == [whole[-1]]
    for after in range(last):
        assert await heard(await door.follow("T1", after)) == [batch for batch in whole if batch.sequence > after]


async def test_following_a_long_answer_gives_all_of_it(rig: Rig, door: NatsTurns, never_idle: None):
    await say(rig, *outputs(600))
    assert read(await heard(await door.follow("T1"))) == outputs(600)


async def test_following_joins_what_is_stored_and_what_comes(rig: Rig, door: NatsTurns, never_idle: None):
    await rig.ask("T1")
    async with (await rig.answers()).open("T1", "main") as answer, aclosing(await door.follow("T1")) as batches:
        await write(answer, *outputs(6)[:3])
        found = list(await anext(aiter(batches)))
        assert read(found) == outputs(6)[:3]
        await write(answer, *outputs(6)[3:])
        assert read(await heard(batches)) == outputs(6)[3:]


async def test_following_the_end_waits_for_more(rig: Rig, door: NatsTurns):
    async with (await rig.answers()).open("T1", "main") as answer:
        await write(answer, token("a"))
        [first] = await anext(aiter(await door.follow("T1")))
        rest = asyncio.create_task(heard(await door.follow("T1", first.sequence)))
        await write(answer, DONE)
        assert read(await rest) == [token("a"), DONE]  # the last one again: it might have been the end


async def test_nothing_is_read_beyond_the_end(rig: Rig, door: NatsTurns, client: Line, never_idle: None):
    late = Failed(turn="T1", title="late", status=500, detail="after the end")
    live = await opened(door)
    arrived = 0

    def count(deliver: Deliver) -> None:
        nonlocal arrived
        deliver()
        arrived += 1

    through(client, count)
    await say(rig, token("a"), DONE, token("b"), late)
    await until(lambda: arrived == 4)
    assert read(await heard(live)) == [token("a"), DONE]
    assert read(await heard(await door.follow("T1"))) == [token("a"), DONE]


# --- a feed that cannot be trusted -----------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [{0}, {1}, {0, 1, 2}, {1, 3}, {2, 3, 4}])
async def test_what_the_feed_lost_in_the_middle_is_read_from_the_stream(
    rig: Rig, door: NatsTurns, client: Line, never_idle: None, lost: set[int]
):
    places = itertools.count()

    def lose(deliver: Deliver) -> None:
        if next(places) not in lost:
            deliver()

    through(client, lose)
    batches = await opened(door)
    await say(rig, *outputs(6))
    assert read(await heard(batches)) == outputs(6)


@pytest.mark.parametrize("lost", [{5}, {4, 5}, {0, 1, 2, 3, 4, 5}])
async def test_a_lost_end_is_found_by_asking(rig: Rig, door: NatsTurns, client: Line, soon_idle: None, lost: set[int]):
    places = itertools.count()

    def lose(deliver: Deliver) -> None:
        if next(places) not in lost:
            deliver()

    through(client, lose)
    batches = await opened(door)
    await say(rig, *outputs(6))
    assert read(await heard(batches)) == outputs(6)


async def test_a_silent_turn_is_asked_for_less_and_less_often(rig: Rig, client: Line, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_IDLE_FIRST", 0.01)
    monkeypatch.setattr(turns, "_IDLE_MOST", 0.04)
    follower = Follower(client, "T1", "main", 0)
    waits: list[float] = []
    arrivals = follower._arrivals

    async def recorded(idle: float) -> list[Batch]:
        waits.append(idle)
        return await arrivals(idle)

    monkeypatch.setattr(follower, "_arrivals", recorded)
    await follower.start()
    reading = asyncio.create_task(heard(follower.batches(backfill=False)))
    await until(lambda: len(waits) > 4)
    await say(rig, token("a"), DONE)
    await reading
    assert waits[:5] == [0.01, 0.02, 0.04, 0.04, 0.04]
    await follower.stop()


@pytest.mark.parametrize("seed", range(8))
async def test_a_feed_that_repeats_and_jumps_doubles_nothing(rig: Rig, door: NatsTurns, client: Line, never_idle: None, seed: int):
    chance = random.Random(seed)
    kept: list[Deliver] = []
    arrived = 0

    def keep(deliver: Deliver) -> None:
        nonlocal arrived
        arrived += 1
        kept.extend([deliver] * chance.randint(1, 3))
        if len(kept) >= 8:
            chance.shuffle(kept)
            for each in [kept.pop() for _ in range(5)]:
                each()

    through(client, keep)
    batches = await opened(door)
    reading = asyncio.create_task(heard(batches))
    await say(rig, *outputs(30))
    await until(lambda: arrived == 30)
    for each in kept:
        each()
    assert read(await reading) == outputs(30)


async def test_a_feed_told_backwards_is_put_in_order(rig: Rig, door: NatsTurns, client: Line, never_idle: None):
    kept: list[Deliver] = []

    def keep(deliver: Deliver) -> None:
        kept.append(deliver)

    through(client, keep)
    batches = await opened(door)
    await say(rig, *outputs(8))
    await until(lambda: len(kept) == 8)
    for deliver in reversed(kept):
        deliver()
    assert read(await heard(batches)) == outputs(8)


async def test_a_reader_too_slow_for_the_feed_gets_everything(rig: Rig, client: Line, never_idle: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_MOST_PENDING", 10)
    follower = Follower(client, "T1", "main", 0)
    most = arrived = 0

    def count(deliver: Deliver) -> None:
        nonlocal most, arrived
        deliver()
        most, arrived = max(most, len(follower._pending)), arrived + 1

    through(client, count)
    await follower.start()
    await say(rig, *outputs(333))
    await until(lambda: arrived == 333)
    assert read(await heard(follower.batches(backfill=False))) == outputs(333)
    assert most == 10
    await follower.stop()


async def test_a_message_without_its_sequence_does_not_end_the_reading(rig: Rig, client: Line, door: NatsTurns, soon_idle: None):
    batches = await opened(door)
    first = True

    def overhear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        nonlocal first
        broken = first and subject == LIVE.encode()
        first = first and not broken
        ear(subject, b"" if broken else headers, data)

    client.overhear = overhear
    await say(rig, *outputs(4))
    assert read(await heard(batches)) == outputs(4)


async def test_a_broker_that_dies_while_we_follow_loses_nothing(rig: Rig, door: NatsTurns, soon_idle: None):
    batches = await opened(door)
    reading, following = (asyncio.create_task(heard(each)) for each in (batches, await door.follow("T1")))
    async with (await rig.answers()).open("T1", "main") as answer:
        for part in (slice(0, 30), slice(30, 60), slice(60, 90)):
            await write(answer, *outputs(90)[part])
            if part.stop < 90:
                await rig.restart()
    assert read(await reading) == outputs(90)
    assert read(await following) == outputs(90)


async def test_following_begins_while_the_broker_is_away(
    rig: Rig, client: Line, door: NatsTurns, soon_idle: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(output, "_TIMEOUT", 0.1)
    await say(rig, *outputs(3))
    asked: list[str] = []

    def ask(subject: str, body: bytes) -> bool:
        asked.append(subject)
        return False

    client.swallow = ask
    await asyncio.to_thread(rig.broker.kill)
    await until(lambda: not client.is_connected)
    following = asyncio.create_task(heard(await door.follow("T1")))
    await until(lambda: len(asked) > 2)  # the first and the second in vain
    await asyncio.to_thread(rig.broker.restart)
    assert read(await following) == outputs(3)


# --- asking ----------------------------------------------------------------------------------------------------


async def test_an_accepted_turn_is_stored_with_what_concerns_it(rig: Rig, door: NatsTurns):
    await door.open(command(), ANA, 1234.5678)
    message = await rig.admin.get_last_msg("CF_WORK_ROUTER", "cf.work.T1.router")
    assert RouteTurn.read(message.data or b"") == command()
    headers = message.headers or {}
    assert (headers[TENANT], headers[PRINCIPAL], headers[DEADLINE]) == ("acme", "ana", "1234.568")


async def test_the_same_turn_twice_is_one(rig: Rig, door: NatsTurns, never_idle: None):
    once, again = await opened(door), await opened(door)
    assert await rig.waiting() == 1
    await say(rig, *outputs(3))
    assert read(await heard(once)) == read(await heard(again)) == outputs(3)


async def test_a_full_queue_is_told_at_once(rig: Rig, door: NatsTurns, client: Line):
    info = await rig.admin.stream_info("CF_WORK_ROUTER")
    info.config.max_msgs = 1
    await rig.admin.update_stream(info.config)
    first = await opened(door, "T1")
    with pytest.raises(QueueFull):
        await opened(door, "T2")
    assert await rig.waiting() == 1
    assert listening(client) == [LIVE]
    await first.aclose()


async def test_a_turn_larger_than_the_broker_takes_is_refused_and_harms_nobody(rig: Rig, door: NatsTurns, client: Line):
    with pytest.raises(TooLarge):
        await door.open(command(text="x" * client.max_payload), ANA, time.time() + 60)
    assert await rig.waiting() == 0
    assert client.is_connected
    assert client.stats["reconnects"] == 0
    assert not listening(client)


async def test_without_its_queue_no_turn_is_accepted(rig: Rig, door: NatsTurns, client: Line):
    await rig.admin.delete_stream("CF_WORK_ROUTER")
    with stamina.set_testing(True, attempts=2), pytest.raises(BrokerUnavailable):
        await opened(door)
    assert not listening(client)


async def test_a_turn_exists_once_anything_is_known_of_it(rig: Rig, door: NatsTurns):
    assert not await door.exists("T1")
    await say(rig, token("a"))
    assert await door.exists("T1")
    assert not await door.exists("T2")


async def test_a_cancellation_is_stored_for_whoever_comes_later(rig: Rig, door: NatsTurns):
    await door.cancel("T1", "first")
    await door.cancel("T1", "changed my mind")
    message = await rig.admin.get_last_msg("CF_CTL", "cf.ctl.T1.cancel")
    assert CancelTurn.read(message.data or b"") == CancelTurn(turn="T1", reason="changed my mind")
    assert await rig.waiting("CF_CTL") == 1


async def test_a_cancellation_that_cannot_be_stored_is_told(rig: Rig, door: NatsTurns):
    await rig.admin.delete_stream("CF_CTL")
    with pytest.raises(BrokerUnavailable):
        await door.cancel("T1", "asked")


# --- tidying up ------------------------------------------------------------------------------------------------


async def test_a_reading_that_ended_leaves_nothing_behind(rig: Rig, door: NatsTurns, client: Line):
    batches = await opened(door)
    await say(rig, *outputs(3))
    await heard(batches)
    await heard(await door.follow("T1"))
    assert not client._ears
    assert not listening(client)
    assert door.facts() == {"turns_opened": 1, "streams_open": 0, "connected": True}


@pytest.mark.parametrize("opens", [True, False])
async def test_a_reading_that_is_closed_early_leaves_nothing_behind(rig: Rig, door: NatsTurns, client: Line, opens: bool):
    await rig.ask("T1")
    async with aclosing(await opened(door) if opens else await door.follow("T1")) as batches:
        await say(rig, token("a"), token("b"))
        await anext(aiter(batches))
        assert client._ears
        assert listening(client) == [LIVE]
        assert door.facts()["streams_open"] == 1
    assert not client._ears
    assert not listening(client)
    assert door.facts()["streams_open"] == 0


@pytest.mark.parametrize("opens", [True, False])
async def test_a_reading_that_is_cancelled_leaves_nothing_behind(rig: Rig, door: NatsTurns, client: Line, opens: bool):
    await rig.ask("T1")
    batches = await opened(door) if opens else await door.follow("T1")
    begun = asyncio.Event()

    async def read_on() -> None:
        async for _ in batches:
            begun.set()

    reading = asyncio.create_task(read_on())
    await say(rig, token("a"))
    await begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: not client._ears)
    assert not listening(client)


async def test_a_reading_that_never_began_leaves_nothing_behind(door: NatsTurns, client: Line):
    batches = await opened(door)
    assert listening(client) == [LIVE]
    await batches.aclose()
    assert not client._ears
    assert not listening(client)
    await (await door.follow("T1")).aclose()
    assert not client._ears


async def test_a_reading_that_everybody_forgot_leaves_nothing_behind(door: NatsTurns, client: Line):
    batches = await opened(door)
    assert client._ears
    del batches
    gc.collect()
    await until(lambda: not client._ears)
    assert not listening(client)


async def test_a_reading_that_is_closed_while_the_broker_is_away_is_not_taken_up_again(rig: Rig, door: NatsTurns, client: Line):
    batches = await opened(door)
    await asyncio.to_thread(rig.broker.kill)
    await until(lambda: not client.is_connected)
    await batches.aclose()
    await asyncio.to_thread(rig.broker.restart)
    await until(lambda: client.is_connected)
    assert not client._ears
    assert not listening(client)


# --- readiness -------------------------------------------------------------------------------------------------


async def test_ready_tells_what_is_missing_and_what_nobody_serves(rig: Rig, client: Line):
    missing = caller_consumer("nobody")
    door = NatsTurns(client, (router_consumer(), missing))
    nobody = {missing.durable: "has not been provisioned"}
    assert await door.ready() == {"router": "no worker is taking work", **nobody}

    async def handle(command: RouteTurn) -> None:
        pass

    async def served() -> bool:
        return await door.ready() == nobody

    async with rig.routing(lambda stage: handle):
        await until(served)
        assert await NatsTurns(client, (router_consumer(),)).ready() == {}


async def test_ready_tells_that_the_broker_is_away(rig: Rig, door: NatsTurns, client: Line):
    assert set(await door.ready()) == {"router", EXPERT.durable}
    await asyncio.to_thread(rig.broker.kill)
    await until(lambda: not client.is_connected)
    assert await door.ready() == {"broker": "not connected"}


# --- what is stored --------------------------------------------------------------------------------------------


async def test_stored_gives_what_follows_at_most_a_batch_of_it(rig: Rig, client: Line):
    assert await stored(client, DATA, 0) == []
    await say(rig, *outputs(300))
    first = await stored(client, DATA, 0)
    rest = await stored(client, DATA, first[-1].sequence)
    assert (len(first), len(rest)) == (256, 44)
    assert [parse(each.data) for each in first + rest] == outputs(300)
    assert [each.sequence for each in first + rest] == sorted({each.sequence for each in first + rest})
    assert await stored(client, DATA, rest[-1].sequence) == []
    assert await stored(client, "cf.out.T2.data.main", 0) == []
    assert not client._ears


async def test_the_last_message_is_found(rig: Rig, client: Line):
    assert await last_message(client, DATA) is None
    await say(rig, *outputs(3))
    whole = await stored(client, DATA, 0)
    assert await last_message(client, DATA) == whole[-1]
    assert await last_message(client, "cf.out.T2.data.main") is None


async def test_an_empty_message_is_a_message(rig: Rig, client: Line):
    await (await rig.client("router")).jetstream().publish(DATA, b"")
    [found] = await stored(client, DATA, 0)
    assert found == await last_message(client, DATA) == Stored(found.sequence, b"")


async def test_a_stream_that_is_missing_is_told(rig: Rig):
    observer = await rig.client("observer")
    assert await last_message(observer, DATA, "CF_NONE") is None  # it has nothing, whatever it is
    with pytest.raises(BrokerUnavailable, match="CF_NONE"):
        await stored(observer, DATA, 0, "CF_NONE")
    assert not observer._ears


async def test_whoever_may_not_read_is_told_in_time(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(output, "_TIMEOUT", 0.2)
    caller = await rig.client("caller")
    with pytest.raises(BrokerUnavailable, match="CF_DEAD"):
        await last_message(caller, "cf.dead.T1.router", "CF_DEAD")
    with pytest.raises(BrokerUnavailable, match="CF_DEAD"):
        await stored(caller, "cf.dead.T1.router", 0, "CF_DEAD")
    assert not caller._ears


@given(st.integers(1024, 2**24), st.integers(-2, 2))
def test_what_fits_leaves_room_for_headers(most: int, difference: int):
    client = Client()
    client._max_payload = most
    assert fits(client, b"x" * max(0, most - 4096 + difference)) == (max(0, most - 4096 + difference) + 4096 <= most)
