"""What is measured: each scenario is a load and the figures that are read off it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from .load import Plan, Report
from .system import CAPIBARA, ROOT, STRAIGHT, System

#: Work that goes on behind an answer (acknowledgements, log) still belongs to the load.
_SETTLE_SECONDS = 0.2


class Figure(NamedTuple):
    """What a number is: of which *scenario* and *system*, what, and in which unit."""

    scenario: str
    system: str
    metric: str
    unit: str


@dataclass(frozen=True)
class Run:
    """A load that was put on a system: CPU seconds and MB by role, when the system's processes are known."""

    report: Report
    cpu: dict[str, float] | None = None
    rss: dict[str, float] | None = None


Values = Iterator[tuple[str, str, float]]


@dataclass(frozen=True)
class Scenario:
    """A load (whose URL is still to be filled in), and how to read *figures* (metric, unit, value) off a run."""

    name: str
    about: str
    plan: Plan
    figures: Callable[[Run], Values]

    def quick(self) -> "Scenario":
        """The same with a quarter of the requests: to see that it works, not to cite."""
        return replace(self, plan=replace(self.plan, requests=max(self.plan.requests // 4, 1)))


def _low(run: Run) -> Values:
    yield "first_token_p50", "ms", run.report.first_token_ms["p50"]
    yield "first_token_p99", "ms", run.report.first_token_ms["p99"]


def _paced(run: Run) -> Values:
    yield from _cpu(run, "cpu_per_token", "us", 1e6 / run.report.tokens)
    yield "token_delay_p50", "ms", run.report.token_delay_ms["p50"]
    yield "token_delay_p95", "ms", run.report.token_delay_ms["p95"]
    yield "first_token_p50", "ms", run.report.first_token_ms["p50"]


def _json(run: Run) -> Values:
    yield from _cpu(run, "cpu_per_request", "ms", 1e3 / run.report.requests)
    yield "requests_per_second", "1/s", run.report.requests / run.report.seconds
    yield "request_p50", "ms", run.report.request_ms["p50"]


def _burst(run: Run) -> Values:
    yield from _cpu(run, "cpu_per_token", "us", 1e6 / run.report.tokens)
    yield "tokens_per_second", "1/s", run.report.tokens / run.report.seconds
    yield "request_p50", "ms", run.report.request_ms["p50"]


def _rss(run: Run) -> Values:
    for role, megabytes in sorted((run.rss or {}).items()):
        yield f"rss/{role}", "MB", megabytes
    if run.rss:
        yield "rss", "MB", sum(run.rss.values())


def _cpu(run: Run, metric: str, unit: str, scale: float) -> Values:
    for role, seconds in sorted((run.cpu or {}).items()):
        yield f"{metric}/{role}", unit, seconds * scale
    if run.cpu:
        yield metric, unit, sum(run.cpu.values()) * scale


SCENARIOS = (
    Scenario("low", "1 client, 32 tokens at 50 a second", Plan("", 1, 40, 32, 20, warmup=3), _low),
    Scenario("paced", "50 streams, 128 tokens at 50 a second", Plan("", 50, 2, 128, 20, spread_ms=210), _paced),
    Scenario("stepped", "the same, all tokens of an engine's step together", Plan("", 50, 2, 128, 20, spread_ms=210, in_step=True), _paced),
    Scenario("json", "16 clients, 16 tokens in one piece", Plan("", 16, 40, 16, stream=False), _json),
    Scenario("burst", "16 clients, 128 tokens without a gap", Plan("", 16, 20, 128), _burst),
    # Last: what it weighs after all the others.
    Scenario("rss", "memory after the load", Plan("", 16, 4, 128), _rss),
)


def run(scenario: Scenario, system: System, model: str = "auto", key: str = "") -> Run:
    """Put the load on, from a process of its own, and measure from the end of its warm-up to the end of its last answer."""
    plan = replace(scenario.plan, url=system.url, model=model, key=key)
    with subprocess.Popen(_command(plan), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdin is not None
        assert load.stdout is not None
        load.stdout.readline()
        before = system.tree.cpu() if system.tree else {}
        load.stdin.write("\n")
        load.stdin.flush()
        report = Report(**orjson.loads(load.stdout.readline()))
    if system.tree is None:
        return Run(report)
    time.sleep(_SETTLE_SECONDS)
    cpu = {role: seconds - before.get(role, 0) for role, seconds in system.tree.cpu().items()}
    return Run(report, cpu, system.tree.rss())


def _command(plan: Plan) -> list[str]:
    options: dict[str, Any] = {name: value for name, value in vars(plan).items() if name not in {"stream", "in_step"} and value != ""}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--hold", *([] if plan.stream else ["--whole"]), *(["--in-step"] if plan.in_step else [])]
    return [sys.executable, "-m", "tests.bench.load", *words, *flags]


def compare(values: dict[Figure, float]) -> dict[Figure, float]:
    """What a system adds to the engine's own time to the first token; *values* are those of one round."""
    straight = values.get(Figure("low", STRAIGHT, "first_token_p50", "ms"))
    if straight is None:
        return {}
    return {
        figure._replace(metric=f"added_{figure.metric}"): value - straight
        for figure, value in values.items()
        if figure.scenario == "low" and figure.system != STRAIGHT
    }


#: The first milestone's bars: never more than this.
BARS = {
    Figure("paced", CAPIBARA, "cpu_per_token", "us"): 130.0,
    Figure("low", CAPIBARA, "added_first_token_p50", "ms"): 6.0,
    Figure("rss", CAPIBARA, "rss", "MB"): 250.0,
}
