"""What is still there of a turn, asked of a real broker; and turns that are to be there no more."""

import asyncio
import time

import pytest
from nats.aio.msg import Msg

from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import BrokerUnavailable, TurnGone, TurnUnknown
from capibara_flow.ports import Feed
from capibara_flow.runtime import turns
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import EXPERT, Line, Rig, line
from tests.waiting import until
from topics.chat import Erased, EraseTurn, RouteTurn
from topics.output import Done, Output, Routed, Token, parse
from topics.streams import router_consumer


def a_turn(age_seconds: float = 0) -> str:
    return turn_id(milliseconds=int((time.time() - age_seconds) * 1000), entropy=b"0123456789", tenant="acme")


#: How long turns are kept here, in seconds: longer than all tests together, which begin long after these turns were made.
KEPT = 20_000
NEW, OLD = a_turn(), a_turn(KEPT + 400)


def answer(turn: str) -> list[Output]:
    routed = Routed(turn=turn, model_id="phi", route_name="r", complexity="simple", confidence=1, reasoning="why")
    return [routed, *(Token(turn=turn, text=text) for text in "abc"), Done(turn=turn, finish_reason="stop", model_id="phi")]


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


@pytest.fixture
def door(client: Line) -> NatsTurns:
    return NatsTurns(client, (router_consumer(), EXPERT), turn_age=KEPT)


async def say(rig: Rig, turn: str, *said: Output) -> list[int]:
    """Store *said*; the sequences."""
    found = []
    jetstream = (await rig.client("router")).jetstream()
    for each in said:
        found.append((await jetstream.publish(f"cf.out.{turn}.data.main", each.line())).seq)
    return found


async def heard(feed: Feed) -> list[Output]:
    async with asyncio.timeout(40):
        return [parse(each) for group in [group async for group in feed] for batch in group for each in batch.lines]


async def forget(rig: Rig, sequences: list[int]) -> None:
    for each in sequences:
        await rig.admin.delete_msg("CF_OUT", each)


# --- going on ---------------------------------------------------------------------------------------------------


async def test_who_goes_on_behind_what_is_gone_is_told(rig: Rig, door: NatsTurns):
    said = await say(rig, NEW, *answer(NEW))
    await forget(rig, said[:3])
    for after in said[:2]:
        with pytest.raises(TurnGone):
            await door.follow(NEW, after)
    for after in said[2:4]:  # right behind the first of them nothing is missing
        assert await heard(await door.follow(NEW, after)) == answer(NEW)[said.index(after) + 1 :]
    assert await heard(await door.follow(NEW, said[3])) == answer(NEW)[4:]
    assert await heard(await door.follow(NEW, said[4])) == answer(NEW)[4:]


async def test_who_goes_on_behind_a_gap_in_which_another_turn_spoke_is_told(rig: Rig, door: NatsTurns):
    said = await say(rig, NEW, *answer(NEW)[:2])
    await say(rig, "T0", Token(turn="T0", text="of another turn"))
    await say(rig, NEW, *answer(NEW)[2:])
    await forget(rig, said)
    with pytest.raises(TurnGone):
        await door.follow(NEW, said[1])


async def test_who_goes_on_when_all_is_gone_is_told(rig: Rig, door: NatsTurns):
    said = await say(rig, NEW, *answer(NEW))
    await rig.admin.purge_stream("CF_OUT")
    [other] = await say(rig, "T0", Token(turn="T0", text="of another turn"))
    for after in (said[1], said[-1], other, other + 1):
        with pytest.raises(TurnUnknown):
            await door.follow(NEW, after)
    await rig.ask("T1")  # somebody may be at work for this turn
    for after in (said[1], said[-1] - 1, other + 1):
        with pytest.raises(TurnGone):
            await door.follow(NEW, after)


async def test_who_goes_on_behind_another_turn_s_event_waits_for_a_turn_that_waits(rig: Rig, door: NatsTurns):
    [other] = await say(rig, "T0", Token(turn="T0", text="of another turn"))
    await rig.ask(NEW)
    following = asyncio.create_task(heard(await door.follow(NEW, other)))
    await say(rig, NEW, *answer(NEW))
    assert await following == answer(NEW)


async def test_a_turn_is_known_while_it_is_kept_or_somebody_works(rig: Rig, door: NatsTurns):
    assert not await door.known(NEW)
    await rig.ask(NEW)
    assert await door.known(NEW)
    await rig.admin.purge_stream("CF_WORK_ROUTER")
    assert not await door.known(NEW)
    await say(rig, NEW, *answer(NEW))
    assert await door.known(NEW)


async def test_the_id_of_another_turn_s_event_is_a_place_like_any_other(rig: Rig, door: NatsTurns):
    [before] = await say(rig, "T0", Token(turn="T0", text="of another turn"))
    said = await say(rig, NEW, *answer(NEW))
    [between] = await say(rig, "T0", Token(turn="T0", text="of another turn"))
    assert await heard(await door.follow(NEW, before)) == answer(NEW)
    assert await heard(await door.follow(NEW, between)) == answer(NEW)[-1:]
    await rig.admin.delete_msg("CF_OUT", between)
    assert between > said[-1]
    assert await heard(await door.follow(NEW, between)) == answer(NEW)[-1:]


# --- from the beginning ---------------------------------------------------------------------------------------------


async def test_an_old_turn_is_read_as_long_as_its_beginning_is_kept(rig: Rig, door: NatsTurns):
    said = await say(rig, OLD, *answer(OLD))
    assert await heard(await door.follow(OLD)) == answer(OLD)
    await forget(rig, said[:1])
    with pytest.raises(TurnGone):
        await door.follow(OLD)
    assert await heard(await door.follow(OLD, said[1])) == answer(OLD)[2:]


async def test_an_old_turn_of_which_nothing_is_kept_is_gone(rig: Rig, door: NatsTurns):
    await rig.ask("T0")  # however busy routers are
    with pytest.raises(TurnGone):
        await door.follow(OLD)


async def test_what_is_old_is_a_matter_of_settings(rig: Rig, client: Line):
    for age, error in ((KEPT, TurnGone), (10 * KEPT, TurnUnknown)):
        with pytest.raises(error):
            await NatsTurns(client, (router_consumer(),), turn_age=age).follow(OLD)


async def test_a_turn_that_is_nowhere_is_not_waited_for(rig: Rig, door: NatsTurns, client: Line):
    with pytest.raises(TurnUnknown):
        await door.follow(NEW)
    assert not client._ears


async def test_a_turn_that_waits_is_waited_for(rig: Rig, door: NatsTurns):
    await rig.ask(NEW)
    following = asyncio.create_task(heard(await door.follow(NEW)))
    await say(rig, NEW, *answer(NEW))
    assert await following == answer(NEW)


async def test_a_turn_that_is_being_routed_is_waited_for(rig: Rig, door: NatsTurns):
    held, go = asyncio.Event(), asyncio.Event()

    async def handle(command: RouteTurn) -> None:
        held.set()
        await go.wait()

    async with rig.routing(lambda stage: handle):
        await rig.ask(NEW)
        await held.wait()
        await (await door.follow(NEW)).aclose()
        go.set()


async def test_a_turn_that_disappears_while_it_is_waited_for_is_told(
    rig: Rig, door: NatsTurns, client: Line, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turns, "_IDLE_FIRST", 0.05)
    await rig.ask(NEW)
    following = asyncio.create_task(heard(await door.follow(NEW)))
    await until(lambda: client._ears)
    await rig.admin.purge_stream("CF_WORK_ROUTER")
    with pytest.raises(TurnUnknown):
        await following
    assert not client._ears


async def test_who_cannot_know_who_works_waits(rig: Rig, client: Line):
    await (await NatsTurns(client, (), turn_age=KEPT).follow(NEW)).aclose()
    await rig.admin.delete_consumer("CF_WORK_ROUTER", "router")
    await (await NatsTurns(client, (router_consumer(),), turn_age=KEPT).follow(NEW)).aclose()


# --- erasing --------------------------------------------------------------------------------------------------------


async def test_a_turn_is_erased_by_whoever_can(rig: Rig, door: NatsTurns):
    undertaker = await rig.client("undertaker")
    asked: list[Msg] = []

    async def erase(message: Msg) -> None:
        asked.append(message)
        await message.respond(Erased(messages=7).model_dump_json().encode())

    await undertaker.subscribe("cf.ctl.*.erase", queue="undertaker", cb=erase)
    await flushed(undertaker)
    assert await door.erase(NEW) == 7
    [message] = asked
    assert (message.subject, EraseTurn.read(message.data)) == (f"cf.ctl.{NEW}.erase", EraseTurn(turn=NEW))
    assert (message.headers or {})["content-type"] == "application/json"
    assert await rig.waiting("CF_CTL") == 0


async def test_where_nobody_can_erase_that_is_told(rig: Rig, door: NatsTurns):
    with pytest.raises(BrokerUnavailable, match="start an undertaker"):
        await door.erase(NEW)


@pytest.mark.parametrize("reply", [None, b"", b"{}"])
async def test_an_eraser_that_fails_is_told(rig: Rig, door: NatsTurns, monkeypatch: pytest.MonkeyPatch, reply: bytes | None):
    monkeypatch.setattr(turns, "_ERASE_SECONDS", 0.2)
    undertaker = await rig.client("undertaker")

    async def erase(message: Msg) -> None:
        if reply is not None:
            await message.respond(reply)

    await undertaker.subscribe("cf.ctl.*.erase", cb=erase)
    await flushed(undertaker)
    with pytest.raises(BrokerUnavailable, match="ask again"):
        await door.erase(NEW)
