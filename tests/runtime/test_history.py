"""What is kept of a turn, read back from a real broker."""

import time

import pytest
from aiohttp import ClientSession

from capibara_flow import wiring
from capibara_flow.errors import TurnUnknown
from capibara_flow.runtime.history import History
from tests.conftest import Installation


async def asked(door: str, words: str) -> str:
    """The id of a turn that was answered to its end."""
    async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": words}) as response:
        assert "event: done" in await response.text()
        return response.headers["X-Capibara-Turn"]


async def test_a_turn_is_read_back_with_all_that_was_said_and_decided(installation: Installation, door: str) -> None:
    began = time.time()
    turn = await asked(door, "hola")
    async with wiring.connected(installation.settings, "observer") as client:
        record = await History(client).of(turn)
    assert record.asked is not None
    assert record.asked.request.question == "hola"
    assert record.routed is not None
    assert [told.message.expert for told in record.calls] == ["scripted"]
    assert [told.message.outcome for told in record.attempts] == ["stop"]
    assert (record.outcome, record.expert, record.tenant) == ("stop", "scripted", "anonymous")
    assert began - 1 <= record.began <= record.began + record.lasted <= time.time() + 1
    assert [entry.when for entry in record.entries] == sorted(entry.when for entry in record.entries)
    assert not any(name.startswith("Nats-S") for entry in record.entries for name in entry.headers)
    assert {entry.turn for entry in record.entries} == {turn}


async def test_the_newest_turns_come_first_and_no_more_than_are_wanted(installation: Installation, door: str) -> None:
    turns = [await asked(door, f"hola {number}") for number in range(3)]
    async with wiring.connected(installation.settings, "observer") as client:
        found = [entry async for entry in History(client).newest()]
        later = [entry async for entry in History(client).newest(since=found[1].when)]
    assert [entry.turn for entry in found] == turns[::-1]
    assert [entry.turn for entry in later] == turns[:0:-1]


async def test_what_is_not_kept_is_said_to_be_unknown(installation: Installation) -> None:
    async with wiring.connected(installation.settings, "observer") as client:
        for wrong in ("01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F", "*", ">", ""):
            with pytest.raises(TurnUnknown):
                await History(client).of(wrong)
        assert [entry async for entry in History(client).newest()] == []
