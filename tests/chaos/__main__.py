"""Kill, stop and restart real processes while clients count every character: ``python -m tests.chaos`` (``make chaos``).

Prints a table and appends it to figures.csv; exits with 1 when a bar is broken, with 2 when the processes did not start.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from capibara_flow.errors import CannotStart
from tests.chaos import report
from tests.chaos.client import connections
from tests.chaos.faults import FAULTS, USUAL
from tests.chaos.installation import Installation
from tests.chaos.phases import Chaos
from tests.chaos.plan import Pattern
from tests.chaos.report import Row


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; the environment says what it does not."""
    given, usual = os.environ.get, Pattern()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--turns", type=int, default=given("CHAOS_TURNS") or usual.turns, help="over all faults ($CHAOS_TURNS)")
    parser.add_argument("--seed", type=int, default=given("CHAOS_SEED") or random.randrange(10**6), help="($CHAOS_SEED)")
    parser.add_argument(
        "--faults", type=_faults, default=given("CHAOS_FAULTS") or ",".join(USUAL), help=f"some of {', '.join(FAULTS)} ($CHAOS_FAULTS)"
    )
    parser.add_argument("--ack-wait", type=float, default=given("CAPIBARA_WORKER__ACK_WAIT_SECONDS") or usual.ack_wait, help="seconds")
    parser.add_argument("--at-once", type=int, default=usual.at_once, help="turns together, at most")
    parser.add_argument("--home", type=Path, help="where logs and data stay afterwards (a new folder)")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help=f"append to {report.FIGURES.name}")
    return parser.parse_args(words)


def _faults(words: str) -> tuple[str, ...]:
    names = tuple(word.strip() for word in words.split(",") if word.strip())
    if not names or not set(names) <= set(FAULTS):
        raise argparse.ArgumentTypeError(f"{words!r}: one or more of {', '.join(FAULTS)}")
    return names


async def run(pattern: Pattern, faults: tuple[str, ...], home: Path, console: Console) -> list[Row]:
    """All phases, one after the other; raises ``CannotStart``."""
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, _interrupt, asyncio.current_task())
    rows = []
    async with connections() as session, Installation(home, pattern, session) as installation:
        chaos = Chaos(installation)
        for place, name in enumerate(faults):
            turns = pattern.turns // len(faults) + (place < pattern.turns % len(faults))
            console.print(f"[dim]{name}: {FAULTS[name].about}[/]", highlight=False)
            rows.append(await chaos.phase(name, max(1, turns)))
    return rows


def _interrupt(task: asyncio.Task[object] | None) -> None:
    if task:
        task.cancel()


def main() -> int:
    """Run as a program."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else 140)
    pattern = Pattern(turns=options.turns, seed=options.seed, ack_wait=options.ack_wait, at_once=options.at_once)
    busy = psutil.cpu_percent(interval=1.0)
    try:
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as passing:
            rows = uvloop.run(run(pattern, options.faults, (options.home or Path(passing)).absolute(), console))
    except CannotStart as error:
        console.print(error, style="red", markup=False)
        return 2
    except asyncio.CancelledError:
        console.print("interrupted: every process was ended", style="yellow")
        return 130
    console.print(report.table(rows, pattern))
    for note in (note for row in rows for note in row.notes):
        console.print(note, style="yellow", markup=False, highlight=False)
    failures = list(report.broken(rows, pattern.ack_wait, timed=True))
    for each in failures:
        console.print(f"broken: {each}", style="red", markup=False, highlight=False)
    if options.record:
        report.record(rows, pattern, busy)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
