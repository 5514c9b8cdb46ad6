"""``/api/usage``: what the asker's tenant used, day by day."""

import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from datetime import time as clock
from typing import Any

from aiohttp import web

from capibara_flow.edge.door import Door
from capibara_flow.edge.turns import ago
from capibara_flow.errors import BadRequest
from topics.usage import ReadUsage, UsageDay, UsageListing

#: How long a reply may take: the store may have to be started, and what waits is written down first.
SECONDS = 60.0
NOBODY = "nobody is there who counts usage: start an accountant (`capibara worker accountant`)"
#: What is told when nobody says since when.
USUAL = "7d"
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


class Usage:
    """The handler of ``/api/usage``."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def read(self, request: web.Request) -> web.Response:
        """``GET /api/usage``: the usage of the asker's tenant, from ``since`` to before ``until``."""
        identity = self._door.identify_by_key(request, "read usage")
        now = time.time()
        since, until = span(request.query, now)
        asked = ReadUsage(turn=self._door.new_turn(now, identity), tenant=identity.tenant, since=since, until=until)
        listing = await self._door.turns.ask(asked, UsageListing, seconds=SECONDS, nobody=NOBODY)
        return web.json_response(told(asked, listing), headers={"Cache-Control": "no-store"})


def span(query: Mapping[str, str], now: float) -> tuple[float, float]:
    """``since`` and ``until`` of *query* in seconds since the epoch, a week up to *now* where they are not said; raises ``BadRequest``."""
    since = moment("since", query.get("since", USUAL), now)
    until = moment("until", query["until"], now) if "until" in query else now
    if since >= until:
        raise BadRequest("since must be before until")
    return since, until


def moment(name: str, text: str, now: float) -> float:
    """The time that *text* means: the beginning of a day (UTC), or so long before *now*; raises ``BadRequest`` that blames *name*."""
    try:
        if _DAY.fullmatch(text.strip()):
            return max(0.0, datetime.combine(date.fromisoformat(text.strip()), clock(), UTC).timestamp())
        return max(0.0, ago(text, now))
    except (ValueError, BadRequest):
        raise BadRequest(f"{name}: {text[:40]!r} is neither a day such as 2026-11-01 nor a time ago such as 15m, 1h or 7d") from None


def told(asked: ReadUsage, listing: UsageListing) -> dict[str, Any]:
    """*listing* for programs, with the sum of all days."""
    since, until = (datetime.fromtimestamp(each, UTC).isoformat(timespec="seconds") for each in (asked.since, asked.until))
    days = [each.model_dump(mode="json") for each in listing.days]
    return {"since": since, "until": until, "days": days, "total": total(listing.days), "waiting": listing.waiting, "more": listing.more}


def total(days: Sequence[UsageDay]) -> dict[str, int]:
    """The sums of *days*."""
    return {name: sum(getattr(each, name) for each in days) for name in ("answers", "prompt_tokens", "completion_tokens")}
