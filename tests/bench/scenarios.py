"""What is measured most often: each scenario is a load and the figures that are read off it.

Those with a course of their own are in ``courses``, ``page`` and ``floor``.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple, Protocol, Self

import orjson

from .load import Plan, Report
from .system import CAPIBARA, ROOT, STRAIGHT, System

#: Work that goes on behind an answer (acknowledgements, log) still belongs to the load.
_SETTLE_SECONDS = 0.2
#: What a Capibara consists of without the supervisor of ``capibara up``.
_SERVING = ("edge", "workers", "together", "broker")
CPU = "cpu_per_token"


class Figure(NamedTuple):
    """What a number is: of which *scenario* and *system*, what, and in which unit."""

    scenario: str
    system: str
    metric: str
    unit: str


Value = tuple[str, str, float]
Values = Iterator[Value]


@dataclass(frozen=True)
class Run:
    """A load that was put on a system: CPU seconds and MB by role, when the system's processes are known."""

    report: Report
    cpu: dict[str, float] | None = None
    rss: dict[str, float] | None = None


@dataclass(frozen=True)
class Measured:
    """What came out: *values* (metric, unit, value), and every wrong answer."""

    values: Sequence[Value]
    errors: Sequence[str] = ()


class Measurable(Protocol):
    """A scenario. One that is not *usual* is run only when it is asked for; *clients* is the most that it has at a time."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def usual(self) -> bool: ...

    @property
    def clients(self) -> int: ...

    @property
    def whose(self) -> str | None:
        """Whose figures they are when they are no system's; then it is run once a round, in front of the bare engine."""

    def fits(self, system: System) -> bool:
        """Whether *system* can do it."""
        ...

    def quick(self) -> Self:
        """The same in small: to see that it works, not to cite."""
        ...

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """Put the load on *system*, which is in front of *engine*, or is it."""
        ...


@dataclass(frozen=True)
class Course:
    """What most scenarios have in common."""

    name: str
    about: str
    usual: bool = field(default=True, kw_only=True)
    whose: str | None = field(default=None, kw_only=True)

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return 1

    def fits(self, system: System) -> bool:
        """Whether *system* can do it: all can."""
        return True


@dataclass(frozen=True)
class Scenario(Course):
    """A load (whose URL is still to be filled in), and how to read *figures* (metric, unit, value) off a run."""

    plan: Plan
    figures: Callable[[Run], Values]

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return self.plan.clients

    def quick(self) -> "Scenario":
        """The same with a quarter of the requests: to see that it works, not to cite."""
        return replace(self, plan=replace(self.plan, requests=max(self.plan.requests // 4, 1)))

    def measure(self, system: System, engine: System, key: str = "") -> Measured:
        """Put the load on, and read the figures."""
        (run,) = runs(self.plan, system, key)
        return Measured(list(self.figures(run)) if run.report.tokens else [], run.report.errors)


def _low(run: Run) -> Values:
    yield "first_token_p50", "ms", run.report.first_token_ms["p50"]
    yield "first_token_p99", "ms", run.report.first_token_ms["p99"]


def _paced(run: Run) -> Values:
    yield from cpu(run, CPU, "us", 1e6 / run.report.tokens)
    yield "token_delay_p50", "ms", run.report.token_delay_ms["p50"]
    yield "token_delay_p95", "ms", run.report.token_delay_ms["p95"]
    yield "first_token_p50", "ms", run.report.first_token_ms["p50"]


def _json(run: Run) -> Values:
    yield from cpu(run, "cpu_per_request", "ms", 1e3 / run.report.requests)
    yield "requests_per_second", "1/s", run.report.requests / run.report.seconds
    yield "request_p50", "ms", run.report.request_ms["p50"]


def _burst(run: Run) -> Values:
    yield from cpu(run, CPU, "us", 1e6 / run.report.tokens)
    yield "tokens_per_second", "1/s", run.report.tokens / run.report.seconds
    yield "request_p50", "ms", run.report.request_ms["p50"]


def _rss(run: Run) -> Values:
    for role, megabytes in sorted((run.rss or {}).items()):
        yield f"rss/{role}", "MB", megabytes
    if run.rss:
        yield "rss", "MB", sum(run.rss.values())
    if serving := sum((run.rss or {}).get(role, 0) for role in _SERVING):
        yield "rss_serving", "MB", serving


def cpu(run: Run, metric: str, unit: str, scale: float) -> Values:
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


class Load:
    """A load in a process of its own, for the length of a ``with`` block, which begins when it has warmed up."""

    def __init__(self, plan: Plan | dict[str, object], program: str = "load") -> None:
        words = _words(plan) if isinstance(plan, Plan) else [json.dumps(plan)]
        command = [sys.executable, "-m", f"tests.bench.{program}", *words]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        self.said()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)

    def go(self) -> None:
        """Let it begin what it waits with."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def said(self) -> str:
        """The next line that it says; raises ``RuntimeError`` when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator ended before its report; what it says above tells why")
        return line.strip()

    def report(self) -> Report:
        """What it reports, whatever it says before."""
        while not (line := self.said()).startswith("{"):
            pass
        return Report(**orjson.loads(line))


def _words(plan: Plan) -> list[str]:
    flags = {"stream", "in_step", "quiet"}
    options = {name: value for name, value in asdict(plan).items() if name not in flags and value != ""}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    wanted = {"--whole": not plan.stream, "--in-step": plan.in_step, "--quiet": plan.quiet}
    return ["--hold", *words, *(flag for flag, meant in wanted.items() if meant)]


def runs(plan: Plan, system: System, key: str = "") -> list[Run]:
    """Put *plan* on *system*: each part measured from the end of what was before to the end of its last answer."""
    found = []
    with Load(replace(plan, url=system.url, model=system.model, key=key)) as load:
        for _ in range(plan.parts):
            before = system.tree.cpu() if system.tree else {}
            load.go()
            report = load.report()
            found.append(Run(report, *spent(system, before)))
    return found


def spent(system: System, before: dict[str, float]) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """CPU seconds by role since *before*, and memory now; neither of a system whose processes are not known."""
    if system.tree is None:
        return None, None
    time.sleep(_SETTLE_SECONDS)
    return {role: seconds - before.get(role, 0) for role, seconds in system.tree.cpu().items()}, system.tree.rss()


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


class Bar(NamedTuple):
    """What a figure is to be: at most *limit*, or at least."""

    limit: float
    least: bool = False

    def met(self, value: float) -> bool:
        """Whether *value* is within it."""
        return value >= self.limit if self.least else value <= self.limit


#: What is to be met with the log on, file storage and every part a process of its own.
BARS = {
    Figure(scenario, CAPIBARA, metric, unit): bar
    for scenario, metric, unit, bar in (
        ("low", "added_first_token_p50", "ms", Bar(4.0)),
        ("low", "added_first_token_p99", "ms", Bar(10.0)),
        ("paced", CPU, "us", Bar(60.0)),
        ("paced", "token_delay_p95", "ms", Bar(10.0)),
        ("burst", CPU, "us", Bar(20.0)),
        ("json", "cpu_per_request", "ms", Bar(1.6)),
        ("json", "requests_per_second", "1/s", Bar(500.0, least=True)),
        ("rss", "rss_serving", "MB", Bar(180.0)),
        ("long", "cpu_growth", "%", Bar(5.0)),
        ("idle", "rss_per_stream", "kB", Bar(40.0)),
    )
}
