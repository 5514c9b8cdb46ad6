"""Everything of an installation as processes of its own, any of which may be killed, stopped, started again or replaced."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp

from capibara_flow.cli.children import Child
from capibara_flow.cli.supervisor import free_port
from capibara_flow.runtime.embedded import EmbeddedBroker
from tests.chaos.plan import NARROW, PREFILLER, REPEATER, Pattern
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("router", "caller", "undertaker")
KINDS = ("engine", *WORKERS, "edge")
TURN_SECONDS = 60
_READY_SECONDS = 60
_LISTENING = ("edge", "engine")


@dataclass
class Member:
    """One process; started again, it is the same member with another *child*."""

    kind: str
    name: str
    port: int
    child: Child
    starts: int = 1

    @property
    def address(self) -> str:
        """Where it listens, if it does."""
        return f"http://127.0.0.1:{self.port}"


class Installation:
    """Two of each kind and one broker, inside an ``async with`` block that leaves nothing behind; logs are in ``home/logs``."""

    def __init__(self, home: Path, pattern: Pattern, session: aiohttp.ClientSession) -> None:
        self.home, self.pattern, self.session = home, pattern, session
        self.broker = EmbeddedBroker(home / "nats", config=ROOT / "nats.conf")
        self.members: dict[str, list[Member]] = defaultdict(list)
        self._children: list[Child] = []
        self._count = 0

    async def __aenter__(self) -> Self:
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        try:
            await asyncio.to_thread(self.broker.start)
            (self.home / "answers.toml").write_text(_script(self.pattern), encoding="utf-8")
            for _ in range(2):
                await self.add("engine")
            self._fleet.write_text(_fleet([each.address for each in self.members["engine"]]), encoding="utf-8")
            await self._apply_streams()
            for kind in (*WORKERS, "edge"):
                await asyncio.gather(self.add(kind), self.add(kind))
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process that was ever started here, at once; nothing that waits, so that nothing can interrupt it."""
        for child in self._children:
            if child.alive:  # the process id of one that has ended may be somebody else's by now
                child.sweep()
        for child in self._children:
            while child.code is None:
                time.sleep(0.005)
        self.broker.stop()

    @property
    def doors(self) -> list[str]:
        """The addresses that clients know."""
        return [each.address for each in self.members["edge"]]

    # --- what may happen to a process -------------------------------------------------------------------------

    async def add(self, kind: str) -> Member:
        """Start one more *kind*; it is known once it is ready."""
        self._count += 1
        port = free_port("127.0.0.1") if kind in _LISTENING else 0
        name = f"{kind}-{self._count}"
        member = Member(kind, name, port, self._child(kind, f"{name}.1", port))
        await self._ready(member)
        self.members[kind].append(member)
        return member

    def signal(self, member: Member, number: signal.Signals) -> None:
        """Send a signal to its process."""
        if member.child.alive and member.child.pid:
            os.kill(member.child.pid, number)

    async def again(self, member: Member) -> None:
        """Start a killed member again, at the same address."""
        await self.ended(member)
        member.starts += 1
        member.child = self._child(member.kind, f"{member.name}.{member.starts}", member.port)
        await self._ready(member)

    async def retire(self, member: Member) -> None:
        """End it in order; whoever looks for its kind from now on does not find it."""
        self.members[member.kind].remove(member)
        self.signal(member, signal.SIGTERM)
        await self.ended(member)

    async def stopped(self, member: Member, seconds: float) -> None:
        """Let it stand still for *seconds*: SIGSTOP, then SIGCONT, the latter even if we die meanwhile."""
        self.signal(member, signal.SIGSTOP)
        waker = ["sh", "-c", 'sleep "$0"; kill -CONT "$1"', str(seconds), str(member.child.pid)]
        await asyncio.to_thread(subprocess.run, waker, start_new_session=True, check=False, stderr=subprocess.DEVNULL)

    async def ended(self, member: Member) -> None:
        """Wait for the end of its process."""
        await until(lambda: member.child.code is not None)

    async def broker_outage(self, seconds: float) -> None:
        """Kill the broker, and start it again on its data after *seconds*."""
        await asyncio.to_thread(self.broker.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.broker.restart)

    # --- starting ---------------------------------------------------------------------------------------------

    def _child(self, kind: str, name: str, port: int) -> Child:
        commands = {
            "engine": ["capibara_flow.engines.scripted", str(self.home / "answers.toml"), "--port", str(port)],
            "edge": ["capibara_flow", "edge", "--state", str(self.home)],
            "streams": ["capibara_flow", "streams", "apply", "--state", str(self.home)],
        }
        words = commands.get(kind) or ["workers", kind]
        role = {"streams": "provisioner"}.get(kind, kind)
        environment = self._environment(role) | {"CAPIBARA_EDGE__PORT": str(port)}
        child = Child(name, [sys.executable, "-m", *words], environment, self.home / "logs" / f"{name}.log")
        child.start()
        self._children.append(child)
        return child

    def _environment(self, role: str) -> dict[str, str]:
        """What a process of *role* gets: its own password and nobody else's."""
        secrets = self.broker.environment(role) if role != "engine" else {}
        return secrets | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "CAPIBARA_FLEET__FILE": str(self._fleet),
            "CAPIBARA_WORKER__ACK_WAIT_SECONDS": str(self.pattern.ack_wait),
            "CAPIBARA_WORKER__GRACEFUL_SECONDS": str(self.pattern.graceful),
            "CAPIBARA_EDGE__ABANDON_SECONDS": str(self.pattern.abandon),
            "CAPIBARA_EDGE__TURN_SECONDS": str(TURN_SECONDS),
        }

    @property
    def _fleet(self) -> Path:
        return self.home / "fleet.toml"

    async def _apply_streams(self) -> None:
        child = self._child("streams", "streams", 0)
        await until(lambda: child.code is not None, _READY_SECONDS)
        if child.code:
            child.check()

    async def _ready(self, member: Member) -> None:
        async def is_ready() -> bool:
            member.child.check()
            if member.kind in _LISTENING:
                return await self._answers(f"{member.address}/{'ready' if member.kind == 'edge' else 'health'}")
            return b"workers_ready" in member.child.log.read_bytes()

        await until(is_ready, _READY_SECONDS)

    async def _answers(self, url: str) -> bool:
        try:
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False


def _script(pattern: Pattern) -> str:
    return f"[[answer]]\nwhen = 'cuenta hasta (\\d+)'\ncounts = true\ndelay_ms = {pattern.pace * 1000:g}\n"


def _fleet(engines: list[str]) -> str:
    """Three experts on the same engines: what is `scripted` is known to continue given words, what speaks plain `openai` is not."""
    urls = json.dumps([f"{address}/v1" for address in engines])
    experts = ((PREFILLER, "true", 64), (REPEATER, "false", 64), (NARROW, "true", 1))
    return "\n".join(
        f'[[experts]]\nname = "{name}"\nurls = {urls}\nscripted = {scripted}\nconcurrency = {concurrency}\n'
        for name, scripted, concurrency in experts
    )
