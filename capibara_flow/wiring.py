"""Settings become engines, connections, workers' needs and the door: the only module that names concrete engines."""

import dataclasses
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from capibara_flow import telemetry
from capibara_flow.edge.app import Door, serve
from capibara_flow.engines.build import build_expert
from capibara_flow.runtime import connection, provision
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.turns import NatsTurns
from capibara_flow.settings import Settings
from topics.streams import Consumer, Layout, caller_consumer, router_consumer, subject_token


def layout(settings: Settings) -> Layout:
    """The streams as this installation wants them."""
    return Layout(
        turn_age=settings.log.turn_age_seconds,
        dead_age=settings.log.dead_age_seconds,
        log=settings.log.enabled,
        replicas=settings.nats.replicas,
    )


def consumers(settings: Settings) -> tuple[Consumer, ...]:
    """Every durable consumer: the router's, and one for each active expert."""
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
        return await provision.apply(jetstream, layout(settings), consumers(settings))


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
    client = await connection.connect(settings, name)  # beside FastStream's: tokens take the fast lane
    answers = FencedAnswers(client, f"{name}@{socket.gethostname()}:{os.getpid()}")
    await answers.start()
    engines = {subject_token(each.name): build_expert(each) for each in settings.experts.active} if name == "caller" else {}
    common = {"answers": answers, "layout": layout(settings), "retry_seconds": settings.worker.retry_seconds}
    try:
        if name == "router":
            consumer = _tuned(router_consumer(), settings)
            yield {"fleet": settings.experts, "consumer": consumer, "permits": settings.worker.router_permits, **common}
        else:
            yield {"engines": engines, "consumers": expert_consumers(settings), **common}
    finally:
        await answers.stop()
        await client.close()
        for engine in engines.values():
            await engine.aclose()


async def _edge(settings: Settings) -> None:
    async with connected(settings, "edge") as client:
        turns = NatsTurns(client, consumers(settings))
        settle_in()
        await serve(Door(turns, settings.experts, settings.edge, settings.auth))


def settle_in() -> None:
    """Call when a process has started: what is there now stays, so let the collector neither look at it nor look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


def run_edge(settings: Settings) -> None:
    """Serve the door until SIGTERM or SIGINT."""
    telemetry.configure(level=settings.log.level, style=settings.log.format)
    uvloop.run(_edge(settings))
