"""Lanes: the lines in which turns wait for an expert, one for each bucket of tenants and each priority.

They are made as they are needed. Whoever sends a turn to a lane of which nobody may know tells it first, by a key in a bucket
(``topics.streams.LANES``) that outlives the turn. Who takes work listens to those keys, and reads them again and again: a notice that got
lost strands no turn.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import MARKER
from capibara_flow.runtime.client import TokenClient, header
from capibara_flow.runtime.output import stored
from capibara_flow.telemetry import log
from topics.chat import CallExpert
from topics.streams import FIRST_LANE, LANE_AGAIN_SECONDS, LANE_SECONDS, LANES, lane_key

_TIMEOUT = 5.0
_WHOLE = 12  # every so many looks all keys are read: a stream that was made anew counts from one again
_KEYS = lane_key("*", "*")

Clock = Callable[[], float]


class Lanes:
    """All lanes that turns may wait in, with the tenant who came there last, by expert (a token)."""

    def __init__(self, client: TokenClient, *, every: float = 5.0, clock: Clock = time.monotonic) -> None:
        self._client, self._every, self._clock = client, every, clock
        self._jetstream = client.jetstream()
        self._told: dict[str, float] = {}
        self._known: dict[tuple[str, str], tuple[str, float]] = {}
        self._after = 0
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        #: Called with the expert (a token) that has got a lane, or lost one.
        self.on_change: Callable[[str], None] = lambda _: None

    async def announce(self, command: CallExpert, tenant: str) -> None:
        """Let everybody know the lane of *command*, which *tenant* asks for; raises ``BrokerUnavailable``.

        The first lane is known to all, and what was told of late is still known.
        """
        key, now = lane_key(command.expert, command.lane), self._clock()
        if command.lane == FIRST_LANE or now - self._told.get(key, -LANE_AGAIN_SECONDS) < LANE_AGAIN_SECONDS:
            return
        try:
            await self._jetstream.publish(key, tenant.encode(), timeout=_TIMEOUT)
        except (NatsError, APIError, TimeoutError) as error:
            raise BrokerUnavailable(f"{key} cannot be told: {error!r}") from error
        self._told[key] = now

    async def start(self) -> None:
        """Begin to listen; what is known already has been read when this returns, if the broker answers."""
        self._subscription = await self._client.listen(_KEYS, self._hear)
        await self._client.flush()
        await self.read()
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Listen no more."""
        if self._task:
            self._task.cancel()
        if self._subscription:
            await self._client.deafen(self._subscription)

    def of(self, expert: str) -> Mapping[str, str]:
        """The lanes of *expert*, but for the first, each with its tenant."""
        return {lane: tenant for (owner, lane), (tenant, _) in self._known.items() if owner == expert}

    def _hear(self, subject: bytes, headers: bytes, data: bytes) -> None:
        self._learn(subject, headers, data)

    def _learn(self, subject: bytes, headers: bytes, data: bytes) -> None:
        if header(headers, MARKER.encode()):
            return  # in the place of a key that ran out; ours runs out by our own clock
        *_, expert, lane = subject.decode().split(".")
        fresh = (expert, lane) not in self._known
        self._known[expert, lane] = data.decode(errors="replace"), self._clock()
        if fresh:
            self.on_change(expert)

    async def _keep(self) -> None:
        looks = 0
        while True:
            await asyncio.sleep(self._every)
            looks += 1
            if looks % _WHOLE == 0:
                self._after = 0
            await self.read()
            oldest = self._clock() - LANE_SECONDS
            for expert, lane in [key for key, (_, at) in self._known.items() if at < oldest]:
                del self._known[expert, lane]
                self.on_change(expert)

    async def read(self) -> None:
        """Learn of the keys that were written since the last look."""
        try:
            while found := await stored(self._client, _KEYS, self._after, LANES):
                for each in found:
                    self._learn(header(each.headers, b"Nats-Subject"), each.headers, each.data)
                self._after = found[-1].sequence
        except (BrokerUnavailable, NatsError) as error:
            log.warning("lanes_unread", error=repr(error))
