"""Whether there is room for another turn further down: a door that looks before it opens refuses before any work is done."""

import asyncio
import math
import time
from dataclasses import dataclass

from nats.errors import Error as NatsError
from nats.js.api import StreamInfo

from capibara_flow.errors import QueueFull
from capibara_flow.runtime.client import TokenClient
from capibara_flow.telemetry import log
from topics.streams import Consumer, router_consumer

_FRESH = 1.0  # seconds for which a look is believed, as long as there is plenty of room
_STALE = 10.0  # seconds after which even that is asked anew before a turn is taken
_PLENTY = 2000  # more calls than doors take in until they look again


@dataclass(frozen=True)
class _Look:
    """How many calls a queue would still have taken, and when (``time.monotonic``)."""

    left: float = math.inf
    at: float = -math.inf


class Room:
    """The queues behind the router's, of the streams of *consumers*; the router's own refuses by itself."""

    def __init__(self, client: TokenClient, consumers: tuple[Consumer, ...]) -> None:
        self._jetstream = client.jetstream()
        self.rely_on(consumers)
        self._last = _Look()
        self._looking: asyncio.Task[None] | None = None

    def rely_on(self, consumers: tuple[Consumer, ...]) -> None:
        """Look at the queues of these *consumers* from now on."""
        self._streams = sorted({each.stream for each in consumers} - {router_consumer().stream})

    async def check(self) -> None:
        """Return when there is room, as far as is known; raises ``QueueFull``."""
        if not self._streams:
            return
        old, scarce = time.monotonic() - self._last.at, self._last.left < _PLENTY
        if (old > _FRESH or scarce) and self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        if self._looking and (old > _STALE or scarce):
            await asyncio.shield(self._looking)
        if self._last.left < 1:
            raise QueueFull("too many turns are waiting; try again later")

    async def _look(self) -> None:
        try:
            found = await asyncio.gather(*map(self._jetstream.stream_info, self._streams))
        except (NatsError, TimeoutError) as error:
            log.debug("queues_unseen", error=repr(error))  # who cannot be asked does not take the turn either
            self._last = _Look(at=time.monotonic())
            return
        self._last = _Look(min(map(_left, found)), time.monotonic())

    def _looked(self, _: asyncio.Task[None]) -> None:
        self._looking = None


def _left(info: StreamInfo) -> float:
    """How many messages a stream would still take, by its limits of messages and of bytes: these as large as those that are there."""
    have, size = info.state.messages, info.state.bytes
    most_messages, most_bytes = info.config.max_msgs or -1, info.config.max_bytes or -1
    by_messages = most_messages - have if most_messages > 0 else math.inf
    by_bytes = (most_bytes - size) / max(1, size) * max(1, have) if most_bytes > 0 else math.inf
    return min(by_messages, by_bytes)
