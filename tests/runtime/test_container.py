"""The broker in a container: the image, our nats.conf in it, and the face that the rest of this suite needs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from capibara_flow.runtime.embedded import greeting
from tests.conftest import ROOT
from tests.runtime.container import VERSION, ContainerBroker, missing
from tests.runtime.rig import Rig


@asynccontextmanager
async def provisioned(broker: ContainerBroker) -> AsyncIterator[Rig]:
    """The streams on *broker*, whether they are new there or not."""
    rig = Rig(broker)
    await rig.start()
    yield rig
    await rig.stop()


@pytest.mark.docker
async def test_a_broker_in_a_container_is_like_our_own_and_keeps_its_data_and_its_port() -> None:
    if reason := missing():
        pytest.skip(f"no Docker engine answers, so the broker suite ran on a local broker only: {reason}")
    with ContainerBroker(ROOT / "nats.conf") as broker:
        url = broker.url
        assert greeting(*broker.address)["version"] == VERSION
        assert len(set(broker.passwords.values())) == len(broker.passwords)
        async with provisioned(broker) as rig:
            await rig.ask("T1")
            assert await rig.waiting() == 1
        await asyncio.to_thread(broker.kill)
        assert not broker.alive
        await asyncio.to_thread(broker.restart)
        assert (broker.url, broker.alive) == (url, True)
        async with provisioned(broker) as rig:
            assert await rig.waiting() == 1
