"""Readers attend their turn: a key in the bucket of readers lives only as long as somebody renews it (time to live: NATS ADR-43).

When it runs out the broker leaves a marker in its place, which tells that nobody reads any more: also when a whole door was killed.
"""

import asyncio
import math

from nats.errors import Error as NatsError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import REMOVED, marker, removed
from capibara_flow.runtime.client import TokenClient, encoded
from capibara_flow.runtime.output import last_message
from capibara_flow.telemetry import log
from topics.streams import READERS, reader_key

_AWAY = 0.2  # seconds between looks for a broker that is away: keys may have little left when it comes back
_AGAIN = 1.0  # seconds until the bucket is asked again that did not answer
_REMOVED = encoded(REMOVED)


class Attendance:
    """The keys of all turns that are read and attended here, renewed together; one that nobody renews lives for *abandon_seconds*.

    Nothing is waited for and nothing raised: a key that could not be written is written anew at the next renewal.
    """

    def __init__(self, client: TokenClient, abandon_seconds: float) -> None:
        self._client = client
        self._interval = max(0.2, abandon_seconds / 5)
        self._read, self._left = _lasting(abandon_seconds + self._interval), _lasting(abandon_seconds)
        self._readers: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def join(self, turn: str) -> None:
        """One more reader of *turn*."""
        self._readers[turn] = self._readers.get(turn, 0) + 1
        self._put(turn, self._read)
        if self._timer is None:
            self._renew_in(self._interval)

    def leave(self, turn: str, *, ended: bool) -> None:
        """One reader less. The last one of an answer that has not *ended* may come back for a while."""
        self._readers[turn] -= 1
        if not self._readers[turn]:
            del self._readers[turn]
            self._put(turn, *((_REMOVED, b"") if ended else (self._left,)))

    async def is_attended(self, turn: str) -> bool:
        """Whether whoever reads *turn* has to attend it; raises ``BrokerUnavailable``."""
        last = await last_message(self._client, reader_key(turn), READERS)
        return last is not None and not removed(last) and marker(last) in {b"", b"MaxAge"}

    def _renew_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._renew)

    def _renew(self) -> None:
        self._timer = None
        if self._client.is_closed or not self._readers:
            return
        if not self._client.is_connected:
            self._renew_in(_AWAY)
            return
        for turn in self._readers:
            self._put(turn, self._read)
        self._renew_in(self._interval)

    def _put(self, turn: str, headers: bytes, body: bytes = b"read") -> None:
        try:
            self._client.send(reader_key(turn), body, reply="", headers=headers)
        except NatsError as error:
            log.warning("reader_untold", turn=turn, error=repr(error))


class Seat:
    """One reader's place at a turn: taken at once by who opens it, else as soon as it is known that the turn is attended at all."""

    def __init__(self, attendance: Attendance, turn: str) -> None:
        self._attendance, self._turn = attendance, turn
        self._taken = False
        self._search: asyncio.Task[None] | None = None

    def take(self) -> None:
        """Attend the turn."""
        self._taken = True
        self._attendance.join(self._turn)

    def look(self) -> None:
        """Attend the turn if it is an attended one."""
        self._search = asyncio.create_task(self._find())

    async def _find(self) -> None:
        while True:
            try:
                attended = await self._attendance.is_attended(self._turn)
                break
            except BrokerUnavailable:
                await asyncio.sleep(_AGAIN)
        if attended:
            self.take()

    def leave(self, *, ended: bool) -> None:
        """Read no more."""
        if self._search:
            self._search.cancel()
        if self._taken:
            self._attendance.leave(self._turn, ended=ended)


def _lasting(seconds: float) -> bytes:
    """Headers of a message that the broker keeps for *seconds*, of which it knows whole ones only."""
    return encoded({"Nats-TTL": f"{max(1, math.ceil(seconds))}s"})
