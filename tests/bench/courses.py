"""Scenarios with a course of their own: the most that is kept up with, long answers, idle streams, a storm of readers, growth."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean

import orjson

from .load import Plan, Report
from .scenarios import CPU, Course, Load, Measured, Run, Value, cpu, runs, spent
from .system import System

_SETTLE_SECONDS = 2.0  # until what opening streams left behind is gone
_PACED = Plan("", 1, 1, 128, 20, warm_tokens=4)
_LONG = Plan("", 4, 1, 8000, parts=7)
_IDLE = Plan("", 1000, 1, 2, 20_000, spread_ms=4000, warm_tokens=2, quiet=True)


@dataclass(frozen=True)
class Most(Course):
    """The highest number of streams at *plan*'s pace that is kept up with: doubled from *start*, then bisected to a tenth.

    Kept up: every answer is right, 95 of 100 tokens are with their client within *delay_ms* of leaving the engine, and the load takes no
    more than a tenth longer than its tokens take to say, which an engine on the same cores that is held up would show.
    """

    plan: Plan = _PACED
    start: int = 25
    cap: int = 1000
    delay_ms: float = 50.0
    slack_ms: float = 250.0

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return self.cap

    def quick(self) -> "Most":
        """With short answers and few streams."""
        return replace(self, plan=replace(self.plan, tokens=16), start=4, cap=8)

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """Search; the errors of loads that were too much are what is searched for, those at the start are errors."""
        errors: list[str] = []

        def kept_up(streams: int) -> bool:
            spread = min(4000.0, 210.0 + streams * 2)
            plan = replace(self.plan, clients=streams, spread_ms=spread, timeout=60)
            report = runs(plan, system, key)[0].report
            if streams == 1:
                errors.extend(report.errors)
            return self.is_kept_up(report, spread)

        return Measured([("streams", "1", float(highest(kept_up, self.start, self.cap)))], errors)

    def is_kept_up(self, report: Report, spread_ms: float) -> bool:
        """Whether *report* is of a load that the system kept up with."""
        ideal = (self.plan.tokens - 1) * self.plan.gap_ms + spread_ms
        in_time = report.seconds * 1000 <= ideal * 1.1 + self.slack_ms
        return not report.failed and in_time and report.token_delay_ms["p95"] <= self.delay_ms


def highest(holds: Callable[[int], bool], start: int, cap: int) -> int:
    """The highest number up to *cap* for which *holds*, to a tenth, if it holds below that: 0 when not even for 1."""
    good, bad = 0, start
    while holds(bad):
        good, bad = bad, min(bad * 2, cap)
        if good == cap:
            return cap
    while bad - good > max(good // 10, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


@dataclass(frozen=True)
class Long(Course):
    """Long answers, part after part: whether the last tokens cost what the first ones did."""

    plan: Plan = _LONG

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return self.plan.clients

    def quick(self) -> "Long":
        """Two parts of an eighth."""
        return replace(self, plan=replace(self.plan, tokens=self.plan.tokens // 8, parts=2))

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """CPU a token over all, growth from the first parts to the last ones in percent, and of the memory in MB."""
        found = runs(self.plan, system, key)
        errors = [error for run in found for error in run.report.errors]
        return Measured(list(grown(found)) if not errors else [], errors)


def grown(found: list[Run]) -> list[Value]:
    """What parts of the same size show of growth."""
    if any(run.cpu is None for run in found):
        return []
    costs = [sum((run.cpu or {}).values()) * 1e6 / run.report.tokens for run in found]
    memory = [sum((run.rss or {}).values()) for run in found]
    ends = max(len(costs) // 3, 1)
    first, last = mean(costs[:ends]), mean(costs[-ends:])
    return [
        (CPU, "us", mean(costs)),
        (f"{CPU}/first", "us", first),
        (f"{CPU}/last", "us", last),
        ("cpu_growth", "%", (last / first - 1) * 100),
        ("rss_growth", "MB", memory[-1] - memory[0]),
        ("tokens", "1", float(sum(run.report.tokens for run in found))),
    ]


@dataclass(frozen=True)
class Idle(Course):
    """Open streams that say nothing for a while: what each of them weighs."""

    plan: Plan = _IDLE

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return self.plan.clients

    def quick(self) -> "Idle":
        """Fifty of them, for three seconds."""
        return replace(self, plan=replace(self.plan, clients=50, gap_ms=3000, spread_ms=200))

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """Memory (kB) and CPU (percent of a core) of all processes for each open stream, by role and together."""
        with Load(replace(self.plan, url=system.url, model=system.model, key=key)) as load:
            before = system.tree.rss() if system.tree else {}
            load.go()
            values: list[Value] = []
            line = load.said()
            if line == "quiet" and system.tree:
                time.sleep(min(_SETTLE_SECONDS, self.plan.gap_ms / 4000))
                values = self._weighed(system.tree.rss(), before)
                line = load.said()
            errors = Report(**orjson.loads(line)).errors
        return Measured(values, errors)

    def _weighed(self, now: dict[str, float], before: dict[str, float]) -> list[Value]:
        each = {role: (megabytes - before.get(role, 0)) * 1000 / self.plan.clients for role, megabytes in now.items()}
        return [
            *((f"rss_per_stream/{role}", "kB", kilobytes) for role, kilobytes in sorted(each.items())),
            ("rss_per_stream", "kB", sum(each.values())),
        ]


@dataclass(frozen=True)
class Resume(Course):
    """A storm of readers that all come back at once; see ``storm``. Only our turns can be gone on with."""

    readers: int = 500
    tokens: int = 10
    gap_ms: float = 2000

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return self.readers

    def fits(self, system: System) -> bool:
        """Ours."""
        return system.ours or system.tree is None

    def quick(self) -> "Resume":
        """Twenty readers who are away for less long."""
        return replace(self, readers=20, tokens=6, gap_ms=300)

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """Time (ms) from the storm until each has a new token, and CPU (ms) a reader until all have one."""
        plan = {
            "clients": self.readers,
            "tokens": self.tokens,
            "gap_ms": self.gap_ms,
            "spread_ms": self.gap_ms,
            "away_ms": self.gap_ms * 1.25,
        }
        values: list[Value] = []
        with Load({"url": system.url, "key": key, **plan}, "storm") as load:
            load.go()
            load.said()
            before = system.tree.cpu() if system.tree else {}
            load.go()
            load.said()
            spent_cpu, _ = spent(system, before)
            report = load.report()
        if spent_cpu:
            values.append(("cpu_per_reader", "ms", sum(spent_cpu.values()) * 1000 / self.readers))
        values += [(f"served_{name}", "ms", value) for name, value in report.first_token_ms.items() if name != "p99"]
        return Measured(values, report.errors)


@dataclass(frozen=True)
class Growth(Course):
    """How the cost of a token grows: with the number of streams that share a pace of *rate* tokens a second, and with a turn's length.

    *streams* is how many at a time, each with so many turns of *tokens* tokens; *lengths* are tokens a turn without a gap, each with the
    turns of each of four clients.
    """

    streams: tuple[tuple[int, int], ...] = ((1, 250), (10, 25), (100, 3), (1000, 1))
    lengths: tuple[tuple[int, int], ...] = ((10, 200), (100, 50), (1000, 10), (10_000, 2))
    tokens: int = 32
    rate: float = 1000

    @property
    def clients(self) -> int:
        """The most that it has at a time."""
        return max(count for count, _ in self.streams)

    def quick(self) -> "Growth":
        """The small ones only."""
        return replace(self, streams=((1, 10), (10, 1)), lengths=((10, 10), (100, 2)))

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """CPU (us) a token at each size, and the steepest step between two sizes that follow: 1 is flat, 10 would be quadratic."""
        values: list[Value] = []
        errors: list[str] = []
        for axis, sizes, plan_of in (("streams", self.streams, self._streams), ("tokens", self.lengths, self._length)):
            costs = []
            for size, turns in sizes:
                (run,) = runs(plan_of(size, turns), system, key)
                errors += run.report.errors
                found = [value for metric, _, value in cpu(run, CPU, "us", 1e6 / max(run.report.tokens, 1)) if metric == CPU]
                costs += found
                values += [(f"{CPU}@{axis}={size}", "us", value) for value in found]
            if len(costs) == len(sizes):
                values.append((f"steepest@{axis}", "ratio", max(after / before for before, after in itertools.pairwise(costs))))
        return Measured(values, errors)

    def _streams(self, count: int, turns: int) -> Plan:
        gap = count * 1000 / self.rate
        return Plan("", count, turns, self.tokens, gap, spread_ms=gap, warm_tokens=4)

    def _length(self, tokens: int, turns: int) -> Plan:
        return Plan("", 4, turns, tokens, warm_tokens=100)


COURSES = (
    Long("long", "4 streams, 8,000 tokens without a gap, seven times"),
    Most("most", "the most streams of 128 tokens at 50 a second that are kept up with", usual=False),
    Idle("idle", "1,000 open streams that say nothing for 20 seconds", usual=False),
    Resume("resume", "500 readers lose their streams and come back all at once", usual=False),
    Growth("growth", "CPU a token at 1 to 1,000 streams and at 10 to 10,000 tokens a turn", usual=False),
)
