"""``capibara rerun``: recorded turns as a test of another configuration."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
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
from capibara_flow.domain.differences import Difference, called
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.forking import STAGES
from capibara_flow.domain.record import Record
from capibara_flow.domain.recording import recorded
from capibara_flow.domain.turns import ANONYMOUS
from capibara_flow.edge.turns import ago
from capibara_flow.errors import BadRequest, TurnUnknown
from capibara_flow.runtime.connection import connect
from capibara_flow.runtime.dead import new_turn
from capibara_flow.runtime.history import History
from capibara_flow.runtime.requests import replied
from capibara_flow.settings import Settings
from capibara_flow.wiring.knowledge import written
from capibara_flow.wiring.laboratory import Laboratory, Setup, Shelves, laboratory, own_broker
from topics.grounding import Found, SearchKnowledge
from topics.knowledge import Scope, Source

__all__ = ["PIPE_WIDTH", "Changed", "Rerun", "rerun", "stages", "table", "told"]

_WORDS = 60  # characters of a question in the table
_SEARCH_SECONDS = 30.0  # until an answer to a search is given up; the first may have to open the stores
_NOBODY = "--search: nobody is there who can search: start a retriever"


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


def rerun(
    settings: Settings,
    since: str,
    console: Console,
    *,
    fleet_file: Path | None,
    only: frozenset[str],
    limit: int | None,
    search: bool = False,
) -> Rerun:
    """Play the turns of the time *since* with the fleet in *fleet_file*, or the one of *settings*; *console* shows how far that is.

    At most *limit* turns are played, the newest, and of each the stages that are in *only*. With *search* sources are looked for anew where
    *settings* lead to, which says nothing of an answer that rested on others. Raises ``BadRequest`` and ``BrokerUnavailable``.
    """
    if search and "caller" in only:
        raise BadRequest("--search: recorded answers say nothing about other sources: give --only router,retriever as well")
    if search and "retriever" not in only:
        raise BadRequest("--search: sources are the retriever's: give --only router,retriever as well")
    telemetry.configure(level="critical", style="console")
    begin = ago(since, time.time())
    fleet, routes = configured(fleet_file or settings.fleet_file)
    with console.status("reading turns"):
        records, skipped = asyncio.run(_records(settings, begin, limit, fleet, called_only=only == {"caller"}))
    if not records:
        return Rerun(skipped=skipped)
    with own_broker() as own:
        setup = Setup(fleet, routes, settings.router.embedder)
        done = asyncio.run(_played(own, records, setup, only, console, searched=settings if search else None))
    done.skipped = skipped
    return done


async def _records(
    settings: Settings, since: float, limit: int | None, fleet: Fleet, *, called_only: bool
) -> tuple[list[Record], dict[str, str]]:
    """The newest turns that can be played, at most *limit*, and why others cannot; if so, those alone in which an expert was called."""
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
                _check(record, fleet, called_only=called_only)
                found.append(record)
            except (BadRequest, TurnUnknown) as error:
                skipped[entry.turn] = str(error)
    finally:
        await client.close()
    return found[::-1], skipped


def _check(record: Record, fleet: Fleet, *, called_only: bool) -> None:
    """Raise ``BadRequest`` unless *record* can be played; where only calls are, it needs one."""
    recorded(record, fleet)
    if called_only and not called(record):
        raise BadRequest(f"{record.turn} never came to an expert")


async def _played(
    own: Settings, records: Sequence[Record], setup: Setup, only: frozenset[str], console: Console, *, searched: Settings | None
) -> Rerun:
    """Play *records* on the broker of *own*; sources are looked for where *searched* leads to, if that is wanted."""
    done = Rerun()
    # What a retriever is asked comes from the router.
    wanted = {"router": bool(only & {"router", "retriever"}), "retriever": "retriever" in only, "caller": "caller" in only}
    async with AsyncExitStack() as stack:
        shelves = await stack.enter_async_context(_shelves(searched)) if searched else None
        place = await stack.enter_async_context(laboratory(own, setup, **wanted, shelves=shelves))
        bar = await stack.enter_async_context(_bar(console, len(records)))

        async def one(record: Record) -> None:
            await _one(place, record, setup.fleet, only, done)
            bar.advance(bar.task_ids[0])

        await asyncio.gather(*map(one, records))
        done.notes = tuple(place.notes)
    order = [record.turn for record in records]
    done.changed.sort(key=lambda each: order.index(each.turn))
    return done


@asynccontextmanager
async def _shelves(settings: Settings) -> AsyncIterator[Shelves]:
    """The documents of the installation of *settings*, which its retriever searches as it is configured now."""
    client = await connect(settings, "provisioner")

    async def search(scope: Scope, query: str, limit: int) -> Sequence[Source]:
        asked = SearchKnowledge(turn=new_turn(scope.tenant), tenant=scope.tenant, collection=scope.collection, query=query, limit=limit)
        return (await replied(client, asked, Found, seconds=_SEARCH_SECONDS, nobody=_NOBODY)).sources

    try:
        await search(Scope(ANONYMOUS), "?", 1)  # one who cannot search would seem to find nothing
        yield Shelves(search, partial(written, settings.knowledge), settings.knowledge.sources)
    finally:
        await client.close()


async def _one(place: Laboratory, record: Record, fleet: Fleet, only: frozenset[str], done: Rerun) -> None:
    recording = recorded(record, fleet)
    again = await place.play(recording, record)
    # A fork has nothing to say of the stages that it left out.
    played = STAGES[STAGES.index(recording.stage) :]
    wanted = {stage: stage in only and stage in played for stage in STAGES}
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
