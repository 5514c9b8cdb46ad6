"""Who reads a turn attends it: its key lives as long as somebody reads, and a little longer; nothing is waited for."""

import asyncio
import time

import pytest
import stamina

from capibara_flow.errors import BrokerUnavailable, QueueFull
from capibara_flow.ports import Batch, Feed, Identity
from capibara_flow.runtime import attending, output
from capibara_flow.runtime.bucket import removed
from capibara_flow.runtime.client import flushed, header
from capibara_flow.runtime.output import Stored, last_message
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import EXPIRED, CancelTurn, RouteTurn
from topics.output import Done, Token
from topics.streams import READERS, due_key, reader_key

ANA = Identity(principal="ana", tenant="acme")
DONE = Done(turn="T1", finish_reason="stop", model_id="phi")
KEY = reader_key("T1")


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


@pytest.fixture
def door(client: Line) -> NatsTurns:
    """Renews its keys every 0.2 s."""
    return NatsTurns(client, (), abandon_seconds=1)


@pytest.fixture
def patient(client: Line) -> NatsTurns:
    """Renews no key while a test lasts."""
    return NatsTurns(client, (), abandon_seconds=1000)


@pytest.fixture
def put(client: Line) -> list[str]:
    """The subjects of all that was sent without waiting."""
    found: list[str] = []

    def watch(subject: str, body: bytes) -> bool:
        if subject.startswith("$KV."):
            found.append(subject)
        return False

    client.swallow = watch
    return found


async def opened(door: NatsTurns, *, attended: bool = True) -> Feed:
    return await door.open(RouteTurn(turn="T1", request=QUESTION), ANA, time.time() + 60, attended=attended)


async def key(rig: Rig) -> Stored | None:
    edge = next(each for each in rig.clients if each.options["name"] == "capibara-edge")
    await flushed(edge)
    return await last_message(edge, KEY, READERS)


def lives(found: Stored | None) -> str:
    """How long the key *found* lives, as the broker was told."""
    assert found is not None
    return header(found.headers, b"Nats-TTL").decode()


def is_marker(found: Stored | None) -> bool:
    return found is not None and header(found.headers, b"Nats-Marker-Reason") == b"MaxAge"


async def renewed(rig: Rig, times: int = 3) -> None:
    """Return when the key has been written that many times more."""
    first = await key(rig)
    assert first is not None

    async def later() -> bool:
        found = await key(rig)
        return found is not None and not is_marker(found) and found.sequence >= first.sequence + times

    await until(later)


async def say(rig: Rig, *texts: str, end: bool = True) -> None:
    async with (await rig.answers()).open("T1", "main") as answer:
        for text in texts:
            await answer.finish(Token(turn="T1", text=text))
        if end:
            await answer.finish(DONE)


async def read(feed: Feed) -> None:
    async with asyncio.timeout(40):
        async for _ in feed:
            pass


async def test_an_attended_turn_has_a_key_that_is_renewed_while_it_is_read(rig: Rig, door: NatsTurns):
    feed = await opened(door)
    assert lives(await key(rig)) == "2s"  # 1 and an interval
    await renewed(rig, 12)  # longer than one key lives
    await feed.aclose()


async def test_the_key_is_there_before_the_turn(rig: Rig, client: Line, patient: NatsTurns):
    order: list[str] = []

    def watch(subject: str, body: bytes) -> bool:
        order.append(subject)
        return False

    client.swallow = watch
    feed = await opened(patient)
    assert [each for each in order if "T1" in each] == [KEY, "cf.work.T1.router"]
    await feed.aclose()


async def test_a_turn_costs_one_message_at_its_beginning_and_one_at_its_end(rig: Rig, patient: NatsTurns, put: list[str]):
    feed = await opened(patient)
    reading = asyncio.create_task(read(feed))
    await say(rig, *map(str, range(100)))
    await reading
    assert put == [KEY, KEY]


async def due_now(rig: Rig) -> Stored | None:
    edge = next(each for each in rig.clients if each.options["name"] == "capibara-edge")
    await flushed(edge)
    return await last_message(edge, due_key("T1"), READERS)


async def test_a_turn_that_may_be_recalled_has_a_key_until_it_is_due(rig: Rig, patient: NatsTurns):
    command = RouteTurn(turn="T1", request=QUESTION)
    feed = await patient.open(command, ANA, time.time() + 59.4, recalled=True)
    assert lives(await due_now(rig)) == "60s"
    await feed.aclose()  # who asked has gone; the turn goes on
    assert lives(await due_now(rig)) == "60s"
    assert await key(rig) is None
    again = await patient.open(command, ANA, time.time() + 59.4, recalled=True)
    await say(rig, "a")
    await read(again)
    found = await due_now(rig)
    assert found is None or removed(found)


async def test_whoever_reads_an_attended_turn_knows_when_it_is_due(rig: Rig, patient: NatsTurns):
    due = time.time() + 1
    await (await patient.open(RouteTurn(turn="T1", request=QUESTION), ANA, due, attended=True)).aclose()
    other = NatsTurns(await rig.client("edge"), (), abandon_seconds=1000)
    following = await other.follow("T1")  # the door that opened it reads no more
    undertaker = await rig.client("undertaker")

    async def overdue() -> bool:
        found = await last_message(undertaker, "cf.ctl.T1.cancel", "CF_CTL")
        return found is not None and CancelTurn.read(found.data).reason == EXPIRED

    await until(overdue)
    assert time.time() > due
    await following.aclose()


async def test_an_unattended_turn_has_no_key(rig: Rig, patient: NatsTurns, put: list[str]):
    feed = await opened(patient, attended=False)
    await say(rig, "a")
    await read(feed)
    assert put == []
    assert await key(rig) is None


async def test_whoever_leaves_may_come_back_for_a_while(rig: Rig, door: NatsTurns):
    feed = await opened(door)
    await say(rig, "a", end=False)
    await anext(aiter(feed))
    await feed.aclose()
    left = await key(rig)
    assert lives(left) == "1s"

    async def abandoned() -> bool:
        return is_marker(await key(rig))

    await until(abandoned)
    marker = await key(rig)
    assert left is not None
    assert marker is not None
    assert marker.sequence == left.sequence + 1  # nobody renewed it


async def test_nothing_is_left_of_a_key_whose_turn_has_ended(rig: Rig, door: NatsTurns):
    feed = await opened(door)
    reading = asyncio.create_task(read(feed))
    await renewed(rig)
    await say(rig, "a")
    await reading

    async def forgotten() -> bool:
        return await key(rig) is None

    await until(forgotten)
    assert await rig.waiting(READERS) == 0


async def test_an_end_that_the_tap_took_is_an_end_to_a_reader_who_leaves_at_once(rig: Rig, patient: NatsTurns, put: list[str]):
    feed = await opened(patient)
    reading = asyncio.create_task(read(feed))

    def take(batch: Batch) -> bool:
        if batch.final:
            reading.cancel()
        return True

    feed.tap(take)
    await asyncio.sleep(0)
    await say(rig, "a")
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: len(put) == 2)
    assert (found := await key(rig)) is None or header(found.headers, b"KV-Operation") == b"PURGE"


async def test_a_key_is_renewed_while_one_of_several_readers_is_left(rig: Rig, door: NatsTurns):
    first = await opened(door)
    second = await door.follow("T1", 0)
    await renewed(rig)  # the second has found it too, or will
    await until(lambda: door._attendance._readers == {"T1": 2})
    await first.aclose()
    await renewed(rig)
    await second.aclose()
    assert lives(await key(rig)) == "1s"


async def test_who_leaves_while_he_finds_the_turn_attended_does_not_attend_it(patient: NatsTurns, monkeypatch: pytest.MonkeyPatch):
    attendance = patient._attendance
    searched = asyncio.Event()

    async def due(_: str) -> float:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            searched.set()
        return time.time() + 60  # found, and the cancellation was missed

    monkeypatch.setattr(attendance, "due", due)
    seat = attending.Seat(attendance, "T1", lambda _: None)
    seat.look()
    await asyncio.sleep(0)
    seat.leave(ended=False)
    await searched.wait()
    await asyncio.sleep(0)
    assert not attendance._readers


async def test_a_follower_attends_an_attended_turn_from_any_door(rig: Rig, patient: NatsTurns):
    feed = await opened(patient)
    await feed.aclose()
    assert lives(await key(rig)) == "1000s"
    other = NatsTurns(await rig.client("edge"), (), abandon_seconds=1)
    following = await other.follow("T1")
    await renewed(rig)
    assert lives(await key(rig)) == "2s"
    await following.aclose()


async def test_a_follower_who_comes_after_the_key_ran_out_attends_anew(rig: Rig, door: NatsTurns):
    await (await opened(door)).aclose()

    async def abandoned() -> bool:
        return is_marker(await key(rig))

    await until(abandoned)
    following = await door.follow("T1")

    async def attended() -> bool:
        found = await key(rig)
        return not is_marker(found) and lives(found) == "2s"

    await until(attended)
    await following.aclose()


@pytest.mark.parametrize("ended", [True, False])
async def test_a_follower_does_not_attend_what_nobody_has_to(rig: Rig, client: Line, door: NatsTurns, put: list[str], ended: bool):
    if ended:
        purge = {"KV-Operation": "PURGE", "Nats-TTL": "60s"}
        await client.publish(KEY, b"", headers=purge)
    else:
        await (await opened(door, attended=False)).aclose()
    put.clear()
    asked: list[str] = []

    async def answered(subject: str) -> None:
        asked.append(subject)

    client.answered = answered
    following = await door.follow("T1")
    await until(lambda: f"$JS.API.STREAM.MSG.GET.{READERS}" in asked)
    await asyncio.sleep(0.05)
    await following.aclose()
    assert put == []


async def test_a_bucket_that_does_not_answer_is_asked_again(rig: Rig, client: Line, door: NatsTurns, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(output, "_TIMEOUT", 0.1)
    monkeypatch.setattr(attending, "_AGAIN", 0.01)
    await (await opened(NatsTurns(client, (), abandon_seconds=1000))).aclose()
    asked = 0

    def lose(subject: str, body: bytes) -> bool:
        nonlocal asked
        asked += subject == f"$JS.API.STREAM.MSG.GET.{READERS}"
        return subject == f"$JS.API.STREAM.MSG.GET.{READERS}" and asked < 3

    client.swallow = lose
    following = await door.follow("T1")
    await until(lambda: door._attendance._readers == {"T1": 1})
    assert asked == 3
    await following.aclose()
    assert not door._attendance._readers


async def test_a_turn_that_was_refused_leaves_no_key(rig: Rig, door: NatsTurns):
    info = await rig.admin.stream_info("CF_WORK_ROUTER")
    info.config.max_msgs = 1
    await rig.admin.update_stream(info.config)
    await rig.ask("T0")
    with pytest.raises(QueueFull):
        await opened(door)
    assert not door._attendance._readers

    async def forgotten() -> bool:
        return await key(rig) is None

    await until(forgotten)


async def test_a_turn_that_may_have_been_accepted_is_one_that_nobody_reads(rig: Rig, patient: NatsTurns):
    await rig.admin.delete_stream("CF_WORK_ROUTER")
    with stamina.set_testing(True, attempts=1), pytest.raises(BrokerUnavailable):
        await opened(patient)
    assert not patient._attendance._readers
    assert lives(await key(rig)) == "1000s"


async def test_a_broker_that_comes_back_hears_at_once_who_reads(
    rig: Rig, client: Line, patient: NatsTurns, monkeypatch: pytest.MonkeyPatch
):
    feed = await opened(patient)
    first = await key(rig)
    assert first is not None
    await asyncio.to_thread(rig.broker.kill)
    await until(lambda: not client.is_connected)
    patient._attendance._renew()  # it is time
    await asyncio.to_thread(rig.broker.restart)
    await until(lambda: client.is_connected)

    async def again() -> bool:
        found = await key(rig)
        return found is not None and found.sequence > first.sequence

    await until(again)
    await feed.aclose()


async def test_a_connection_that_is_closed_harms_no_reader_that_leaves(rig: Rig, client: Line, door: NatsTurns):
    feed = await opened(door)
    await client.close()
    door._attendance._renew()
    assert door._attendance._timer is None
    await feed.aclose()
