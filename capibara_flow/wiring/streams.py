"""The broker as this installation wants it: its streams, its consumers, and a connection to it."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.runtime import connection, provision
from capibara_flow.runtime.client import TokenClient
from capibara_flow.settings import Settings
from topics.streams import (
    Consumer,
    Layout,
    absence_consumer,
    accountant_consumer,
    caller_consumer,
    ingester_consumer,
    retriever_consumer,
    router_consumer,
    undertaker_consumer,
)


def layout(settings: Settings) -> Layout:
    """The streams as this installation wants them."""
    return Layout(
        turn_age=settings.log.turn_age_seconds,
        dead_age=settings.log.dead_age_seconds,
        log=settings.log.enabled,
        answer_age=settings.answers.age_seconds,
        replicas=settings.nats.replicas,
    )


def consumers(settings: Settings, fleet: Fleet | None = None) -> tuple[Consumer, ...]:
    """Every durable consumer without which a turn cannot be served: the router's, and one for each active expert."""
    return (tuned(router_consumer(), settings), *expert_consumers(settings, (fleet or settings.experts).active))


def expert_consumers(settings: Settings, experts: tuple[Expert, ...] | None = None) -> dict[Consumer, int]:
    """The callers' consumers, each with the number of calls that its expert takes at once; for all active *experts*, if none are named."""
    wanted = settings.experts.active if experts is None else experts
    return {tuned(caller_consumer(expert.name), settings): expert.concurrency for expert in wanted}


def tuned(consumer: Consumer, settings: Settings) -> Consumer:
    """*consumer* as patient as this installation wants it."""
    worker = settings.worker
    return dataclasses.replace(consumer, ack_wait=worker.ack_wait_seconds, max_deliver=worker.max_deliver)


async def apply_streams(settings: Settings) -> list[str]:
    """Make the broker agree with the map; a line for everything done."""
    async with connected(settings, "provisioner") as client:
        jetstream = client.jetstream(timeout=15)
        house = [*(tuned(each(), settings) for each in (undertaker_consumer, retriever_consumer, ingester_consumer)), absence_consumer()]
        if settings.log.enabled:
            house.append(accountant_consumer())
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
