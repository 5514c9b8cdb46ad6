"""Which tenants have documents, as the retrievers that are at work tell: a router needs it at once, so it is asked for beforehand."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from capibara_flow.tasks import ended


class Holdings:
    """Reads *reports* every few seconds and remembers which tenants have documents.

    Nobody has any while no retriever is at work: what cannot be looked up need not be waited for.
    """

    def __init__(self, reports: Callable[[], Awaitable[Iterable[Mapping[str, Any]]]], *, every: float = 2.0) -> None:
        self._reports, self._every = reports, every
        self._tenants: frozenset[str] = frozenset()
        self._task: asyncio.Task[None] | None = None

    def __call__(self, tenant: str) -> bool:
        """Whether *tenant* has documents, as far as is known."""
        return tenant in self._tenants

    def start(self) -> None:
        """Begin to read."""
        self._task = self._task or asyncio.create_task(self._read())

    async def stop(self) -> None:
        """Read no more."""
        await ended(self._task)
        self._task = None

    async def _read(self) -> None:
        while True:
            reports = await self._reports()
            self._tenants = frozenset(tenant for report in reports for tenant in _tenants(report))
            await asyncio.sleep(self._every)


def _tenants(report: Mapping[str, Any]) -> Iterable[str]:
    facts = report.get("facts")
    told = facts.get("tenants") if report.get("worker") == "retriever" and isinstance(facts, Mapping) else None
    return [each for each in told if isinstance(each, str)] if isinstance(told, list) else ()
