"""Streams and consumers on a real broker."""

from dataclasses import replace

import pytest
from nats.aio.client import Client
from nats.js.errors import APIError, NotFoundError

from capibara_flow.runtime import connection, provision
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import NatsSettings, Settings
from topics.streams import Layout, caller_consumer, router_consumer

CONSUMERS = (router_consumer(), caller_consumer("phi"), caller_consumer("qwen2.5:0.5b"))


async def connect(broker: EmbeddedBroker, role: str) -> Client:
    return await connection.connect(Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords)), role)


@pytest.fixture
async def jetstream(broker: EmbeddedBroker):
    client = await connect(broker, "provisioner")
    yield client.jetstream(timeout=10)
    await client.close()


async def test_the_first_time_creates_and_the_second_changes_nothing(jetstream):
    first = await provision.apply(jetstream, Layout(), CONSUMERS)
    second = await provision.apply(jetstream, Layout(), CONSUMERS)
    names = [stream.name for stream in Layout().streams]
    assert first[: len(names)] == [f"created  {name}" for name in names]
    assert second[: len(names)] == [f"kept     {name}" for name in names]
    assert len(await jetstream.consumers_info("CF_WORK_CALL")) == 2


async def test_a_changed_age_is_updated_and_nothing_else(jetstream, broker):
    await provision.apply(jetstream, Layout(), CONSUMERS)
    caller = await connect(broker, "caller")
    await caller.jetstream().publish("cf.out.T.data.main", b"kept")
    await caller.close()
    lines = await provision.apply(jetstream, Layout(turn_age=77), CONSUMERS)
    assert [line.split()[1] for line in lines if line.startswith("updated")] == [
        "CF_OUT",
        "CF_CTL",
        "KV_CF_READERS",
        "KV_CF_KEYS",
        "CF_LOG",
    ]
    info = await jetstream.stream_info("CF_OUT")
    assert (info.config.max_age, info.state.messages) == (77, 1)


async def test_a_changed_consumer_is_updated(jetstream):
    await provision.apply(jetstream, Layout(), CONSUMERS)
    await provision.apply(jetstream, Layout(), (replace(router_consumer(), ack_wait=3, max_ack_pending=7),))
    config = (await jetstream.consumer_info("CF_WORK_ROUTER", "router")).config
    assert (config.ack_wait, config.max_ack_pending) == (3, 7)


@pytest.mark.parametrize("layout", [Layout(), Layout(log=False), Layout(turn_age=60, dead_age=30)], ids=["default", "no log", "short"])
async def test_every_stream_of_the_broker_forgets(jetstream, layout: Layout):
    await provision.apply(jetstream, layout, ())
    infos = await jetstream.streams_info()
    assert {info.config.name for info in infos} == {stream.name for stream in layout.streams}
    for info in infos:
        assert 0 < info.config.max_age <= 24 * 3600
        assert 0 < info.config.duplicate_window <= info.config.max_age


async def test_ensure_creates_what_is_missing_and_leaves_what_differs(jetstream):
    stream = Layout().named("CF_WORK_ROUTER")
    with pytest.raises(NotFoundError):
        await jetstream.stream_info(stream.name)
    await provision.ensure_stream(jetstream, stream)
    await jetstream.update_stream(provision.stream_config(replace(stream, max_messages=5)))
    await provision.ensure_stream(jetstream, stream)
    assert (await jetstream.stream_info(stream.name)).config.max_msgs == 5


async def test_a_work_stream_refuses_what_is_too_much(jetstream, broker):
    stream = replace(Layout().named("CF_WORK_ROUTER"), max_messages=1)
    await jetstream.add_stream(provision.stream_config(stream))
    edge = await connect(broker, "edge")
    await edge.jetstream().publish("cf.work.A.router", b"")
    with pytest.raises(APIError, match="maximum messages exceeded"):
        await edge.jetstream().publish("cf.work.B.router", b"")
    await edge.close()
