"""Usage is written down: many facts with one statement, into a store that is open only as long as that is worth its memory.

Facts wait at the broker, where they are kept as long as turns are. A store that is on anyway gets them at once. One that has to be started
for them is opened when somebody asks, or when the oldest of them has waited for a good part of the time for which it is kept.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, StoreUnavailable
from capibara_flow.ports import Spent, SpentDay, UsageLog
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.output import one_message
from capibara_flow.runtime.provision import ensure_consumer, ensure_stream
from capibara_flow.tasks import LONG, ended
from capibara_flow.telemetry import log
from topics.chat import ExpertCalled
from topics.streams import Consumer, Layout

_AT_ONCE = 1000  # facts in one statement
_SOON = 0.02  # seconds between looks while somebody waits
Opening = Callable[[], AbstractAsyncContextManager[UsageLog]]


class Backlog:
    """What *consumer* has not done yet; it is created where it is missing, so that all there is waits. Raises ``BrokerUnavailable``."""

    def __init__(self, client: TokenClient, consumer: Consumer, layout: Layout) -> None:
        self._client, self._consumer, self._layout = client, consumer, layout

    async def count(self) -> int:
        """How many messages wait, or are at work."""
        info = await self._info()
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def since(self) -> float | None:
        """When the oldest of them was said, in seconds since the epoch; none when nothing waits, and 0 of one that cannot be read."""
        if not await self.count():
            return None
        found = await one_message(self._client, self._consumer.stream, seq=await self._done() + 1, next_by_subj=self._consumer.filter)
        try:
            return None if found is None else ExpertCalled.read(found.data).ended
        except ValidationError:
            return 0.0

    async def drained(self, seconds: float) -> int:
        """Wait until all that is there now is done, for *seconds* at most; how many messages wait then, 0 if none of these does."""
        last = await one_message(self._client, self._consumer.stream, last_by_subj=self._consumer.filter)
        end = time.monotonic() + seconds
        while left := await self.count():
            if last is not None and await self._done() >= last.sequence:
                return 0
            if time.monotonic() >= end:
                break
            await asyncio.sleep(_SOON)
        return left

    async def _done(self) -> int:
        """The sequence up to which all is done."""
        info = await self._info()
        return 0 if info.ack_floor is None else int(info.ack_floor.stream_seq)

    async def _info(self) -> ConsumerInfo:
        jetstream, where = self._client.jetstream(), (self._consumer.stream, self._consumer.durable)
        try:
            try:
                info: ConsumerInfo = await jetstream.consumer_info(*where)
            except NotFoundError:
                await ensure_stream(jetstream, self._layout.named(self._consumer.stream))
                await ensure_consumer(jetstream, self._consumer)
                info = await jetstream.consumer_info(*where)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"the broker does not tell of {self._consumer.durable}: {error!r}") from error
        return info


@dataclass(frozen=True)
class Habits:
    """When the books are opened and shut; all in seconds.

    They are opened for a fact that has waited for *due*, shut when nobody has asked for *linger*, and it is looked every *look*.
    Who reads waits for *drain* at most until all is written down. Facts are kept for *kept*.
    """

    due: float
    kept: float
    linger: float = 60.0
    look: float = 30.0
    drain: float = 10.0


class Books:
    """The log of usage as one process has it: *opening* it may start a server.

    With *always* it is open all the time, else while it is *wanted* by others anyway, and as *habits* say. Facts are taken while the
    ``gate`` is open.
    """

    def __init__(
        self, opening: Opening, backlog: Backlog, habits: Habits, *, always: bool = False, wanted: Callable[[], bool] = lambda: False
    ) -> None:
        self.gate = Gate()
        self.gate.turn(False)
        self._opening, self._backlog, self._habits = opening, backlog, habits
        self._always, self._wanted = always, wanted
        self._changing = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._store: UsageLog | None = None
        self._used = 0.0
        self._waiting = self._written = self._reading = 0
        self._queue: list[tuple[Spent, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look, and open what is always open; raises what opening raises."""
        if self._always:
            await self._open()
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Let everything go: who still writes is told that it is not written."""
        await ended(self._looking, self._writing, again=LONG)
        await self._shut()

    def facts(self) -> Mapping[str, Any]:
        """What a process tells of it: whether it is open, how many facts waited at the last look, and how many it has written."""
        return {"open": self._store is not None, "waiting": self._waiting, "written": self._written}

    # --- writing and reading ------------------------------------------------------------------------------------------

    async def record(self, spent: Spent) -> None:
        """Write *spent* down, with what others bring meanwhile; raises ``StoreUnavailable``, ``BadRequest`` and ``CannotStart``."""
        kept = asyncio.get_running_loop().create_future()
        self._queue.append((spent, kept))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await kept

    async def by_day(self, since: datetime, until: datetime, tenant: str | None = None) -> tuple[list[SpentDay], int]:
        """See ``ports.UsageLog``; what waits is written first, and how many facts still do is told as well. Raises what opening raises."""
        self._reading += 1
        try:
            await self._open()
            await self._opened().by_day(since, since)  # a store that is away is told of before anything is waited for
            left = await self._backlog.drained(self._habits.drain)
            return await self._opened().by_day(since, until, tenant), left
        finally:
            self._reading -= 1
            self._used = time.monotonic()

    async def _write(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue[:_AT_ONCE], self._queue[_AT_ONCE:]
                try:
                    await self._keep(batch)
                except asyncio.CancelledError:
                    self._queue = batch + self._queue
                    raise
        finally:
            self._writing = None
            for _, kept in self._queue:
                _settle(kept, StoreUnavailable("usage is not written any more by this process"))
            self._queue = []

    async def _keep(self, batch: Sequence[tuple[Spent, asyncio.Future[None]]]) -> None:
        try:
            await self._opened().record(*(spent for spent, _ in batch))
        except BadRequest as error:
            if len(batch) == 1:
                return _settle(batch[0][1], error)
            for each in batch:  # one of them is to blame, and the others are not to suffer for it
                await self._keep([each])
            return None
        except Exception as error:  # noqa: BLE001  it is raised in whoever brought the facts
            for _, kept in batch:
                _settle(kept, error)
            return None
        self._written += len(batch)
        for _, kept in batch:
            _settle(kept)
        return None

    def _opened(self) -> UsageLog:
        if self._store is None:
            raise StoreUnavailable("the log of usage is not open now")
        return self._store

    # --- open and shut ------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async with self._changing:
            if self._store is None:
                self._store = await self._stack.enter_async_context(self._opening())
                log.info("usage_opened")
            self._used = time.monotonic()
            self.gate.turn(True)

    async def _shut(self, age: float | None = None) -> None:
        """Shut it; unless it is needed, where the *age* of the oldest fact that waits is told."""
        async with self._changing:
            if age is not None and self._is_needed(age):
                return  # somebody has come meanwhile
            self.gate.turn(False)
            if self._store is not None:
                self._store = None
                log.info("usage_shut")
            await self._stack.aclose()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._habits.look)
            try:
                await self.look()
            except CapibaraError as error:
                log.warning("usage_waits", waiting=self._waiting, error=repr(error))
            except Exception:  # noqa: BLE001  whatever it is, the next look may do better, and this one is told in full
                log.exception("usage_waits", waiting=self._waiting)

    async def look(self) -> None:
        """Open what is due or wanted, shut what nobody needs, and tell what is lost, or soon may be. Raises what opening raises."""
        before, self._waiting = self._waiting, await self._backlog.count()
        since = await self._backlog.since() if self._waiting else None
        age = 0.0 if since is None else time.time() - since
        if self._store is None:
            if self._waiting < before:
                log.warning("usage_gone", facts=before - self._waiting, reason="erased, or not written down before the log forgot them")
            if self._wanted() or age > self._habits.due:
                await self._open()
        else:
            await self._shut(age)
        if self._waiting and age > 0.8 * self._habits.kept:
            log.error("usage_soon_forgotten", facts=self._waiting, oldest_seconds=round(age), kept_seconds=self._habits.kept)

    def _is_needed(self, age: float) -> bool:
        """Whether the store is to stay open, when the oldest fact that waits is so old."""
        lately = time.monotonic() - self._used <= self._habits.linger
        return lately or self._always or self._wanted() or self._reading > 0 or age > self._habits.linger


def _settle(kept: "asyncio.Future[None]", error: Exception | None = None) -> None:
    if kept.done():
        return  # whoever waited has gone
    if error is None:
        kept.set_result(None)
    else:
        kept.set_exception(error)
