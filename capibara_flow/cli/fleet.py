"""``capibara fleet``: are the engines of a fleet there, and what do the processes that use them say?"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from capibara_flow import settings as configuration
from capibara_flow import telemetry
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.toml_lines import line_of
from capibara_flow.engines.pinging import Ping, ping_all
from capibara_flow.engines.templates import template
from capibara_flow.settings import Settings, SettingsError

#: Columns where nobody looks: what reads a pipe cuts its lines itself.
PIPE_WIDTH = 240
_COLOURS = {
    "live": "green",
    "busy": "yellow",
    "down": "red",
    "lazy": "cyan",
    "loaded": "green",
    "closed": "green",
    "half_open": "yellow",
    "open": "red",
}


def chosen(file: Path | None) -> Path:
    """The fleet that is meant: *file*, or the one of the settings; raises ``SettingsError``."""
    found = file or configuration.load().fleet.file
    if found is None:
        raise SettingsError("no fleet: name a file, or set CAPIBARA_FLEET__FILE")
    return found


def read(path: Path) -> Fleet:
    """The fleet at *path*, of which every engine could be built; raises ``SettingsError`` with file, line, key and reason."""
    fleet = configuration.read_fleet(path)
    for number, expert in enumerate(fleet.experts):
        try:
            template(expert.template)
        except SettingsError as error:
            line = line_of(path.read_text(encoding="utf-8"), ("experts", number, "template"))
            raise SettingsError(f"{path}:{line}: experts.{number}.template: {error}") from error
    return fleet


def pinged(fleet: Fleet, console: Console) -> list[Ping]:
    """Look at every engine of *fleet*; on a terminal *console* shows how far that is. Faults are among the findings, not in the log."""
    telemetry.configure(level="critical", style="console")
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("engines", total=sum(len(expert.urls) for expert in fleet.experts))
        return asyncio.run(ping_all(fleet.experts, lambda _: progress.advance(task)))


def row(found: Ping) -> dict[str, Any]:
    """*found* for programs."""
    known = {"expert": found.expert, "active": found.active, "url": found.url, "state": found.state}
    return known | {"latency_ms": found.milliseconds, "knows_model": found.knows, "models": list(found.models), "detail": found.detail}


def table(found: Sequence[Ping]) -> Table:
    """*found* for people."""
    url = Column("url", overflow="fold")
    drawn = Table("expert", url, "state", "latency", "model", "", box=None, pad_edge=False)
    for each in found:
        latency = f"{each.milliseconds:g} ms" if each.milliseconds is not None else ""
        cells = (_coloured(each.state), latency, escape(_model(each)), escape(each.detail))
        drawn.add_row(escape(each.expert), escape(each.url or ""), *cells, style="" if each.active else "dim")
    return drawn


def _coloured(state: str) -> str:
    return f"[{_COLOURS.get(state, 'white')}]{escape(state)}[/]"


def _model(found: Ping) -> str:
    own = ", ".join(found.models[:3]) + (", ..." if len(found.models) > 3 else "")
    match found.knows:
        case True:
            return "known"
        case False:
            return f"unknown there: it has {own}"
    return f"serves {own}" if own else ""


async def reports(settings: Settings) -> list[dict[str, Any]]:
    """What all processes tell of themselves now; raises ``BrokerUnavailable``."""
    from capibara_flow import wiring  # noqa: PLC0415  loads every engine
    from capibara_flow.runtime.reports import read_reports  # noqa: PLC0415  as above

    async with wiring.connected(settings, "observer") as client:
        return await read_reports(client)


def status(told: Sequence[Mapping[str, Any]], now: float | None = None) -> Table:
    """What processes tell, for people: a line for each engine that one of them uses."""
    drawn = Table("worker", "process", "told", "expert", "replica", "state", "streams", "last fault", box=None, pad_edge=False)
    for each in told:
        age = max(0.0, (time.time() if now is None else now) - float(each.get("at", 0)))
        who = (escape(str(each.get("worker"))), escape(str(each.get("process"))), f"{age:.0f} s ago")
        for number, cells in enumerate(_engines(each) or [("",) * 5]):
            drawn.add_row(*(who if number == 0 else ("", "", "")), *cells)
    return drawn


def _engines(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    facts = _tables_of(report, "facts")
    served = [cells for name, expert in _tables(facts, "experts") for cells in _replicas(name, expert)]
    return served + [_hosted(name, expert) for name, expert in _tables(_tables_of(facts, "host"), "experts")]


def _hosted(name: str, expert: Mapping[str, Any]) -> tuple[str, ...]:
    """An expert that a host loads when it is asked for."""
    phase = str(expert.get("phase"))
    return (escape(name), "hosted", _coloured(phase), str(expert.get("streams")), escape(str(expert.get("blocked") or "")))


def _replicas(name: str, expert: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for replica in expert.get("replicas") or ():
        known = (str(replica.get("replica")), _coloured(str(replica.get("state"))), str(replica.get("streams")))
        yield (escape(name), *known, escape(str(replica.get("last_fault") or "")))


def _tables_of(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = report.get(key)
    return found if isinstance(found, Mapping) else {}


def _tables(report: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, each) for name, each in _tables_of(report, key).items() if isinstance(each, Mapping)]
