"""Settings become engines, connections, workers' needs and the door: the only module that names concrete engines."""

import dataclasses
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import uvloop

from capibara_flow import telemetry
from capibara_flow.edge.app import Door, serve
from capibara_flow.engines.build import build_expert
from capibara_flow.runtime import connection, provision
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.erasing import erase
from capibara_flow.runtime.readers import Absences
from capibara_flow.runtime.turns import NatsTurns
from capibara_flow.settings import Settings
from topics.streams import Consumer, Layout, absence_consumer, caller_consumer, router_consumer, subject_token, undertaker_consumer


def layout(settings: Settings) -> Layout:
    """The streams as this installation wants them."""
    return Layout(
        turn_age=settings.log.turn_age_seconds,
        dead_age=settings.log.dead_age_seconds,
        log=settings.log.enabled,
        replicas=settings.nats.replicas,
    )


def consumers(settings: Settings) -> tuple[Consumer, ...]:
    """Every durable consumer without which a turn cannot be served: the router's, and one for each active expert."""
    return (_tuned(router_consumer(), settings), *expert_consumers(settings))


def expert_consumers(settings: Settings) -> dict[Consumer, int]:
    """The callers' consumers, each with the number of calls that its expert takes at once."""
    return {_tuned(caller_consumer(expert.name), settings): expert.concurrency for expert in settings.experts.active}


def _tuned(consumer: Consumer, settings: Settings) -> Consumer:
    worker = settings.worker
    return dataclasses.replace(consumer, ack_wait=worker.ack_wait_seconds, max_deliver=worker.max_deliver)


async def apply_streams(settings: Settings) -> list[str]:
    """Make the broker agree with the map; a line for everything done."""
    async with connected(settings, "provisioner") as client:
        jetstream = client.jetstream(timeout=15)
        house = (_tuned(undertaker_consumer(), settings), absence_consumer())
        return await provision.apply(jetstream, layout(settings), (*consumers(settings), *house))


async def show_streams(settings: Settings) -> list[dict[str, Any]]:
    """What the broker's streams hold now; one row a stream, its consumers within."""
    async with connected(settings, "observer") as client:
        jetstream = client.jetstream()
        rows = []
        for info in await jetstream.streams_info():
            name = info.config.name or ""
            durables = [
                {"name": each.name, "pending": each.num_pending, "ack_pending": each.num_ack_pending, "waiting": each.num_waiting}
                for each in await jetstream.consumers_info(name)
            ]
            rows.append(
                {
                    "name": name,
                    "subjects": list(info.config.subjects or ()),
                    "messages": info.state.messages,
                    "bytes": info.state.bytes,
                    "age": info.config.max_age,
                    "consumers": durables,
                }
            )
        return rows


@asynccontextmanager
async def connected(settings: Settings, role: str) -> AsyncIterator[TokenClient]:
    """A raw connection of *role* for the length of a block."""
    client = await connection.connect(settings, role)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def worker_needs(name: str, settings: Settings) -> AsyncIterator[dict[str, Any]]:
    """What the worker *name* is built with; whatever it opens is closed at the end."""
    async with AsyncExitStack() as stack:
        # A connection beside FastStream's: tokens take the fast lane.
        client = await stack.enter_async_context(connected(settings, name))
        answers = FencedAnswers(client, f"{name}@{socket.gethostname()}:{os.getpid()}")
        await answers.start()
        stack.push_async_callback(answers.stop)
        worker = settings.worker
        common = {"retry_seconds": worker.retry_seconds, "patience_seconds": worker.patience_seconds}
        own = await _OWN_NEEDS[name](settings, client, stack)
        yield {"answers": answers, "layout": layout(settings), **common, **own}


async def _router_needs(settings: Settings, _: TokenClient, __: AsyncExitStack) -> dict[str, Any]:
    consumer = _tuned(router_consumer(), settings)
    return {"fleet": settings.experts, "consumer": consumer, "permits": settings.worker.router_permits}


async def _caller_needs(settings: Settings, _: TokenClient, stack: AsyncExitStack) -> dict[str, Any]:
    engines = {subject_token(each.name): build_expert(each) for each in settings.experts.active}
    for engine in engines.values():
        stack.push_async_callback(engine.aclose)
    return {"engines": engines, "consumers": expert_consumers(settings)}


async def _undertaker_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> dict[str, Any]:
    absences = Absences(client, layout(settings))
    await absences.start()
    stack.push_async_callback(absences.stop)
    # Every stream that there can be: a log may have been kept before it was switched off.
    erasing = partial(erase, client, streams=[stream.name for stream in Layout().streams], retry_seconds=settings.worker.retry_seconds)
    # A signal has no deadline of its own.
    return {"consumer": _tuned(undertaker_consumer(), settings), "erase": erasing, "patience_seconds": settings.log.turn_age_seconds}


_OWN_NEEDS = {"router": _router_needs, "caller": _caller_needs, "undertaker": _undertaker_needs}


async def _edge(settings: Settings) -> None:
    async with connected(settings, "edge") as client:
        settle_in()
        await serve(door(settings, client))


def door(settings: Settings, client: TokenClient) -> Door:
    """The door onto the broker of *client*."""
    edge, turn_age = settings.edge, settings.log.turn_age_seconds
    ages = {"abandon_seconds": edge.abandon_seconds, "turn_age": turn_age}
    return Door(NatsTurns(client, consumers(settings), **ages), settings.experts, edge, settings.auth, turn_age)


def settle_in() -> None:
    """Call when a process has started: what is there now stays, so let the collector neither look at it nor look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


def run_edge(settings: Settings) -> None:
    """Serve the door until SIGTERM or SIGINT."""
    telemetry.configure(level=settings.log.level, style=settings.log.format)
    uvloop.run(_edge(settings))
