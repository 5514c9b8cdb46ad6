"""``capibara usage``: what experts did for tenants, day by day."""

import time

from rich.markup import escape
from rich.table import Table

from capibara_flow import wiring
from capibara_flow.cli.dead import line
from capibara_flow.edge.usage import NOBODY, SECONDS, span, total
from capibara_flow.runtime.dead import new_turn
from capibara_flow.runtime.requests import replied
from capibara_flow.settings import Settings
from topics.usage import ReadUsage, UsageListing

_COUNTS = ("answers", "prompt_tokens", "completion_tokens")


async def read(settings: Settings, since: str, until: str | None, tenant: str | None) -> tuple[ReadUsage, UsageListing]:
    """What was asked, and the usage of *tenant*, or of all; raises ``BadRequest``, ``BrokerUnavailable``, and what an accountant tells."""
    begin, end = span({"since": since} | ({} if until is None else {"until": until}), time.time())
    asked = ReadUsage(turn=new_turn(tenant or ""), tenant=tenant, since=begin, until=end)
    why = wiring.uncounted(settings)
    async with wiring.connected(settings, "provisioner") as client:
        listing = await replied(client, asked, UsageListing, seconds=SECONDS, nobody=f"{NOBODY}{why and f'; as it is set here, {why}'}")
    return asked, listing


def table(listing: UsageListing) -> Table:
    """*listing* for people, the sums last."""
    sums = total(listing.days)
    shown = Table("day", "tenant", "expert", box=None, pad_edge=False, show_footer=True)
    shown.columns[0].footer = "all"
    for name in _COUNTS:
        shown.add_column(name.replace("_", " "), footer=f"{sums[name]:,}", justify="right", no_wrap=True)
    for each in listing.days:
        counts = (f"{getattr(each, name):,}" for name in _COUNTS)
        shown.add_row(each.day.isoformat(), escape(line(each.tenant)), escape(line(each.expert)), *counts)
    return shown


def notes(listing: UsageListing) -> list[str]:
    """What is not in the figures."""
    waiting = [f"{listing.waiting} calls are not written down yet: ask again"] * bool(listing.waiting)
    return waiting + ["there is more than one answer holds: ask for a shorter time, or for one --tenant"] * listing.more
