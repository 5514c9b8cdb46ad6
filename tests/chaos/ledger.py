"""What engines were asked and how it ended, from the engines themselves; what a killed one told before its death is kept."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.chaos.installation import Member
from tests.waiting import until


@dataclass(frozen=True)
class Run:
    """One call that an engine took; times in seconds since the epoch, *ended* none while it goes on."""

    question: str
    began: float
    ended: float | None
    how: str


class Ledger:
    """All runs of all engine processes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._runs: dict[tuple[str, int], Run] = {}

    async def visit(self, engines: Iterable[Member]) -> None:
        """Ask *engines* for what they have done."""
        for engine in engines:
            for told in await self._ask(engine):
                key = (engine.child.name, told["number"])
                self._runs[key] = Run(told["question"], told["began"], told["ended"], told["how"])

    async def killing(self, engine: Member) -> None:
        """Ask *engine* once more: it is about to be killed, and all that it does ends with it."""
        await self.visit([engine])
        for key, run in self._runs.items():
            if key[0] == engine.child.name and run.ended is None:
                self._runs[key] = Run(run.question, run.began, time.time(), "killed")

    async def settle(self, engines: Sequence[Member], seconds: float) -> int:
        """Give *engines* that many seconds to come to rest: how many runs still go on then. Waits for their end."""

        async def idle() -> bool:
            await self.visit(engines)
            return not self.going_on

        try:
            await until(idle, seconds)
        except TimeoutError:
            orphans = self.going_on
            with suppress(TimeoutError):  # what never ends counts again in the next phase
                await until(idle, 60)
            return orphans
        return 0

    @property
    def going_on(self) -> int:
        """How many runs go on, as far as was told."""
        return sum(run.ended is None for run in self._runs.values())

    def of(self, question: str) -> list[Run]:
        """The runs of one turn."""
        return [run for run in self._runs.values() if run.question == question]

    async def _ask(self, engine: Member) -> list[dict[str, Any]]:
        for _ in range(5):
            try:
                async with self._session.get(f"{engine.address}/runs") as response:
                    return list(await response.json())
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)
        raise RuntimeError(f"{engine.name} does not tell what it has done")
