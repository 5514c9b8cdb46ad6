"""A provisioned broker and clients of every role; the broker is our own and, where a Docker engine answers, one in a container."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from capibara_flow.runtime.embedded import EmbeddedBroker
from tests.conftest import ROOT
from tests.runtime.container import ContainerBroker, missing
from tests.runtime.rig import Rig

#: What cannot be had here is no parameter: ``test_container.py`` says once why it is missing.
BROKERS = ["local"] if missing() else ["local", pytest.param("container", marks=pytest.mark.docker)]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[EmbeddedBroker | ContainerBroker]:
    """An empty broker of one's own, with the project's nats.conf."""
    config = ROOT / "nats.conf"
    with tempfile.TemporaryDirectory() as folder:
        chosen = ContainerBroker(config) if request.param == "container" else EmbeddedBroker(Path(folder), config=config)
        with chosen as running:
            yield running


@pytest.fixture
async def rig(broker: EmbeddedBroker) -> AsyncIterator[Rig]:
    """A broker with the project's configuration and streams."""
    running = Rig(broker)
    await running.start()
    yield running
    await running.stop()
