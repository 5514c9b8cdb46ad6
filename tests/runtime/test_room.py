"""A queue that is full further down: the door refuses before it opens a turn, and opens again once there is room."""

import asyncio
import time

import pytest

from capibara_flow.errors import QueueFull
from capibara_flow.ports import Identity
from capibara_flow.runtime import room
from capibara_flow.runtime.room import Room
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import EXPERT, QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import RouteTurn
from topics.streams import router_consumer

ANA = Identity(principal="ana", tenant="acme")
CALLS = EXPERT.stream


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


async def limit(rig: Rig, *, messages: int = -1, size: int = -1) -> None:
    info = await rig.admin.stream_info(CALLS)
    info.config.max_msgs, info.config.max_bytes = messages, size
    await rig.admin.update_stream(info.config)


async def test_a_turn_whose_call_would_find_no_room_is_refused_before_any_work(rig: Rig, client: Line):
    door = NatsTurns(client, (router_consumer(), EXPERT))
    await limit(rig, messages=2)
    await rig.call("T1")
    feed = await door.open(RouteTurn(turn="T3", request=QUESTION), ANA, time.time() + 60, attended=True)
    await feed.aclose()
    await rig.call("T2")
    with pytest.raises(QueueFull):
        await door.open(RouteTurn(turn="T4", request=QUESTION), ANA, time.time() + 60, attended=True)
    assert await rig.waiting() == 1  # T3
    assert not door._attendance._readers


async def test_there_is_room_again_as_soon_as_a_call_is_taken(rig: Rig, client: Line):
    await limit(rig, messages=1)
    await rig.call("T1")
    found = Room(client, (EXPERT,))
    with pytest.raises(QueueFull):
        await found.check()
    await rig.admin.purge_stream(CALLS)
    await found.check()


async def test_bytes_count_as_well(rig: Rig, client: Line):
    await rig.call("T1")
    await limit(rig, size=(await rig.admin.stream_info(CALLS)).state.bytes + 1)
    with pytest.raises(QueueFull):
        await Room(client, (EXPERT,)).check()


async def test_with_plenty_of_room_looks_are_few_and_not_waited_for(rig: Rig, client: Line, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    async def answered(subject: str) -> None:
        if "STREAM.INFO" in subject:
            asked.append(subject)

    client.answered = answered
    found = Room(client, (EXPERT, router_consumer()))
    await asyncio.gather(*(found.check() for _ in range(100)))
    assert asked == [f"$JS.API.STREAM.INFO.{CALLS}"]
    monkeypatch.setattr(room, "_FRESH", -1.0)
    await found.check()
    assert len(asked) == 1  # it is on its way
    await until(lambda: len(asked) == 2)


async def test_a_broker_that_cannot_be_asked_refuses_nothing_here(rig: Rig, client: Line):
    await rig.admin.delete_stream(CALLS)
    await Room(client, (EXPERT,)).check()


async def test_a_door_without_callers_looks_at_nothing(rig: Rig, client: Line):
    found = Room(client, (router_consumer(),))
    await found.check()
    assert found._looking is None
