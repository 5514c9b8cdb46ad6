"""Settings become engines, connections, workers' needs and the door: the only place that names concrete engines."""

import gc
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import uvloop

from capibara_flow import telemetry
from capibara_flow.domain.fleet import Fleet
from capibara_flow.edge.app import Door, serve, served
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.turns import NatsTurns
from capibara_flow.settings import Settings
from capibara_flow.wiring.fleets import is_hosted, watched_fleet
from capibara_flow.wiring.streams import apply_streams, connected, consumers, expert_consumers, layout, show_streams
from topics.flow import kind

__all__ = [
    "apply_streams",
    "connected",
    "consumers",
    "door",
    "edge_beside",
    "expert_consumers",
    "is_hosted",
    "kind",
    "layout",
    "run_edge",
    "settle_in",
    "show_streams",
    "uncounted",
    "worker_needs",
]


def worker_needs(name: str, settings: Settings) -> AbstractAsyncContextManager[dict[str, Any]]:
    """What the worker *name* is built with; whatever it opens is closed at the end."""
    from capibara_flow.wiring.workers import worker_needs as needs  # noqa: PLC0415  loads every engine, and the door needs none

    return needs(name, settings)


def uncounted(settings: Settings) -> str:
    """Why no usage can be counted with *settings*, and what to do about it; empty when it can."""
    from capibara_flow.wiring.usage import uncounted as why  # noqa: PLC0415  the door counts none

    return why(settings)


async def _edge(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(settings, "edge"))
        entrance = await door(settings, client, stack)
        settle_in()
        await serve(entrance)


@asynccontextmanager
async def edge_beside(settings: Settings) -> AsyncIterator[None]:
    """The door, served for the length of a block on a loop that is somebody else's: signals and the collector are his."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(settings, "edge"))
        await stack.enter_async_context(served(await door(settings, client, stack)))
        yield


async def door(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Door:
    """The door onto the broker of *client*; it follows the fleet as that changes, until *stack* is closed."""
    edge, turn_age = settings.edge, settings.log.turn_age_seconds
    turns = NatsTurns(client, (), abandon_seconds=edge.abandon_seconds, turn_age=turn_age)

    def follow(fleet: Fleet) -> None:
        entrance.fleet = fleet
        turns.rely_on(consumers(settings, fleet))

    fleet = await watched_fleet(settings, stack, follow)
    entrance = Door(turns, fleet.value, edge, settings.auth, turn_age)
    follow(fleet.value)
    return entrance


def settle_in() -> None:
    """Call when a process has started: what is there now stays, so let the collector neither look at it nor look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


def run_edge(settings: Settings) -> None:
    """Serve the door until SIGTERM or SIGINT."""
    telemetry.configure(level=settings.log.level, style=settings.log.format)
    uvloop.run(_edge(settings))
