"""Systems under test: how they are started and stopped, and what their processes cost."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from capibara_flow.cli.supervisor import local_get

ROOT = Path(__file__).resolve().parents[2]
STRAIGHT, CAPIBARA = "straight", "capibara"
NO_LOG, TOGETHER, TOGETHER_NO_LOG = "capibara-no-log", "capibara-together", "capibara-together-no-log"
#: Ours; ``capibara`` is what `make up` starts: the log on, every part a process of its own.
OURS = (CAPIBARA, NO_LOG, TOGETHER, TOGETHER_NO_LOG)
#: The least that is durable, to tell what is ours of a price: see ``smallest``.
SMALLEST = "smallest"
#: Words of a command line that tell what a process is for; the last one wins.
_ROLES = {"up": "launcher", "capibara_flow.cli.up": "launcher", "tests.bench.mock": "engine"} | {
    word: word for word in ("edge", "router", "caller", "undertaker", "observer", "worker", "workers", "streams")
}
CONCURRENCY = 64
_READY_SECONDS, _STOP_SECONDS = 120, 20


class DidNotStart(RuntimeError):
    """The system under test is not ready in time, or has gone; the message tells what it said."""


def cpu_seconds(pid: int) -> float:
    """CPU seconds (user and system, all threads) of *pid*, to the nanosecond.

    ``/proc/PID/stat`` counts in steps of 10 ms; this is the process's CPU-time clock, whose id Linux makes of the pid
    (``MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)`` of the kernel's ``posix-timers.h``). Raises ``OSError`` when it has exited.
    """
    return time.clock_gettime((~pid << 3) | 2)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Tree:
    """All processes of a system, from *root* down: also those that have left their parent, and those that have exited."""

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)
        self._seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """Those that are alive."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= {self._root, *self._root.children(recursive=True)}
        return [process for process in self._seen if _alive(process)]

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far by role; what an exited process took is its parent's, as the kernel books it."""
        return self._by_role(lambda process: cpu_seconds(process.pid) + sum(process.cpu_times()[2:4]))

    def rss(self) -> dict[str, float]:
        """Resident memory by role in MB (10^6 bytes); pages that processes share count for each of them."""
        return self._by_role(lambda process: process.memory_info().rss / 1e6)

    def stop(self) -> None:
        """Ask the root to stop, then make an end of whatever is left."""
        processes = self.processes()
        if self._root in processes:
            self._root.terminate()
        _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=_STOP_SECONDS)

    def _by_role(self, measure: Callable[[psutil.Process], float]) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        for process in self.processes():
            try:
                totals[self._role(process)] += measure(process)
            except (psutil.NoSuchProcess, ProcessLookupError, OSError):
                continue  # it has exited since: its parent accounts for it
        return dict(totals)

    def _role(self, process: psutil.Process) -> str:
        words = process.cmdline()
        if not words or "nats-server" in Path(words[0]).name:
            return "broker"
        roles = [_ROLES[word] for word in words if word in _ROLES]
        if {"workers", "edge"} <= set(roles):
            return "together"
        return roles[-1] if roles else process.name()


def others() -> float:
    """Percent of the whole machine that is busy for a second while nothing of ours is: figures from a busy machine are worth less."""
    return float(psutil.cpu_percent(interval=1.0))


@dataclass(frozen=True)
class System:
    """A running system: *url* is its address; without a *tree* it is somebody else's and only looked at from outside."""

    name: str
    url: str
    tree: Tree | None
    model: str = "auto"

    @property
    def ours(self) -> bool:
        """Whether it is one of Capibara's: it has turns that one can come back to."""
        return self.name in OURS


@contextlib.contextmanager
def straight() -> Iterator[System]:
    """The mock engine by itself."""
    command = [sys.executable, "-m", "tests.bench.mock", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    tree = Tree(process.pid)
    try:
        url = process.stdout.readline().strip() if process.stdout else ""
        if not url:
            raise DidNotStart("the mock engine did not say its address")
        yield System(STRAIGHT, url, tree)
    finally:
        tree.stop()
        process.wait()


@contextlib.contextmanager
def capibara(engine: str, name: str = CAPIBARA, concurrency: int = CONCURRENCY) -> Iterator[System]:
    """Capibara in front of *engine* (a base URL without path), with its state in a folder of its own.

    *name* is one of ``OURS``. The engine is given *concurrency* at once.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as home:
        ready, state, fleet = Path(home, "ready.json"), Path(home, "state"), Path(home, "fleet.toml")
        # A fleet file and not --engine, because that lets an engine answer fewer at once than a scenario asks.
        fleet.write_text(f'[[experts]]\nname = "mock"\ndialect = "vllm"\nurls = ["{engine}/v1"]\nconcurrency = {concurrency}\n')
        command = ["capibara_flow", "up", "--fleet", str(fleet), "--port", "0", "--no-local-model"]
        command += ["--state", str(state), "--ready-file", str(ready)]
        command += ["--together"] if name in {TOGETHER, TOGETHER_NO_LOG} else []
        environment = {"CAPIBARA_LOG__ENABLED": str(name in {CAPIBARA, TOGETHER}).lower()}
        with started(name, [sys.executable, "-m", *command], Path(home), environment) as running:
            url = running.until(lambda: _ready(ready))
            yield System(name, url, running.tree)


@contextlib.contextmanager
def smallest(engine: str) -> Iterator[System]:
    """The smallest durable system in front of *engine*."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as home:
        ready = Path(home, "ready.json")
        command = [sys.executable, "-m", "tests.bench.smallest", "up", engine, str(ready)]
        with started(SMALLEST, command, Path(home), {}) as running:
            yield System(SMALLEST, running.until(lambda: _ready(ready)), running.tree)


def _ready(file: Path) -> str:
    try:
        url: str = json.loads(file.read_text())["url"]
    except (FileNotFoundError, json.JSONDecodeError):
        return ""
    return url


@dataclass(frozen=True)
class Running:
    """A system that was started and need not be ready yet."""

    name: str
    process: subprocess.Popen[bytes]
    tree: Tree
    log: Path

    def until(self, look: Callable[[], str]) -> str:
        """What *look* says once it says something; raises ``DidNotStart`` after a while, or when the system has ended."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := look():
                return found
            time.sleep(0.05)
        said = self.log.read_text(errors="replace")[-4000:]
        raise DidNotStart(f"{self.name} is not ready (exit code {self.process.poll()}); it said:\n{said}")

    def until_healthy(self, url: str, path: str) -> str:
        """*url*, once a GET of *path* there answers 200; raises as ``until`` does."""
        host, port = url.removeprefix("http://").split(":")

        def look() -> str:
            try:
                return url if local_get(host, int(port), path)[0] == 200 else ""
            except OSError:
                return ""

        return self.until(look)


@contextlib.contextmanager
def started(name: str, command: list[str], home: Path, environment: dict[str, str]) -> Iterator[Running]:
    """*command* as a child in *home*, with all its processes, until the end of the block; what it says is kept there."""
    log = home / "log"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        everything = {**os.environ, "PYTHONPATH": paths, **environment}
        process = subprocess.Popen(command, cwd=home, env=everything, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    tree = Tree(process.pid)
    try:
        yield Running(name, process, tree, log)
    finally:
        tree.stop()
        process.wait()
