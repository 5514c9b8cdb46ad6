"""What was kept of turns, for who may look: the newest ones, and one as a timeline, a picture or a page."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from capibara_flow.domain.picture import LANGUAGES, html, svg
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.timeline import Summary, Timeline, timeline
from capibara_flow.domain.turns import belongs
from capibara_flow.edge.door import Door
from capibara_flow.errors import BadRequest, TurnUnknown
from topics.message import TENANT

#: Seconds in a unit of how long ago something was.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", re.ASCII)
_AT_ONCE = 8  # turns read at the same time
_MOST, _MOST_READ, _MOST_SEEN = 100, 500, 20_000  # turns that one request may list, have read, and have passed over
#: A page of a stranger's words: it may do nothing and load nothing.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_KINDS = {"json": "application/json", "svg": "image/svg+xml", "html": "text/html"}


@dataclass(frozen=True)
class Wanted:
    """Which turns: of a *tenant*, with an *expert* who answered or was to, of one *outcome*; empty is any. *limit* is how many."""

    limit: int = 20
    tenant: str = ""
    expert: str = ""
    outcome: str = ""

    def may_be(self, entry: Entry) -> bool:
        """Whether the turn that begins with *entry* can be one, as far as that tells."""
        if not self.tenant:
            return True
        return entry.headers.get(TENANT, self.tenant) == self.tenant and belongs(entry.turn, self.tenant)

    def takes(self, turn: Summary) -> bool:
        """Whether *turn* is one."""
        return self.expert in {"", turn.expert} and self.outcome in {"", turn.outcome}


async def find(
    newest: AsyncIterator[Entry], read: Callable[[str], Awaitable[Record]], wanted: Wanted, *, most_read: int, most_seen: int
) -> tuple[list[Summary], bool]:
    """The turns of *newest* that are *wanted*, and whether there may be more; at most so many are passed over, and read."""
    found: list[Summary] = []
    some: list[str] = []
    seen = done = 0
    async for entry in newest:
        seen += 1
        if wanted.may_be(entry):
            some.append(entry.turn)
        if len(some) == _AT_ONCE:
            found += await _read(some, read, wanted)
            done, some = done + len(some), []
        if len(found) > wanted.limit or done >= most_read or seen >= most_seen:
            break
    else:
        found += await _read(some, read, wanted)
        return found[: wanted.limit], len(found) > wanted.limit
    return found[: wanted.limit], True


async def _read(turns: list[str], read: Callable[[str], Awaitable[Record]], wanted: Wanted) -> list[Summary]:
    async def summary(turn: str) -> Summary | None:
        try:
            return Summary.of(await read(turn))
        except TurnUnknown:  # it has aged out or was erased since
            return None

    read_now = await asyncio.gather(*map(summary, turns))
    return [each for each in read_now if each is not None and wanted.takes(each)]


def ago(text: str, now: float) -> float:
    """The time that *text* means: so long before *now* (``90s``, ``15m``, ``1h``, ``2d``, or seconds); raises ``BadRequest``."""
    found = _AGO.fullmatch(text.strip())
    if found is None:
        raise BadRequest(f"since: {text[:40]!r} is not a time such as 90s, 15m, 1h or 2d")
    return now - float(found[1]) * _UNITS[found[2] or "s"]


class KeptTurns:
    """``/api/turns`` and what belongs to it."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def listed(self, request: web.Request) -> web.Response:
        """``GET /api/turns``: the newest turns of the asker's tenant."""
        identity = self._door.identify_by_key(request, "list turns")
        query = request.query
        since = ago(query["since"], time.time()) if "since" in query else 0.0
        wanted = Wanted(_limit(query.get("limit", "20")), identity.tenant, query.get("expert", ""), query.get("outcome", ""))
        newest = self._door.turns.newest(since=since)
        found, more = await find(newest, self._record, wanted, most_read=_MOST_READ, most_seen=_MOST_SEEN)
        return web.json_response({"turns": [each.as_json() for each in found], "more": more}, headers=_HEADERS)

    async def one(self, request: web.Request) -> web.Response:
        """``GET /api/turns/{turn}``: its timeline, as JSON, or as ``?format=svg`` or ``html`` (or by ``Accept``)."""
        kind = _kind(request)
        turn = self._door.own(request)
        record = await self._record(turn)
        if record.tenant not in {"", self._door.identify(request).tenant}:
            raise TurnUnknown("there is no such turn")
        told = await asyncio.to_thread(timeline, record)  # a long answer takes a while to read
        if kind == "json":
            return web.json_response(told.as_json(), headers=_HEADERS)
        return web.Response(
            text=_shown(told, kind, request),
            content_type=_KINDS[kind],
            charset="utf-8",
            headers=_HEADERS | {"Vary": "Accept, Accept-Language"},
        )

    async def _record(self, turn: str) -> Record:
        return Record(turn, tuple(await self._door.turns.record(turn)))


def _shown(told: Timeline, kind: str, request: web.Request) -> str:
    return (svg if kind == "svg" else html)(told, _language(request))


def _language(request: web.Request) -> str:
    """The first language that is accepted and that we have."""
    accepted = (each.strip()[:2].lower() for each in request.headers.get("Accept-Language", "").split(","))
    return next((each for each in accepted if each in LANGUAGES), LANGUAGES[0])


def _kind(request: web.Request) -> str:
    """What the turn is to be shown as; raises ``BadRequest``."""
    given = request.query.get("format")
    if given is None:
        accepted = request.headers.get("Accept", "").split(",")[0].split(";")[0].strip()
        return next((name for name, kind in _KINDS.items() if kind == accepted), "json")
    if given not in _KINDS:
        raise BadRequest(f"format must be one of {', '.join(_KINDS)}")
    return given


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= _MOST):
        raise BadRequest(f"limit must be a whole number from 1 to {_MOST}")
    return int(text)
