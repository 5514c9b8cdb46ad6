"""How turns end at the door: each is counted once, where it was opened."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import ClientPayloadError
from prometheus_client import REGISTRY

from capibara_flow.edge import door
from capibara_flow.errors import BrokerUnavailable, QueueFull
from capibara_flow.settings import EdgeSettings
from capibara_flow.telemetry import OUTCOMES
from tests.edge.client import events
from tests.edge.serving import ANSWER, DONE, ROUTED, T, client
from tests.fakes import FakeTurns
from tests.waiting import until
from topics.output import Done, Failed, Reset, Token

MESSAGES = [{"role": "user", "content": "hello"}]
ASKS = [
    pytest.param(path, {"messages": MESSAGES, "stream": stream}, id=f"{path} {stream}")
    for path in ("/api/chat", "/v1/chat/completions")
    for stream in (True, False)
]
HALF = ANSWER[:2]


def counts() -> dict[str, float]:
    """The turns counted so far, by outcome."""
    return {each: REGISTRY.get_sample_value("capibara_turns_total", {"outcome": each}) or 0.0 for each in OUTCOMES}


def figure(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


@contextmanager
def counting(**expected: int) -> Iterator[None]:
    """Exactly *expected* is counted meanwhile, each with its duration."""
    before, timed = counts(), figure("capibara_turn_duration_seconds_count")
    yield
    assert {each: after - before[each] for each, after in counts().items() if after != before[each]} == expected
    assert figure("capibara_turn_duration_seconds_count") - timed == sum(expected.values())


def turns_that(outcome: str) -> FakeTurns:
    match outcome:
        case "done":
            return FakeTurns(*ANSWER)
        case "failed":
            return FakeTurns((ROUTED,), (Failed(turn=T, title="engine busy", status=503, detail="too many"),))
        case "cancelled":
            return FakeTurns(*HALF, (Done(turn=T, finish_reason="cancelled", model_id="plain"),))
        case "broken":
            return FakeTurns(*HALF, breaks=BrokerUnavailable("the broker left"))
        case _:
            return FakeTurns(*HALF)


@pytest.mark.parametrize(("path", "body"), ASKS)
@pytest.mark.parametrize("outcome", ["done", "failed", "cancelled", "broken", "expired"])
async def test_a_turn_is_counted_once_by_how_it_ended(
    path: str, body: dict[str, Any], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "GRACE_SECONDS", 0.05)
    edge = EdgeSettings(turn_seconds=0.05 if outcome == "expired" else 60)
    with counting(**{outcome: 1}):
        async with client(turns_that(outcome), edge) as session, session.post(path, json=body) as response:
            await response.read()


@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_a_fault_that_nobody_foresaw_is_a_broken_turn(path: str, body: dict[str, Any]) -> None:
    with counting(broken=1):
        async with client(FakeTurns(*HALF, breaks=ZeroDivisionError("our insides"))) as session:
            try:
                async with session.post(path, json=body) as response:
                    await response.read()
            except (ClientPayloadError, ConnectionResetError):
                assert body["stream"]


@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_whoever_leaves_has_left(path: str, body: dict[str, Any]) -> None:
    turns = FakeTurns(*HALF)
    with counting(left=1):
        async with client(turns) as session:
            asking = asyncio.create_task(session.post(path, json=body))
            await until(lambda: turns.opened)
            if body["stream"]:
                response = await asking
                await response.content.readuntil(b"there")
                response.close()
            else:
                asking.cancel()
            await until(lambda: turns.closed == 1)


@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_what_was_not_opened_is_not_counted(path: str, body: dict[str, Any]) -> None:
    with counting():
        async with client(FakeTurns(refusal=QueueFull("too many turns"))) as session:
            for each in (body, {}):
                async with session.post(path, json=each) as response:
                    assert response.status in {400, 503}


async def test_coming_back_to_a_turn_is_no_other_turn() -> None:
    before = figure("capibara_resumes_total")
    async with client(FakeTurns(*ANSWER)) as session:
        with counting(done=1):
            async with session.post("/api/chat", json={"message": "hello"}) as response:
                turn = response.headers["X-Capibara-Turn"]
                await response.read()
            for _ in range(3):
                async with session.get(f"/api/chat/{turn}/events") as response:
                    assert events(await response.text())[-1].name == "done"
    assert figure("capibara_resumes_total") == before + 3


@pytest.mark.parametrize("rest", [(), ((Token(turn=T, text="right"),), (DONE,))], ids=["goes on", "ended"])
async def test_words_taken_back_end_a_stream_of_openai_s_but_not_its_turn(rest: tuple[tuple[Any, ...], ...]) -> None:
    turns = FakeTurns((Token(turn=T, text="wrong"),), (Reset(turn=T, reason="again"),), *rest)
    with counting(broken=1):
        async with client(turns) as session, asyncio.timeout(20):
            async with session.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True}) as response:
                text = await response.text()
            await until(lambda: turns.closed)
    *_, last = text.strip().splitlines()
    assert '"code":"answer_reset"' in last
    assert turns.closed == 1
    assert turns.cancelled == []
