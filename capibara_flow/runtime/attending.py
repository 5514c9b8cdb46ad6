"""Readers attend their turn: a key in the bucket of readers lives only as long as somebody renews it (time to live: NATS ADR-43).

When it runs out the broker leaves a marker in its place, which tells that nobody reads any more: also when a whole door was killed.
What the key holds is the turn's deadline, so that every door that reads the turn knows when it is overdue. A turn that nobody has to
attend, though somebody may come back to it, has a key of its own that runs out when it is overdue.
"""

import asyncio
import math
import time
from collections.abc import Callable

from nats.errors import Error as NatsError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import REMOVED, marker, removed
from capibara_flow.runtime.client import TokenClient, encoded
from capibara_flow.runtime.output import last_message
from capibara_flow.telemetry import log
from topics.streams import READERS, due_key, reader_key

_AWAY = 0.2  # seconds between looks for a broker that is away: keys may have little left when it comes back
_AGAIN = 1.0  # seconds until the bucket is asked again that did not answer
_LATE = 0.5  # seconds in which whoever is at work when a turn's deadline passes ends it himself
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
        self._due: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def join(self, turn: str, due: float) -> None:
        """One more reader of *turn*, which is *due* then (seconds since the epoch)."""
        self._readers[turn] = self._readers.get(turn, 0) + 1
        self._due[turn] = due
        self._put(turn, self._read)
        if self._timer is None:
            self._renew_in(self._interval)

    def leave(self, turn: str, *, ended: bool) -> None:
        """One reader less. The last one of an answer that has not *ended* may come back for a while."""
        self._readers[turn] -= 1
        if self._readers[turn]:
            return
        del self._readers[turn]
        if ended:
            self._send(reader_key(turn), _REMOVED, b"")
        else:
            self._put(turn, self._left)
        del self._due[turn]

    def remember(self, turn: str, due: float) -> None:
        """Let *turn* be ended when it is overdue, also if this door is gone by then."""
        self._send(due_key(turn), _lasting(due + _LATE - time.time()), b"due")

    def forget(self, turn: str) -> None:
        """*turn*, which was remembered, has ended."""
        self._send(due_key(turn), _REMOVED, b"")

    async def due(self, turn: str) -> float | None:
        """When *turn* is due, if whoever reads it has to attend it; raises ``BrokerUnavailable``."""
        last = await last_message(self._client, reader_key(turn), READERS)
        if last is None or removed(last) or marker(last) not in {b"", b"MaxAge"}:
            return None
        try:
            return float(last.data)
        except ValueError:
            return math.inf  # it ran out: somebody else is about to stop the turn

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

    def _put(self, turn: str, headers: bytes) -> None:
        self._send(reader_key(turn), headers, b"%.3f" % self._due[turn])

    def _send(self, subject: str, headers: bytes, body: bytes) -> None:
        try:
            self._client.send(subject, body, reply="", headers=headers)
        except NatsError as error:
            log.warning("reader_untold", subject=subject, error=repr(error))


class Seat:
    """One reader's place at a turn: taken at once by who opens it, else as soon as it is known that the turn is attended at all.

    *overdue* is called once the turn should have ended, if there is still a reader here.
    """

    def __init__(self, attendance: Attendance, turn: str, overdue: Callable[[str], None]) -> None:
        self._attendance, self._turn, self._overdue = attendance, turn, overdue
        self._taken = self._remembered = self._left = False
        self._search: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def take(self, due: float) -> None:
        """Attend the turn."""
        self._taken = True
        self._attendance.join(self._turn, due)
        self.watch(due)

    def watch(self, due: float, *, remember: bool = False) -> None:
        """Read a turn that nobody has to attend; *remember* that it is due, if somebody may come back to it."""
        if remember:
            self._remembered = True
            self._attendance.remember(self._turn, due)
        if due < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due + _LATE - time.time()), self._overdue, self._turn)

    def look(self) -> None:
        """Attend the turn if it is an attended one."""
        self._search = asyncio.create_task(self._find())

    async def _find(self) -> None:
        while True:
            try:
                due = await self._attendance.due(self._turn)
                break
            except BrokerUnavailable:
                await asyncio.sleep(_AGAIN)
        if due is not None and not self._left:  # a search may miss that it is cancelled
            self.take(due)

    def leave(self, *, ended: bool) -> None:
        """Read no more."""
        self._left = True
        if self._search:
            self._search.cancel()
        if self._timer:
            self._timer.cancel()
        if self._taken:
            self._attendance.leave(self._turn, ended=ended)
        if self._remembered and ended:
            self._attendance.forget(self._turn)


def _lasting(seconds: float) -> bytes:
    """Headers of a message that the broker keeps for *seconds*, of which it knows whole ones only."""
    return encoded({"Nats-TTL": f"{max(1, math.ceil(seconds))}s"})
