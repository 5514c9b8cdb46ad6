"""Turns that nobody reads any more, or that are overdue: the broker tells when the lease of a turn's readers runs out, or its time.

The lease is a key of a bucket, with a time to live that doors renew while they have a reader (NATS ADR-43). When it runs out the broker
leaves a marker in its place, and so tells even of readers whose door was killed.
"""

import asyncio

from nats.aio.msg import Msg

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import MARKER
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import cancel, last_message
from capibara_flow.runtime.provision import ensure_consumer, ensure_stream
from capibara_flow.runtime.pump import Pump
from capibara_flow.telemetry import log
from topics.chat import EXPIRED
from topics.streams import READERS, Layout, absence_consumer, due_key, reader_key

_RETURN = 5.0  # seconds in which doors come back after an outage, and renew what they could not renew meanwhile
_PERMITS = 256


class Absences:
    """Cancels turns whose readers have been gone for too long; several processes share the work."""

    def __init__(self, client: TokenClient, layout: Layout) -> None:
        self._client = client
        self._jetstream = client.jetstream()
        self._layout = layout
        consumer = absence_consumer()
        self._pump = Pump(client, READERS, consumer.durable, permits=_PERMITS, handle=self._look, ensure=self._ensure)

    async def start(self) -> None:
        """Listen."""
        await self._pump.start()

    async def stop(self) -> None:
        """Listen no more."""
        await self._pump.unsubscribe()
        await self._pump.finish(1)

    async def _ensure(self) -> None:
        await ensure_stream(self._jetstream, self._layout.named(READERS))
        await ensure_consumer(self._jetstream, absence_consumer())

    async def _look(self, message: Msg) -> None:
        """A reader came, stayed or left (most messages), or all have been gone for too long, or a turn's time is up."""
        if message.headers and MARKER in message.headers:
            turn = message.subject.split(".")[2]
            try:
                if message.subject == due_key(turn):
                    await cancel(self._jetstream, turn, EXPIRED)
                else:
                    await self._abandoned(turn, message.metadata.sequence.stream)
            except BrokerUnavailable as error:
                log.warning("absence_unsettled", turn=turn, error=repr(error))
                return  # the marker comes again
        await message.ack()

    async def _doors_are_back(self) -> None:
        """A lease may have run out only because nobody could renew it: wait until everybody has had the time to."""
        await asyncio.sleep(max(0.0, self._client.returned + _RETURN - asyncio.get_running_loop().time()))

    async def _abandoned(self, turn: str, sequence: int) -> None:
        await self._doors_are_back()
        last = await last_message(self._client, reader_key(turn), READERS)
        if last is None or last.sequence != sequence:
            return  # a reader has come back, or the turn has been erased
        log.info("turn_abandoned", turn=turn)
        await cancel(self._jetstream, turn, "abandoned")
