"""``python -m workers NAME...`` runs workers of these names in one process (``all``: every one there is), and the ``edge`` beside them."""

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from importlib import import_module

import uvloop
from prometheus_client import start_http_server

from capibara_flow import telemetry, wiring
from capibara_flow.errors import CapibaraError
from capibara_flow.runtime import brokers
from capibara_flow.settings import Settings, SettingsError, load
from capibara_flow.tasks import LONG, ended
from topics.flow import NAMES

#: No worker: the door, which takes turns and gives their answers.
EDGE = "edge"


async def run(names: tuple[str, ...], settings: Settings) -> None:
    """Run workers until SIGTERM or SIGINT, then let what is at work come to its end."""
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    async with AsyncExitStack() as stack:
        # A broker that is not there yet is waited for, but not longer than we are wanted.
        starting, unwanted = asyncio.create_task(_start(names, settings, stack)), asyncio.create_task(stop.wait())
        await asyncio.wait({starting, unwanted}, return_when=asyncio.FIRST_COMPLETED)
        await ended(unwanted)
        if not starting.done():
            await ended(starting, again=LONG)
            return
        await starting
        wiring.settle_in()
        telemetry.log.info("workers_ready", workers=names)
        await stop.wait()
        telemetry.log.info("workers_stopping", workers=names)


async def _start(names: tuple[str, ...], settings: Settings, stack: AsyncExitStack) -> None:
    for name in names:
        if name == EDGE:
            await stack.enter_async_context(wiring.edge_beside(settings))
            continue
        broker = brokers.broker(settings, wiring.kind(name))
        needs = await stack.enter_async_context(wiring.worker_needs(name, settings))
        await import_module(f"workers.{wiring.kind(name)}").build(broker, **needs).start()
        # Leaving in reverse order: first the hands come to rest, then what they need is closed.
        stack.push_async_callback(broker.stop)


def _meant(names: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    """The workers that *names* stand for, and the edge last: nobody comes in before there are hands, or after they have come to rest.

    ``all`` has an expert host only where the fleet has something to launch, those who know documents only where these have a place, and
    an accountant only where usage has one.
    """
    edge = (EDGE,) if EDGE in names else ()
    if "all" not in names:
        return (*(name for name in names if name != EDGE), *edge)
    missing = set() if any(wiring.is_hosted(expert) for expert in settings.experts.active) else {"host"}
    if not settings.knowledge.enabled:
        missing |= {"retriever", "ingester"}
    if why := wiring.uncounted(settings):
        missing |= {"accountant"}
        telemetry.log.info("usage_not_counted", reason=why)
    return (*(name for name in NAMES if name not in missing), *edge)


def main() -> int:
    """The command line; returns the exit code."""
    names = tuple(sys.argv[1:])
    if not names or not set(names) <= {*NAMES, "all", EDGE}:
        print(f"usage: python -m workers NAME...   one or more of: all, {', '.join(NAMES)}, {EDGE}", file=sys.stderr)
        return 2
    try:
        settings = load()
        telemetry.configure(level=settings.log.level, style=settings.log.format)
        if settings.worker.metrics_port is not None:
            start_http_server(settings.worker.metrics_port, addr="127.0.0.1")
        uvloop.run(run(_meant(names, settings), settings))
    except (SettingsError, CapibaraError) as error:
        print(f"capibara: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
