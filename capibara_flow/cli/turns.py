"""``capibara turns``, ``show``, ``replay`` and ``diff``: what they ask of the broker, and how it is shown."""

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from capibara_flow import wiring
from capibara_flow.cli.dead import PIPE_WIDTH, line, readable
from capibara_flow.domain.differences import Difference, Piece, decisive, worded
from capibara_flow.domain.picture import figures, html, in_words, length, moment, svg
from capibara_flow.domain.record import Record
from capibara_flow.domain.timeline import Stage, Summary, Timeline
from capibara_flow.domain.turns import LENGTH
from capibara_flow.edge.sse import greeting, native
from capibara_flow.edge.turns import Wanted, ago, find
from capibara_flow.errors import BadRequest, TurnGone
from capibara_flow.ports import Batch
from capibara_flow.runtime.history import History
from capibara_flow.settings import Settings
from topics.output import Reset, Token

_BAR = 32  # characters of a bar of time; half of it on a small screen
_CELLS = ("turn", "when", "tenant", "question", "route", "expert", "outcome", "seconds", "tokens")
#: What is left out of a list on a screen of fewer columns.
_SPARED = {150: frozenset({"tenant", "route"}), 110: frozenset({"when", "tokens"}), 84: frozenset({"seconds"}), 66: frozenset({"expert"})}
_WORDS = 10  # characters of a question that are always shown
_EVERY = 1_000_000  # turns: an operator may look at all of them
_STYLES = {
    "door": "bright_black",
    "queue": "bright_black",
    "work": "magenta",
    "attempt": "green",
    "end": "yellow",
    "news": "blue",
    "cancel": "yellow",
    "dead": "red",
}
_MARKS = {"before": ("[-", "-]", "red"), "after": ("{+", "+}", "green"), "same": ("", "", ""), "gap": ("", "", "dim")}


def console() -> Console:
    """Where tables go: no line of them is broken where nobody looks but a pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


# --- reading -------------------------------------------------------------------------------------------------


async def newest(settings: Settings, wanted: Wanted, since: str | None) -> tuple[list[Summary], bool]:
    """The newest turns that are *wanted*, and whether there may be more; raises ``BadRequest`` for a *since* that is no time."""
    begin = 0.0 if since is None else ago(since, time.time())
    async with wiring.connected(settings, "observer") as client:
        history = History(client)
        with Console(stderr=True).status("reading turns"):
            return await find(history.newest(since=begin), history.of, wanted, most_read=_EVERY, most_seen=_EVERY)


async def records(settings: Settings, *turns: str) -> list[Record]:
    """What is kept of *turns*; raises ``TurnUnknown`` for the first of which there is nothing."""
    async with wiring.connected(settings, "observer") as client:
        history = History(client)
        return [await history.of(turn) for turn in turns]


# --- lists ---------------------------------------------------------------------------------------------------


def table(turns: Sequence[Summary], width: int = PIPE_WIDTH) -> Table:
    """A row for each turn; a screen that is not *width* enough has fewer columns, and shorter questions."""
    spared = frozenset[str]().union(*(names for columns, names in _SPARED.items() if width < columns))
    rows = [{name: line(cell) for name, cell in _cells(each, whole=not spared).items() if name not in spared} for each in turns]
    names = [name for name in _CELLS if name not in spared]
    taken = sum(max([len(name), *(len(row[name]) for row in rows)]) + 2 for name in names if name != "question")
    shown = Table(*names, box=None, pad_edge=False)
    for column in shown.columns:
        column.no_wrap = True
        column.justify = "right" if column.header in {"seconds", "tokens"} else "left"
    shown.columns[0].min_width = LENGTH
    for row in rows:
        row["question"] = line(row["question"], max(_WORDS, width - taken))
        shown.add_row(*map(escape, row.values()))
    return shown


def _cells(turn: Summary, *, whole: bool) -> dict[str, str]:
    """The columns of *turn*; its time with year and seconds if there is room for a *whole* row."""
    when = moment(turn.when) if whole else moment(turn.when)[5:16].replace("T", " ")
    told = (turn.question, turn.route, turn.expert, turn.outcome, f"{turn.seconds:.2f}", str(turn.tokens))
    return dict(zip(_CELLS, (turn.turn, when, turn.tenant, *told), strict=True))


def nothing(settings: Settings) -> str:
    """Why no turn is listed."""
    if not settings.log.enabled:
        return "no turns: the log is off (CAPIBARA_LOG__ENABLED); `capibara show TURN` still shows what the output of one tells"
    return f"no turns: they are kept for {settings.log.turn_age_seconds} s"


# --- one turn ------------------------------------------------------------------------------------------------


def page(told: Timeline, width: int = PIPE_WIDTH) -> Group:
    """*told* for a terminal of *width* columns: what it was about, its stages with bars of time, and what is not known."""
    facts = "  ".join(f"[dim]{name}[/] {escape(readable(value))}" for name, value in figures(told).items() if value)
    parts: list[Any] = [f"[bold]{escape(line(told.question))}[/]"] if told.question else []
    parts += [f"[dim]{told.turn}[/]  {facts}", "", _stages(told, _BAR if width >= 3 * _BAR else _BAR // 2)]
    parts += [f"[yellow]note:[/] {escape(readable(each))}" for each in told.missing]
    if told.answer:
        parts += ["", Text(readable(told.answer))]
    return Group(*parts)


def _stages(told: Timeline, room: int) -> Table:
    shown = Table("stage", "from", "took", "", "what came of it", box=None, pad_edge=False)
    for column in shown.columns[1:3]:
        column.justify, column.no_wrap = "right", True
    shown.columns[3].no_wrap = True
    whole = length(told)
    for stage in told.stages:
        took = "…" if stage.lasted is None else f"{stage.lasted:.3f}" if stage.lasted else ""
        details = Text(readable(stage.outcome))
        details.append(("  " if stage.outcome else "") + readable(in_words(stage)), style="dim")
        shown.add_row(Text(line(stage.name, 40)), f"{stage.start:.3f}", took, _bar(stage, whole, room), details)
    return shown


def _bar(stage: Stage, whole: float, room: int) -> Text:
    """Where *stage* is on a line of *whole* seconds and *room* characters: at least one of them, and a diamond for a moment."""
    start = min(room - 1, int(stage.start / whole * room))
    end = room if stage.end is None else max(start + 1, min(room, round(stage.end / whole * room)))
    letters = "◆" if stage.end == stage.start else ("░" if stage.facts.get("told") is False else "█") * (end - start)
    bar = Text(" " * start + letters, style=_STYLES[stage.kind])
    bar.pad_right(room - start - len(letters))
    return bar


def save(told: Timeline, *, picture: Path | None, document: Path | None) -> Iterator[Path]:
    """Write the picture and the page that are wanted; raises ``BadRequest`` where that cannot be."""
    for file, text in ((picture, svg), (document, html)):
        if file is not None:
            try:
                file.write_text(text(told), encoding="utf-8")
            except OSError as error:
                raise BadRequest(f"{file} cannot be written: {error.strerror}") from error
            yield file


# --- once more -----------------------------------------------------------------------------------------------


def speed(text: str) -> float:
    """How many times as fast as it was: a number above 0, or ``max``; raises ``BadRequest``."""
    if text == "max":
        return math.inf
    try:
        given = float(text)
    except ValueError:
        given = 0.0
    if not 0 < given < math.inf:
        raise BadRequest(f"--speed {text[:20]!r}: give a number above 0 (1: as it was, 2: twice as fast), or max")
    return given


def as_events(record: Record) -> Iterator[tuple[float, bytes]]:
    """The event stream that who opened the turn got, with the time (seconds since the epoch) of each piece; raises ``TurnGone``."""
    entries = _output(record)
    yield record.began, greeting(record.turn, record.principal)
    for entry in entries:
        yield entry.when, native(Batch(entry.sequence, tuple(entry.data.split(b"\n")), final=False))


def as_text(record: Record) -> Iterator[tuple[float, bytes]]:
    """The words alone: where the answer began anew, a line says so. Raises ``TurnGone``."""
    _output(record)
    for entry, output in record.said():
        match output:
            case Token(text=text) if text:
                yield entry.when, text.encode(errors="replace")
            case Reset(reason=reason):
                yield entry.when, f"\n--- {reason} ---\n".encode(errors="replace")
    yield record.entries[-1].when, b"\n"


def _output(record: Record) -> Sequence[Any]:
    entries = record.branch()
    if not entries:
        raise TurnGone(f"no output of {record.turn} is kept: `capibara show {record.turn}` tells what is")
    return entries


async def paced(pieces: Iterator[tuple[float, bytes]], times: float, sleep: Callable[[float], Any] = asyncio.sleep) -> AsyncIterator[bytes]:
    """*pieces* with the pauses between them, *times* as fast."""
    before: float | None = None
    for when, piece in pieces:
        if before is not None and (pause := (when - before) / times) > 0:
            await sleep(pause)
        before = when
        yield piece


async def play(record: Record, *, times: float, text: bool) -> None:
    """Write the output of *record* to standard output once more; raises ``TurnGone``."""
    screen = sys.stdout.isatty()
    async for piece in paced(as_text(record) if text else as_events(record), times):
        shown = readable(piece.decode(errors="replace")).encode() if screen else piece
        sys.stdout.buffer.write(shown)
        sys.stdout.buffer.flush()
    if record.end is None:
        Console(stderr=True).print("[dim]this is all that is kept so far: the turn has no end yet[/]")


def no_reader() -> None:
    """Nobody reads on: what is left in the buffer has nowhere to go, and Python would complain about that at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- two turns -----------------------------------------------------------------------------------------------


def compared(one: Record, other: Record, found: Sequence[Difference]) -> dict[str, Any]:
    """What two turns differ in, for programs."""
    told: dict[str, Any] = {"turns": [one.turn, other.turn], "decisions_differ": decisive(tuple(found))}
    told["differences"] = [each.as_json() for each in found]
    for each in found:
        if each.where == "text" and isinstance(each.before, str) and isinstance(each.after, str):
            told[each.what] = [{"how": piece.how, "text": piece.text} for piece in worded(each.before, each.after)]
    return told


def differing(found: Sequence[Difference]) -> Iterator[Text]:
    """What two turns differ in, line by line, stage by stage."""
    before = ""
    for each in found:
        if each.where != before:
            before = each.where
            yield Text(each.where + (" (a decision)" if each.decides else ""), style="bold")
        told = Text(f"  {readable(each.what)}: ")
        if each.where == "text":
            yield told.append_text(_words(worded(str(each.before or ""), str(each.after or ""))))
        else:
            yield told.append(_value(each.before), style="red").append(" → ").append(_value(each.after), style="green")


def _words(pieces: Sequence[Piece]) -> Text:
    """*pieces* with marks that need no colours: ``[-before-]`` and ``{+after+}``."""
    shown = Text()
    for piece in pieces:
        opens, closes, style = _MARKS[piece.how]
        shown.append(opens + ("… " if piece.how == "gap" else readable(piece.text)) + closes, style=style)
    return shown


def _value(value: Any) -> str:
    if value is None:
        return "(not there)"
    return line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
