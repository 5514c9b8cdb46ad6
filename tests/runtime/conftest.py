"""A provisioned broker and clients of every role."""

from collections.abc import AsyncIterator

import pytest

from capibara_flow.runtime.embedded import EmbeddedBroker
from tests.runtime.rig import Rig


@pytest.fixture
async def rig(broker: EmbeddedBroker) -> AsyncIterator[Rig]:
    """A broker with the project's configuration and streams."""
    running = Rig(broker)
    await running.start()
    yield running
    await running.stop()
