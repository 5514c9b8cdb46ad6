"""``capibara queue``: who waits for which expert, and for how long."""

from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from capibara_flow import wiring
from capibara_flow.cli.dead import line
from capibara_flow.errors import UnknownExpert
from capibara_flow.runtime.standing import Standing, standings
from capibara_flow.settings import Settings
from topics.streams import subject_token


async def queue(settings: Settings, expert: str | None) -> list[Standing]:
    """How the queue of *expert* stands, or every one; raises ``UnknownExpert`` when nobody serves or waits for it."""
    async with wiring.connected(settings, "observer") as client:
        found = await standings(client, settings.worker.tenant_weights, "*" if expert is None else subject_token(expert))
    if expert is not None and not found:
        raise UnknownExpert(f"nobody has asked for {expert} of late; `capibara queue` without --expert shows who is asked for")
    return found


def rows(found: list[Standing]) -> list[dict[str, Any]]:
    """*found* for programs."""
    return [asdict(each) for each in found]


def table(found: list[Standing]) -> Table:
    """*found* for people."""
    shown = Table("expert", "tenant", box=None, pad_edge=False)
    for column in ("waiting", "at work", "oldest (s)", "served a minute", "would wait (s)"):
        shown.add_column(column, justify="right")
    for each in found:
        oldest, eta = ("" if value is None else f"{value:g}" for value in (each.oldest_s, each.eta_s))
        counts = (str(each.waiting), str(each.at_work), oldest, f"{each.served_a_minute:g}", eta)
        shown.add_row(escape(line(each.expert)), escape(line(each.tenant)), *counts)
    return shown
