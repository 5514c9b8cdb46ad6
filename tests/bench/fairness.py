"""Fair shares at one slow expert: ``python -m tests.bench.fairness``.

One heavy tenant and nine light ones ask an expert that does four calls at once, each of which takes 0.5 s on average. Three parts:

- *alone*: the light ones, each at random (Poisson), half of what the expert can do together: now and then they wait a little;
- *crowded*: the same, while the heavy one always has 40 questions waiting;
- *greedy*: all ten want more than they can get, some twice or five times as much as others.

What is measured is how long a question waits until its first token, what ``queued`` said about that, and who was served how often.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich.console import Console

from capibara_flow.domain.sharing import jain
from tests.bench import system
from tests.bench.__main__ import BUSY_PERCENT, FIGURES, Series, record
from tests.bench.scenarios import Figure
from tests.bench.system import CAPIBARA, ROOT, DidNotStart
from tests.bench.wire import Ask

HANDS, GAP_MS, FEWEST, MOST = 4, 25.0, 10, 30
SERVICE = GAP_MS * (FEWEST + MOST) / 2 / 1000
HEAVY, LIGHT = "heavy", tuple(f"light-{number}" for number in range(9))
OUTSTANDING, LOAD = 40, 0.5
#: Questions that each tenant of the greedy part has waiting, by turns.
GREED = (4, 8, 20)
BARS = {"light_wait_p95_ratio": "at most 1.5", "jain": "at least 0.95", "queued_error_p50": "at most 25"}


@dataclass(frozen=True)
class Turn:
    """One answered question: seconds until its first token, and when that was; what ``queued`` said of it, and how long it was then."""

    tenant: str
    wait: float
    began: float
    told: float | None = None
    waited: float = 0.0

    @property
    def error(self) -> float | None:
        """How far off the estimate was, in percent of the time that it was about."""
        return None if self.told is None else 100 * abs(self.told - self.waited) / max(self.waited, 0.001)


@dataclass
class Door:
    """A client of the system at *url* *since* then, for every tenant; *turns* is all that was answered, *errors* what went wrong."""

    session: aiohttp.ClientSession
    url: str
    turns: list[Turn] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    async def ask(self, tenant: str, chance: random.Random) -> None:
        """One question of *tenant*, whose answer lasts as long as *chance* has it."""
        ask = Ask(ident=f"{tenant}-{chance.getrandbits(40):x}", tokens=chance.randint(FEWEST, MOST), gap_ms=GAP_MS)
        body = {"message": ask.question, "sampling": {"max_tokens": ask.tokens}, "background": True}
        started = time.monotonic()
        first = told = said = None
        async with self.session.post(f"{self.url}/api/chat", json=body, headers={"Authorization": f"Bearer {_key(tenant)}"}) as response:
            event = ""
            async for line in response.content:
                if line.startswith(b"event: "):
                    event = line[7:].strip().decode()
                elif line.startswith(b"data: "):
                    if event == "queued" and said is None:
                        told, said = json.loads(line[6:]).get("eta_s"), time.monotonic()
                    elif event == "token" and first is None:
                        first = time.monotonic()
                    elif event == "error":
                        self.errors.append(line.decode())
        if first is None:
            self.errors.append(f"{tenant}: no token")
            return
        self.turns.append(Turn(tenant, first - started, first, told, first - (said or started)))

    async def now_and_then(self, tenant: str, rate: float, seconds: float, chance: random.Random) -> None:
        """Questions of *tenant* at random, *rate* a second."""
        async with asyncio.TaskGroup() as group:
            end = time.monotonic() + seconds
            while (pause := chance.expovariate(rate)) < end - time.monotonic():
                await asyncio.sleep(pause)
                group.create_task(self.ask(tenant, chance))

    async def always(self, tenant: str, outstanding: int, seconds: float, chance: random.Random) -> None:
        """So many questions of *tenant* at any time."""
        end = time.monotonic() + seconds

        async def one() -> None:
            while time.monotonic() < end:
                await self.ask(tenant, chance)

        await asyncio.gather(*(one() for _ in range(outstanding)))


def _key(tenant: str) -> str:
    return f"key-of-{tenant}"


@contextmanager
def serving() -> Iterator[str]:
    """Capibara with an expert of few hands, and a key for every tenant; its address."""
    keys = [{"key": _key(tenant), "principal": tenant, "tenant": tenant} for tenant in (HEAVY, *LIGHT)]
    with system.straight() as engine, tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as home:
        fleet, ready = Path(home, "fleet.toml"), Path(home, "ready.json")
        fleet.write_text(f'[[experts]]\nname = "slow"\ndialect = "vllm"\nurls = ["{engine.url}/v1"]\nconcurrency = {HANDS}\n')
        words = ["-m", "capibara_flow", "up", "--fleet", str(fleet), "--port", "0", "--no-local-model"]
        command = [sys.executable, *words, "--state", str(Path(home, "state")), "--ready-file", str(ready)]
        environment = {"CAPIBARA_AUTH__KEYS": json.dumps(keys), "CAPIBARA_AUTH__ANONYMOUS": "false"}

        def look() -> str:
            return str(json.loads(ready.read_text())["url"]) if ready.exists() and ready.read_text() else ""

        with system.started(CAPIBARA, command, Path(home), environment) as running:
            yield running.until(look)


@asynccontextmanager
async def door(url: str) -> AsyncIterator[Door]:
    """A client with as many connections as it needs."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Door(session, url)


async def part(url: str, name: str, seconds: float, seed: int) -> Door:
    """One part of a round, on its own."""
    rate = LOAD * HANDS / SERVICE / len(LIGHT)
    async with door(url) as found:
        if name == "greedy":
            who = [(tenant, GREED[number % len(GREED)]) for number, tenant in enumerate((HEAVY, *LIGHT))]
            await asyncio.gather(*(found.always(tenant, most, seconds, random.Random(f"{seed} {tenant}")) for tenant, most in who))
        else:
            light = [found.now_and_then(tenant, rate, seconds, random.Random(f"{seed} {tenant}")) for tenant in LIGHT]
            heavy = [found.always(HEAVY, OUTSTANDING, seconds, random.Random(f"{seed} heavy"))] if name == "crowded" else []
            await asyncio.gather(*heavy, *light)
    return found


def p95(values: Sequence[float]) -> float:
    """What 95 of 100 stay below."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


Values = Iterator[tuple[str, str, float]]


def waits(parts: dict[str, Door]) -> Values:
    """How long tenants wait; ``light_wait_p95_ratio`` is what their wait has grown to, one service time taken off."""
    alone, crowded = (p95([turn.wait for turn in parts[name].turns if turn.tenant != HEAVY]) for name in ("alone", "crowded"))
    yield "light_wait_p95_alone", "s", alone
    yield "light_wait_p95_crowded", "s", crowded
    yield "light_wait_p95_ratio", "x", max(0.0, crowded - SERVICE) / alone
    yield "heavy_wait_p50", "s", statistics.median(turn.wait for turn in parts["crowded"].turns if turn.tenant == HEAVY)


def shares(turns: Sequence[Turn], seconds: float) -> Values:
    """How evenly tenants are served who all want more than they get: what began while all had questions waiting."""
    first = min(turn.began for turn in turns)
    served = Counter(turn.tenant for turn in turns if first + 2 * SERVICE < turn.began < first + seconds)
    yield "jain", "index", jain([served[tenant] for tenant in (HEAVY, *LIGHT)])


def estimates(parts: dict[str, Door], seconds: float) -> Values:
    """How far off estimates were; what begins when nobody asks any more is served sooner than anybody could know."""
    turns = [turn for name in ("alone", "crowded") for turn in parts[name].turns if turn.began < parts[name].since + seconds]
    told = [(turn, error) for turn in turns if (error := turn.error) is not None]
    for who, errors in (
        ("", [error for _, error in told]),
        ("_heavy", [error for turn, error in told if turn.tenant == HEAVY]),
        ("_light", [error for turn, error in told if turn.tenant != HEAVY]),
        ("_from_one_service_time", [error for turn, error in told if turn.waited >= SERVICE]),
    ):
        yield f"queued_error{who}_p50", "%", statistics.median(errors) if errors else math.nan
    yield "queued_off_p50", "s", statistics.median(abs((turn.told or 0.0) - turn.waited) for turn, _ in told)
    yield "queued_told", "%", 100 * len(told) / max(1, sum(turn.wait > SERVICE / 2 for turn in turns))


def figures(parts: dict[str, Door], seconds: float) -> Iterator[tuple[Figure, float]]:
    """The figures of one round."""
    for metric, unit, value in (*waits(parts), *shares(parts["greedy"].turns, seconds), *estimates(parts, seconds)):
        yield Figure("fairness", CAPIBARA, metric, unit), value


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="medians are of as many (3)")
    parser.add_argument("--seconds", type=float, default=25, help="how long each part takes (25)")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help=f"append to {FIGURES.name}")
    return parser.parse_args()


def main() -> int:
    """Run as a program: 1 when an answer was wrong, 2 when the system did not start; a missed bar is only reported."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else 120)
    series: Series = defaultdict(list)
    errors: list[str] = []
    busy = system.others()
    try:
        for number in range(options.rounds):
            with serving() as url:
                parts = {}
                for name in ("alone", "crowded", "greedy"):
                    console.print(f"[dim]round {number + 1}: {name}, {options.seconds:g} s and the rest[/]")
                    parts[name] = asyncio.run(part(url, name, options.seconds, number))
                    errors += parts[name].errors
            for figure, value in figures(parts, options.seconds):
                series[figure].append(value)
    except DidNotStart as error:
        console.print(error, style="red", markup=False)
        return 2
    for figure, values in series.items():
        bar = f"   bar: {BARS[figure.metric]}" if figure.metric in BARS else ""
        console.print(f"{figure.metric:36} {statistics.median(values):8.3g} ({min(values):.3g} - {max(values):.3g}) {figure.unit}{bar}")
    for wrong in errors[:10]:
        console.print(wrong, style="red", markup=False)
    if busy > BUSY_PERCENT:
        console.print(f"[yellow]others kept this machine {busy:.0f} % busy: do not cite these figures[/]")
    if options.record and series and not errors:
        record(series, busy)
        console.print(f"appended to {FIGURES.relative_to(ROOT)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
