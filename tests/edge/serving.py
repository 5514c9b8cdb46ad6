"""A door in front of fake turns: no broker, no workers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientSession, web

from capibara_flow.domain.fleet import Fleet
from capibara_flow.edge.app import runner_of
from capibara_flow.edge.door import Door
from capibara_flow.ports import Turns
from capibara_flow.settings import AuthSettings, EdgeSettings
from topics.output import Done, Output, Routed, Token, Usage

T = "T"
FLEET = Fleet.model_validate(
    {
        "experts": [
            {"name": "plain", "urls": ["http://h:1"], "scripted": True, "tools": True},
            {"name": "painter", "urls": ["http://h:2"], "modalities": ["text", "image"]},
            {"name": "retired", "urls": ["http://h:3"], "active": False},
        ]
    }
)
ROUTED = Routed(turn=T, model_id="plain", route_name="default", complexity="simple", confidence=0.5, reasoning="why", plan=("caller",))
USAGE = Usage(turn=T, prompt_tokens=3, completion_tokens=2)
DONE = Done(turn=T, finish_reason="stop", model_id="plain")
ANSWER: tuple[tuple[Output, ...], ...] = ((ROUTED,), (Token(turn=T, text="Hello"), Token(turn=T, text=" there")), (USAGE, DONE))


def doorway(turns: Turns, edge: EdgeSettings | None = None, auth: AuthSettings | None = None) -> Door:
    """A door onto *turns*."""
    return Door(turns, FLEET, edge or EdgeSettings(), auth or AuthSettings())


@asynccontextmanager
async def served(
    turns: Turns, edge: EdgeSettings | None = None, auth: AuthSettings | None = None, *, cancels: bool = True
) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a door onto *turns*; unless it *cancels*, handlers do not hear that a client left."""
    # As ``app.serve`` does it, but on a free port.
    runner = runner_of(doorway(turns, edge, auth), handler_cancellation=cancels, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client(
    turns: Turns, edge: EdgeSettings | None = None, auth: AuthSettings | None = None, *, cancels: bool = True
) -> AsyncIterator[ClientSession]:
    """A session whose addresses are relative to a door onto *turns*; see ``served``."""
    async with served(turns, edge, auth, cancels=cancels) as (host, port), ClientSession(f"http://{host}:{port}") as session:
        yield session
