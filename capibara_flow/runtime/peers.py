"""What the callers of an expert report of its queue, heard as they tell it: who has hands free, and how long calls take."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from nats.aio.subscription import Subscription

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.reports import EVERY_SECONDS, read_reports
from topics.streams import report_key

_SILENT = 2.5 * EVERY_SECONDS  # seconds after which a process counts no more
WORKER, QUEUE = "caller", "queue"


@dataclass(frozen=True)
class Desk:
    """One process's part in the queue of an expert, as it told it *at* that time; lanes and counts as ``Pump.facts`` has them."""

    process: str
    at: float
    capacity: int
    work: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    minute: Mapping[str, int] = field(default_factory=dict)
    over: float = 60.0
    seconds: float | None = None
    left: tuple[float, ...] = ()

    @property
    def free(self) -> int:
        """How many calls more it would make at once."""
        return max(0, self.capacity - sum(self.work.values()))


def desks(report: Mapping[str, Any], at: float) -> dict[str, Desk]:
    """What *report* tells of queues, by expert (a token); nothing when it is of another version. Who takes no work has no desk."""
    found = {}
    facts = report.get("facts")
    told = facts.get(QUEUE) if isinstance(facts, dict) else None
    for expert, queue in told.items() if isinstance(told, dict) else ():
        try:
            if queue["takes"]:
                seconds = queue.get("seconds")
                counts = {name: {str(lane): int(count) for lane, count in queue[name].items()} for name in ("work", "held", "minute")}
                over = max(1.0, float(queue.get("over", 60)))
                left = tuple(float(each) for each in queue.get("left", ()))
                measured = None if seconds is None else float(seconds)
                found[expert] = Desk(str(report["process"]), at, int(queue["capacity"]), **counts, over=over, seconds=measured, left=left)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


class Peers:
    """The desks of all callers that report; *process* is our own name, if we are one."""

    def __init__(self, client: TokenClient, process: Iterable[str] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._own, self._clock = client, frozenset(process), clock
        self._desks: dict[str, tuple[float, dict[str, Desk]]] = {}
        self._subscription: Subscription | None = None
        #: Called when somebody else has told something new.
        self.on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Begin to listen; what was told before is read, if the broker answers."""
        self._subscription = await self._client.listen(report_key(WORKER, "*"), self._hear)
        try:
            for report in await read_reports(self._client):
                if report["worker"] == WORKER:
                    self._learn(report["process"], report)
        except BrokerUnavailable:
            return  # it is told again soon

    async def stop(self) -> None:
        """Listen no more."""
        if self._subscription:
            await self._client.deafen(self._subscription)

    def of(self, expert: str) -> list[Desk]:
        """The desks that *expert* (a token) has now, our own among them."""
        now = self._clock()
        self._desks = {name: told for name, told in self._desks.items() if now - told[0] < _SILENT}
        return [each[expert] for _, each in self._desks.values() if expert in each]

    def elsewhere(self, expert: str) -> bool:
        """Whether another process has a hand free for *expert*."""
        return any(desk.free for desk in self.of(expert) if desk.process not in self._own)

    def _hear(self, subject: bytes, _: bytes, data: bytes) -> None:
        process = subject.decode().rsplit(".", 1)[-1]
        try:
            self._learn(process, orjson.loads(data) if data else {})
        except orjson.JSONDecodeError:
            return

    def _learn(self, process: str, report: Any) -> None:
        now = self._clock()
        if isinstance(report, dict):
            self._desks[process] = now, desks(report, now)
        if process not in self._own:
            self.on_change()
