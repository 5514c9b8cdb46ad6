"""Turns as they were kept: the messages of one turn from all streams, and the newest turns. Reads only, and makes no consumer."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.turns import is_turn_id
from capibara_flow.errors import TurnUnknown
from capibara_flow.runtime.client import TokenClient, fields
from capibara_flow.runtime.output import OUT, Stored, one_message, stored

LOG = "CF_LOG"
#: Where something of a turn may be kept, and under which subjects; queues are left out: who looks there takes work away from nobody.
_PLACES = ((LOG, "cf.log.{}.>"), (OUT, "cf.out.{}.>"), ("CF_CTL", "cf.ctl.{}.>"), ("CF_DEAD", "cf.dead.{}.>"))
_ASKED = "cf.log.*.asked.router"
_WINDOW = 1024  # sequences looked at together when the newest are wanted


class History:
    """What the broker keeps of turns. Every method raises ``BrokerUnavailable``."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client

    async def of(self, turn: str) -> Record:
        """All that is kept of *turn*; raises ``TurnUnknown`` when there is nothing, or when that is no turn's id."""
        found: list[Entry] = []
        if is_turn_id(turn):  # a wildcard would find those of others
            for stream, pattern in _PLACES:
                found += [each async for each in self._read(stream, pattern.format(turn))]
        if not found:
            raise TurnUnknown(f"nothing is kept of {turn!r}: `capibara turns` lists the turns that there are")
        return Record(turn, tuple(sorted(found, key=lambda each: each.when)))

    async def newest(self, *, since: float = 0.0) -> AsyncIterator[Entry]:
        """The questions that are kept, the newest first, down to *since* (seconds since the epoch): what each turn began with.

        There are none where the log is switched off.
        """
        last = await one_message(self._client, LOG, last_by_subj=_ASKED)
        first = await one_message(self._client, LOG, seq=1, next_by_subj=_ASKED)
        if last is None or first is None:
            return
        before = last.sequence + 1
        while before > first.sequence:
            after = max(before - _WINDOW, first.sequence) - 1
            window = [each async for each in self._read(LOG, _ASKED, after, before)]
            for entry in reversed(window):
                if entry.when < since:
                    return
                yield entry
            before = after + 1

    async def _read(self, stream: str, subject: str, after: int = 0, before: int | None = None) -> AsyncIterator[Entry]:
        """The messages of *subject* behind *after* and before *before*; none when there is no such *stream*."""
        if await one_message(self._client, stream, last_by_subj=subject) is None:
            return
        while messages := await stored(self._client, subject, after, stream):
            for message in messages:
                if before is not None and message.sequence >= before:
                    return
                yield _entry(stream, message)
            after = messages[-1].sequence


def _entry(stream: str, message: Stored) -> Entry:
    """A stored *message* as an entry; what the broker itself adds to its headers is told by the entry's other fields."""
    headers = fields(message.headers)
    when = datetime.fromisoformat(headers["Nats-Time-Stamp"][:26].rstrip("Z")).replace(tzinfo=UTC).timestamp()
    own = {name: value for name, value in headers.items() if name not in _BROKERS}
    return Entry(stream, message.sequence, when, headers["Nats-Subject"], own, message.data)


_BROKERS = frozenset(
    {"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Last-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending", "Nats-Msg-Size"}
)
