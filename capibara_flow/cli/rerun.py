"""``capibara rerun``: recorded turns as a test of another configuration."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from capibara_flow import telemetry
from capibara_flow.cli.capsules import configured
from capibara_flow.cli.dead import PIPE_WIDTH, line
from capibara_flow.domain.capsule import changes
from capibara_flow.domain.differences import Difference
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.record import Record
from capibara_flow.domain.recording import recorded
from capibara_flow.edge.turns import ago
from capibara_flow.errors import BadRequest, TurnUnknown
from capibara_flow.runtime.connection import connect
from capibara_flow.runtime.history import History
from capibara_flow.settings import Settings
from capibara_flow.wiring.laboratory import Laboratory, Setup, laboratory, own_broker

__all__ = ["PIPE_WIDTH", "STAGES", "Changed", "Rerun", "rerun", "stages", "table", "told"]

STAGES = ("router", "retriever", "caller")
_WORDS = 60  # characters of a question in the table


@dataclass(frozen=True)
class Changed:
    """A turn that would go otherwise now."""

    turn: str
    question: str
    differences: tuple[Difference, ...]


@dataclass
class Rerun:
    """How many turns were played, which would go otherwise, which could not be played (and why), and what else is to be known."""

    played: int = 0
    changed: list[Changed] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """How many of the turns go as they went, 0 to 1."""
        return 1 - len(self.changed) / self.played if self.played else 1.0

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        rows = [
            {"turn": each.turn, "question": each.question, "differences": [found.as_json() for found in each.differences]}
            for each in self.changed
        ]
        share = self.share if self.played else None
        return {"played": self.played, "same": share, "changed": rows, "skipped": self.skipped, "notes": list(self.notes)}


def stages(text: str) -> frozenset[str]:
    """The stages named in *text*, between commas; raises ``BadRequest`` for one that cannot be played."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if unknown := sorted(names - set(STAGES)):
        raise BadRequest(f"--only {', '.join(unknown)}: no stage that can be played alone; there are: {', '.join(STAGES)}")
    return names or frozenset(STAGES)


def rerun(settings: Settings, since: str, console: Console, *, fleet_file: Path | None, only: frozenset[str], limit: int | None) -> Rerun:
    """Play the turns of the time *since* with the fleet in *fleet_file*, or the one of *settings*; *console* shows how far that is.

    At most *limit* turns are played, the newest, and of each the stages that are in *only*.
    """
    telemetry.configure(level="critical", style="console")
    begin = ago(since, time.time())
    fleet, routes = configured(fleet_file or settings.fleet_file)
    with console.status("reading turns"):
        records, skipped = asyncio.run(_records(settings, begin, limit, fleet))
    if not records:
        return Rerun(skipped=skipped)
    with own_broker() as own:
        done = asyncio.run(_played(own, records, Setup(fleet, routes, settings.router.embedder), only, console))
    done.skipped = skipped
    return done


async def _records(settings: Settings, since: float, limit: int | None, fleet: Fleet) -> tuple[list[Record], dict[str, str]]:
    """The newest turns that can be played, at most *limit*, and why others cannot."""
    found: list[Record] = []
    skipped: dict[str, str] = {}
    client = await connect(settings, "observer")
    try:
        history = History(client)
        async for entry in history.newest(since=since):
            if limit is not None and len(found) >= limit:
                break
            try:
                record = await history.of(entry.turn)
                recorded(record, fleet)
                found.append(record)
            except (BadRequest, TurnUnknown) as error:
                skipped[entry.turn] = str(error)
    finally:
        await client.close()
    return found[::-1], skipped


async def _played(settings: Settings, records: Sequence[Record], setup: Setup, only: frozenset[str], console: Console) -> Rerun:
    done = Rerun()
    # What a retriever is asked comes from the router.
    wanted = {"router": bool(only & {"router", "retriever"}), "retriever": "retriever" in only, "caller": "caller" in only}
    async with laboratory(settings, setup, **wanted) as place, _bar(console, len(records)) as bar:

        async def one(record: Record) -> None:
            await _one(place, record, setup.fleet, only, done)
            bar.advance(bar.task_ids[0])

        await asyncio.gather(*map(one, records))
        done.notes = tuple(place.notes)
    order = [record.turn for record in records]
    done.changed.sort(key=lambda each: order.index(each.turn))
    return done


async def _one(place: Laboratory, record: Record, fleet: Fleet, only: frozenset[str], done: Rerun) -> None:
    recording = recorded(record, fleet)
    again = await place.play(recording, record)
    whole = recording.stage == "router"
    wanted = {"router": whole and "router" in only, "retriever": whole and "retriever" in only, "caller": "caller" in only}
    found = changes(record, again, **wanted)
    done.played += 1
    if found:
        done.changed.append(Changed(record.turn, record.asked.request.question if record.asked else "", found))


@asynccontextmanager
async def _bar(console: Console, total: int) -> AsyncIterator[Progress]:
    columns = (TextColumn("playing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task("turns", total=total)
        yield bar


def table(done: Rerun) -> Table:
    """A row for everything that differs; of several in one turn those come first that others follow from."""
    shown = Table("turn", "question", "where", "before", "now", box=None, pad_edge=False)
    shown.columns[0].no_wrap = True
    for each in done.changed:
        decisive = [found for found in each.differences if found.decides]
        for number, found in enumerate(decisive or each.differences):
            who = (each.turn, line(each.question, _WORDS)) if number == 0 else ("", "")
            cells = (*who, f"{found.where}.{found.what}", _shown(found.before), _shown(found.after))
            shown.add_row(*(escape(line(cell)) for cell in cells))
    return shown


def told(done: Rerun) -> str:
    """How much is the same, in a line."""
    if not done.played:
        why = f"{len(done.skipped)} turns could not be (--json tells why)" if done.skipped else "no turn of that time is kept"
        return f"nothing was played: {why}"
    words = f"{done.played} turns played, {len(done.changed)} changed: {100 * done.share:.4g} % the same"
    return words + (f"; {len(done.skipped)} could not be played (--json tells why)" if done.skipped else "")


def _shown(value: Any) -> str:
    return "(nothing)" if value is None else str(value)
