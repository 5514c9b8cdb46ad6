"""What is still there of a turn: a reader is told at once when the part that it asks for is not, or never will be."""

import asyncio
import time

from nats.errors import Error as NatsError

from capibara_flow.domain.turns import created, is_turn_id
from capibara_flow.errors import TurnGone, TurnUnknown
from capibara_flow.runtime.bucket import marker, removed
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import OUT, last_message, one_message
from topics.output import event_of
from topics.streams import READERS, Consumer, due_key, router_consumer

_SURE = 0.25  # seconds between two looks for somebody at work: a replica may lag behind


class Kept:
    """The stored output of turns, kept for *turn_age* seconds; *consumers* are those that work for turns."""

    def __init__(self, client: TokenClient, turn_age: float, consumers: tuple[Consumer, ...]) -> None:
        self._client = client
        self._jetstream = client.jetstream()
        self._turn_age = turn_age
        self.rely_on(consumers)

    def rely_on(self, consumers: tuple[Consumer, ...]) -> None:
        """Those who work for turns are *consumers* from now on."""
        self._first = [each for each in consumers if each.stream == router_consumer().stream]

    async def exists(self, turn: str) -> bool:
        """Whether output of *turn* is stored; raises ``BrokerUnavailable``."""
        return await last_message(self._client, _data(turn)) is not None

    async def resume(self, turn: str, after: int) -> int:
        """The sequence to read after, for who has all up to *after*: one less than the last, if need be, and 0 if nothing is stored yet.

        Raises ``TurnGone`` when what comes behind may be gone, ``TurnUnknown`` as ``expected`` does, and ``BrokerUnavailable``.
        """
        last = await last_message(self._client, _data(turn))
        if last is None:
            await self.expected(turn)
        if (last is None or after <= last.sequence) and not await self._whole(turn, after):
            raise TurnGone("what follows this event is no longer kept")
        return min(after, last.sequence - 1) if last else 0

    async def _whole(self, turn: str, after: int) -> bool:
        """Whether nothing of *turn* is gone behind *after*: that is still there, or what comes right behind it is, and is of this turn."""
        if await one_message(self._client, OUT, seq=after) is not None:
            return True
        following = await one_message(self._client, OUT, seq=after + 1)
        return following is not None and following.subject == _data(turn)

    async def beginning(self, turn: str) -> None:
        """Return when *turn* can be read from its beginning, or will be; raises ``TurnGone``, ``TurnUnknown`` or ``BrokerUnavailable``."""
        if not (is_turn_id(turn) and time.time() - created(turn) > self._turn_age):
            await self.expected(turn)
            return
        first = await one_message(self._client, OUT, seq=1, next_by_subj=_data(turn))
        if first is None or event_of(first.data.partition(b"\n")[0]) != "routed":
            raise TurnGone(f"the turn is older than the {self._turn_age:g} s for which output is kept")

    async def expected(self, turn: str) -> None:
        """Return when output of *turn* is stored, or somebody may still make some; raises ``TurnUnknown`` or ``BrokerUnavailable``.

        A router lets go of a turn only when its first output is stored. So a turn of which nothing is stored while no router has
        anything to do was erased, or never was, unless it is one that is to end by a time: a document that waits to be taken in, say.
        """
        for pause in (0, _SURE):
            await asyncio.sleep(pause)
            if await self.exists(turn) or await self._due(turn) or await self._busy() or await self.exists(turn):
                return
        raise TurnUnknown("there is no such turn: nothing of it is kept, and nobody works on it")

    async def _due(self, turn: str) -> bool:
        """Whether it is remembered that *turn* has to end by a time that is still to come; raises ``BrokerUnavailable``."""
        last = await last_message(self._client, due_key(turn), READERS)
        return last is not None and not removed(last) and not marker(last)

    async def _busy(self) -> bool:
        """Whether routers have work, or it cannot be told."""
        for consumer in self._first:
            try:
                info = await self._jetstream.consumer_info(consumer.stream, consumer.durable)
            except (NatsError, TimeoutError):
                return True
            if not info.num_pending and not info.num_ack_pending:
                return False
        return True


def _data(turn: str) -> str:
    return f"cf.out.{turn}.data.main"
