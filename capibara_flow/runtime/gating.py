"""Gates: a process whose engines of an expert are down leaves its work to others, as long as there are others who can do it."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from capibara_flow.domain.health import takes_work
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log


class Gate:
    """Whether work is taken now: it is, until somebody shuts the gate."""

    def __init__(self) -> None:
        self._opened, self._shut = asyncio.Event(), asyncio.Event()
        self._opened.set()

    @property
    def is_open(self) -> bool:
        """Whether work is taken now."""
        return self._opened.is_set()

    def turn(self, is_open: bool) -> None:
        """Open or shut it."""
        now, before = (self._opened, self._shut) if is_open else (self._shut, self._opened)
        before.clear()
        now.set()

    async def until_open(self) -> None:
        """Return as soon as it is open."""
        await self._opened.wait()

    async def until_shut(self) -> None:
        """Return as soon as it is shut."""
        await self._shut.wait()


class Gatekeeper:
    """Turns the gates of experts, by name, as ``domain.health.takes_work`` says.

    *available* tells which experts have an engine that *process* may ask, *reports* what all processes tell of themselves; these are
    read every few seconds, but only while something is down. Call ``look`` when something has changed.
    """

    def __init__(
        self,
        process: str,
        available: Callable[[], Mapping[str, bool]],
        reports: Callable[[], Awaitable[Iterable[Mapping[str, Any]]]],
        *,
        every: float = 2.0,
    ) -> None:
        self._process, self._available, self._reports, self._every = process, available, reports, every
        self._gates: dict[str, Gate] = defaultdict(Gate)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def gate(self, expert: str) -> Gate:
        """The gate of *expert*: always the same one."""
        return self._gates[expert]

    def start(self) -> None:
        """Begin to keep the gates."""
        self._task = self._task or asyncio.create_task(self._keep())

    def look(self) -> None:
        """Something has changed: look at once."""
        self._changed.set()

    async def stop(self) -> None:
        """Keep them no more; they stay as they are."""
        await ended(self._task)
        self._task = None

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            available = dict(self._available())
            well = all(available.values())
            reports = [] if well else list(await self._reports())
            for expert, gate in self._gates.items():
                takes = takes_work(expert, available.get(expert, True), self._process, reports)
                if takes != gate.is_open:
                    log.info("work_resumed" if takes else "work_left_to_others", expert=expert)
                gate.turn(takes)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if well else self._every):
                    await self._changed.wait()
