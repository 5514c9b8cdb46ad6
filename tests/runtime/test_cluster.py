"""What only a cluster does: three nodes, everything kept three times, and nodes that die while answers stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientSession
from nats.aio.client import Client
from nats.js.errors import APIError, BadRequestError

from capibara_flow import wiring
from capibara_flow.domain.turns import turn_id
from capibara_flow.engines import scripted
from capibara_flow.engines.script import Answer, Script
from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime import brokers
from capibara_flow.runtime.client import header
from capibara_flow.runtime.keys import Keys
from capibara_flow.runtime.output import last_message
from capibara_flow.settings import FleetSettings
from tests.cluster import Cluster
from tests.conftest import Installation, installed
from tests.edge.client import Event, arriving, names, place, text_of
from tests.waiting import until
from topics.streams import KEYS, READERS, reader_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Long enough for an election of some seconds to fall into it.
WORDS, PAUSE_MS, TURNS = 350, 40, 8
SCRIPT = Script(answer=(Answer(when=r"^count to (\d+)", counts=True, delay_ms=PAUSE_MS),))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as running:
        yield running


@pytest.fixture
async def installation(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Installation]:
    """A router, a caller and a scripted engine on the cluster."""
    runner, engine = await scripted.serve(SCRIPT)
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        f'[[experts]]\nname = "scripted"\nurls = ["{engine}/v1"]\nscripted = true\nconcurrency = {4 * TURNS}\n', encoding="utf-8"
    )
    # On a busy machine a node may hang for minutes, and what is at work is delivered every five seconds: none of them is a death.
    patient = cluster.settings.worker.model_copy(update={"max_deliver": 100})
    settings = cluster.settings.model_copy(update={"fleet": FleetSettings(file=fleet), "worker": patient})
    try:
        async with installed(settings, engine, "router", "caller") as running:
            yield running
    finally:
        await runner.cleanup()


class Reader:
    """A client that follows one turn from the question to the end."""

    def __init__(self, door: str, words: int) -> None:
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._read(door, f"count to {words}"))
        self.expected = "".join(f"{number} " for number in range(1, words + 1))

    async def _read(self, door: str, question: str) -> None:
        async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": question}) as response:
            assert response.status == 200, await response.text()
            async for event in arriving(response):
                self.events.append(event)

    @property
    def tokens(self) -> int:
        """How many events with words have come."""
        return sum(event.name == "token" for event in self.events)

    def check(self) -> None:
        """Each character once and in order, nothing taken back, and one end."""
        assert text_of(self.events) == self.expected
        assert "reset" not in names(self.events)
        assert names(self.events)[-2:] == ["usage", "done"]
        marks = [place(event.id) for event in self.events if event.id]
        assert marks == sorted(set(marks))


@pytest.mark.parametrize(("stream", "consumer"), [("CF_OUT", None), ("CF_WORK_CALL", None), ("CF_WORK_CALL", "caller-scripted")])
async def test_turns_survive_the_death_of_a_leader_and_the_node_comes_back(cluster, installation, stream, consumer):
    door = await installation.start_edge()
    readers = [Reader(door, WORDS) for _ in range(TURNS)]
    await until(lambda: all(reader.tokens > 5 for reader in readers))
    victim = await cluster.leader(stream, consumer)
    victim.kill()
    assert not any(reader.task.done() for reader in readers), "they were to be in mid-stream"
    readers += [Reader(door, 10) for _ in range(TURNS)]  # asked while nobody leads
    await asyncio.gather(*(reader.task for reader in readers))
    for reader in readers:
        reader.check()
    assert await cluster.leader(stream, consumer) is not victim
    cluster.start(victim)
    for name in ("CF_OUT", "CF_WORK_CALL", "CF_WORK_ROUTER"):
        await cluster.agreed(name)
    assert await victim.has("CF_WORK_CALL") is not None
    assert (await victim.has("CF_WORK_CALL"))[0] == 0, "work that is done is done on all nodes"


async def test_turns_survive_a_node_that_hangs_and_comes_back(cluster, installation):
    door = await installation.start_edge()
    readers = [Reader(door, WORDS) for _ in range(TURNS)]
    await until(lambda: all(reader.tokens > 5 for reader in readers))
    victim = await cluster.leader("CF_OUT")
    victim.pause()
    readers += [Reader(door, 10) for _ in range(TURNS)]
    await until(lambda: all(reader.task.done() for reader in readers[TURNS:]))
    victim.resume()  # it believes for a moment that it still leads
    await asyncio.gather(*(reader.task for reader in readers))
    for reader in readers:
        reader.check()
    await cluster.agreed("CF_OUT")


async def test_a_node_that_hangs_is_left(cluster, installation):
    async with wiring.connected(installation.settings, "observer") as client:
        port = client.connected_url.port
        next(node for node in cluster.nodes if node.url.endswith(f":{port}")).pause()
        await until(lambda: client.is_connected and client.connected_url.port != port)
        assert await until(lambda: answered(client))


async def test_streams_are_made_once_a_cluster_has_come_up(cluster, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[[experts]]\nname = "scripted"\nurls = ["http://127.0.0.1:1/v1"]\n', encoding="utf-8")
    settings = cluster.settings.model_copy(update={"fleet": FleetSettings(file=fleet)})
    for node in cluster.nodes[1:]:
        node.kill()
    applying = asyncio.create_task(wiring.apply_streams(settings))
    await asyncio.wait({applying}, timeout=2)
    assert not applying.done()
    for node in cluster.nodes[1:]:
        cluster.start(node)
    assert f"created  {KEYS}" in await applying


async def test_a_second_key_is_refused_whatever_its_last_word(cluster, installation):
    """What makes one turn of two requests with one Idempotency-Key: on the condition that nothing matches the wildcard yet."""
    condition = {"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Expected-Last-Subject-Sequence-Subject": "$KV.CF_KEYS.hash.*"}
    async with wiring.connected(installation.settings, "edge") as client:
        jetstream = client.jetstream()
        bids = [jetstream.publish(f"$KV.CF_KEYS.hash.T{number}", b"{}", headers=condition) for number in range(8)]
        results = await asyncio.gather(*bids, return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        lost = [result for result in results if isinstance(result, APIError)]
        assert (len(won), len(lost)) == (1, 7)
        with pytest.raises(BadRequestError, match="wrong last sequence"):
            await jetstream.publish("$KV.CF_KEYS.hash.T9", b"{}", headers=condition)
        other = {"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Expected-Last-Subject-Sequence-Subject": "$KV.CF_KEYS.other.*"}
        await jetstream.publish("$KV.CF_KEYS.other.T9", b"{}", headers=other)
        found = await last_message(client, "$KV.CF_KEYS.hash.*", KEYS)
        assert found is not None
        assert found.sequence == won[0].seq
    await cluster.agreed(KEYS)


async def test_of_doors_that_claim_one_key_at_once_one_wins(installation):
    turns = [turn_id(milliseconds=int(time.time() * 1000), entropy=bytes([number]) * 10, tenant="t") for number in range(8)]
    async with wiring.connected(installation.settings, "edge") as one, wiring.connected(installation.settings, "edge") as other:
        keys = [Keys(one), Keys(other)]
        owners = await asyncio.gather(
            *(keys[number % 2].claim("hash", "same", turn, time.time() + 60) for number, turn in enumerate(turns))
        )
    assert len(set(owners)) == 1
    assert owners[0][0] in turns


async def test_a_lease_of_readers_that_runs_out_leaves_a_marker_and_stops_the_turn(cluster, installation):
    await installation.start_worker("undertaker")
    async with wiring.connected(installation.settings, "edge") as client:
        jetstream = client.jetstream()
        await jetstream.publish(reader_key("T1"), b"", headers={"Nats-TTL": "1s"})

        async def marker() -> bytes:
            found = await last_message(client, reader_key("T1"), READERS)
            return header(found.headers, b"Nats-Marker-Reason") if found else b""

        assert await until(marker) == b"MaxAge"
    async with wiring.connected(installation.settings, "observer") as client:
        stop = await until(lambda: last_message(client, "cf.ctl.T1.cancel", "CF_CTL"))
        assert json.loads(stop.data)["reason"] == "abandoned"
    await cluster.agreed(READERS)


async def test_whoever_was_told_of_one_node_only_goes_on_with_the_others(cluster, installation):
    first = cluster.nodes[0]
    alone = cluster.settings.model_copy(update={"nats": cluster.settings.nats.model_copy(update={"url": first.url})})
    async with wiring.connected(alone, "observer") as client, AsyncExitStack() as stack:
        broker = brokers.broker(alone, "router")
        await broker.connect()
        stack.push_async_callback(broker.stop)
        first.kill()
        assert await until(lambda: client.is_connected and client.stats["reconnects"])
        assert client.connected_url is not None
        assert client.connected_url.port != urlsplit(first.url).port
        assert await until(lambda: broker.config.connection_state.connection.stats["reconnects"])
        assert await until(lambda: answered(client))


async def answered(client: Client) -> bool:
    """Whether the API of JetStream answers *client*."""
    try:
        await last_message(client, "cf.out.T1.data.main")
    except BrokerUnavailable:
        return False
    return True
