"""``capibara capsule``: a turn as a file, and that file played through the workers of today."""

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capibara_flow import __version__, telemetry
from capibara_flow.cli.dead import PIPE_WIDTH, line
from capibara_flow.domain.capsule import MOST, Capsule, capsule, changes, read, written
from capibara_flow.domain.differences import Difference
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.record import Record
from capibara_flow.domain.routes import Routes
from capibara_flow.errors import BadRequest, CannotStart, TooLarge
from capibara_flow.runtime.connection import connect
from capibara_flow.runtime.history import History
from capibara_flow.settings import ROUTES, Settings, read_fleet, read_routes

__all__ = ["PIPE_WIDTH", "Run", "configured", "export", "notes", "opened", "run", "summary", "table", "told", "write"]


@dataclass(frozen=True)
class Run:
    """What came of playing a capsule: in what it differs, and what could not be done as it was."""

    capsule: Capsule
    played: Record
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        found = [each.as_json() for each in self.differences]
        return {
            "turn": self.capsule.turn,
            "same": not found,
            "differences": found,
            "outcome": self.played.outcome,
            "notes": list(self.notes),
        }


def configured(file: Path) -> tuple[Fleet, Routes | None]:
    """The fleet in *file*, and the routes that it is read by, if it has to be; raises ``SettingsError``."""
    fleet = read_fleet(file)
    if not fleet.policy:
        return fleet, None
    return fleet, read_routes(file.parent / fleet.routes if fleet.routes else ROUTES)


def export(settings: Settings, turn: str, file: Path, *, force: bool) -> Capsule:
    """Write what is kept of *turn* to *file*, unless it is there and we must not *force*.

    Raises ``TurnUnknown``, ``BadRequest``, ``TooLarge``, ``CannotStart`` and ``SettingsError``.
    """
    if os.path.lexists(file) and not force:
        raise BadRequest(f"{file} is there already: --force replaces it")
    fleet, routes = configured(settings.fleet_file)
    record = asyncio.run(_record(settings, turn))
    if (size := sum(len(entry.data) for entry in record.entries)) > MOST // 2:
        raise TooLarge(f"{turn} has {size} bytes, too many for a capsule ({MOST // 2})")
    made = capsule(record, fleet, routes, settings.router.embedder, __version__)
    write(made, file)
    return made


async def _record(settings: Settings, turn: str) -> Record:
    client = await connect(settings, "observer")
    try:
        return await History(client).of(turn)
    finally:
        await client.close()


def write(made: Capsule, file: Path) -> None:
    """Write *made* to *file*, all or nothing, for our eyes only: it holds what people said. Raises ``CannotStart``."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            out.writelines(written(made))
        beside.replace(file)
    except OSError as error:
        raise CannotStart(f"{file}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def opened(file: Path) -> Capsule:
    """The capsule in *file*; raises ``BadRequest``, ``TooLarge`` and ``CannotStart``."""
    try:
        if (size := file.stat().st_size) > MOST:
            raise TooLarge(f"{file}: no capsule: {size} bytes, and {MOST} are the most")
        data = file.read_bytes()
    except OSError as error:
        raise CannotStart(f"{file}: cannot be read: {error.strerror}") from error
    try:
        return read(data)
    except BadRequest as error:
        raise BadRequest(f"{file}: {error}") from error


def run(found: Capsule, fleet_file: Path | None = None) -> Run:
    """Play *found* through the workers of today with its own configuration, or that of *fleet_file*; raises ``CannotStart``."""
    from capibara_flow.wiring.laboratory import Setup, laboratory, own_broker  # noqa: PLC0415  loads workers and engines

    telemetry.configure(level="critical", style="console")
    here = found.configuration
    fleet, routes = configured(fleet_file) if fleet_file else (here.fleet, here.routes)

    async def played(settings: Settings) -> tuple[Record, tuple[str, ...]]:
        async with laboratory(settings, Setup(fleet, routes, here.embedder)) as place:
            return await place.play(found.engines, found.record), tuple(place.notes)

    with own_broker() as settings:
        record, notes = asyncio.run(played(settings))
    return Run(found, record, changes(found.record, record, router=found.engines.stage == "router"), notes)


def told(done: Run) -> Table | str:
    """What differs, or that nothing does."""
    return table(list(done.differences)) if done.differences else "the same: every decision, and every byte that the client got"


def table(found: list[Difference]) -> Table:
    """A row for each difference."""
    shown = Table("where", "what", "before", "now", box=None, pad_edge=False)
    for each in found:
        cells = (each.where, each.what, _shown(each.before), _shown(each.after))
        shown.add_row(*(escape(line(cell)) for cell in cells))
    return shown


def summary(made: Capsule, file: Path) -> str:
    """What is in *file*, in a few words."""
    takes = made.engines.takes
    held = f"{len(made.messages)} messages, {len(takes)} attempts with {sum(len(take.pieces) for take in takes)} pieces"
    return f"{file}: {held}, {file.stat().st_size} bytes; play it with `capibara capsule run {file}`"


def notes(done: Run, console: Console) -> None:
    """Tell what could not be done as it was, on *console*."""
    for each in done.notes:
        console.print(f"[yellow]note:[/] {escape(line(each, 400))}", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return "(nothing)" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
