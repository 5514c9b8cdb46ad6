"""Lanes: the lines in which turns wait for an expert, one for each bucket of tenants and each priority.

They are made as they are needed. Whoever sends a turn to a lane of which nobody may know tells it first, by a key in a bucket
(``topics.streams.LANES``) that outlives the turn. Who takes work listens to those keys, and reads them again and again: a notice that got
lost strands no turn. Turns whose lane nobody has told, because a release sent them that knew of none, or because the bucket was lost, are
found in the queue itself, at the start and again and again.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import orjson
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import MARKER
from capibara_flow.runtime.client import TokenClient, flushed, header
from capibara_flow.runtime.output import stored
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log
from topics.chat import CallExpert, bucket_of
from topics.streams import CALLS, FIRST_LANE, LANE_AGAIN_SECONDS, LANE_SECONDS, LANES, lane_key

_TIMEOUT, _LOOK_TIMEOUT = 5.0, 1.0
_WHOLE = 12  # every so many looks all keys are read, and the queue: a stream that was made anew counts from one again
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
        await flushed(self._client)
        await self.read()
        await self._look()
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Listen no more."""
        await ended(self._task)
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
            if looks % _WHOLE == 0:
                await self._look()
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

    async def _look(self) -> None:
        """Learn of lanes that nobody has told but turns wait in; whose they are is not known."""
        try:
            subjects = await subjects_of(self._client, "*")
        except (NatsError, TimeoutError, KeyError, ValueError) as error:
            log.warning("lanes_unseen", error=repr(error))
            return
        for expert, lane in sorted({(parts[-2], parts[-1]) for parts in (subject.split(".") for subject in subjects)}):
            if lane != FIRST_LANE and is_lane(lane) and (expert, lane) not in self._known:
                self._known[expert, lane] = "", self._clock()
                self.on_change(expert)


async def subjects_of(client: TokenClient, expert: str) -> list[str]:
    """The subjects of all calls of *expert* (a token, or ``*`` for all) that are in the queue. Raises what nats-py raises."""
    asked = orjson.dumps({"subjects_filter": f"cf.work.*.call.{expert}.*"})
    reply = await client.request(f"$JS.API.STREAM.INFO.{CALLS}", asked, timeout=_LOOK_TIMEOUT)
    return list(orjson.loads(reply.data)["state"].get("subjects") or ())


def is_lane(text: str) -> bool:
    """Whether turns may wait in a lane of that name."""
    with suppress(ValueError):
        return bool(bucket_of(text))
    return False
