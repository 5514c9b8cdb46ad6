"""How work ends at the broker: every message is heartbeaten while it is worked on, timed, and settled once. And how facts are kept."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Protocol

from faststream import BaseMiddleware, ContextRepo
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, LeaseLost, Terminal, TurnExpired
from capibara_flow.runtime import work
from capibara_flow.telemetry import SETTLED, STAGE_SECONDS, log
from topics.flow import Hop
from topics.streams import Consumer

_HELD_OFTEN = 10  # deliveries for each attempt, at most: others were held, and given back or lost with who held them


class Retrying(Protocol):
    """What keeping facts needs to know of a worker."""

    hop: Hop

    @property
    def retry_seconds(self) -> float:
        """How long a message waits before it comes again after a transient error."""
        ...


class Place(Retrying, Protocol):
    """What settling needs of a stage."""

    def consumer_of(self, message: Msg) -> Consumer:
        """The consumer that *message* came by."""
        ...

    async def restore(self) -> None:
        """Create the streams that every turn needs, should they have disappeared."""
        ...

    async def give_up(self, message: Msg, error: CapibaraError) -> None:
        """End the turn and keep the command."""
        ...


class Settle(BaseMiddleware[Any, Any]):
    """Around every work message: a heartbeat while it is worked on, and one of ack, nak or term at the end."""

    __slots__ = ("_beat", "_stage", "_started")

    def __init__(self, message: Any, stage: Place, /, *, context: ContextRepo) -> None:
        super().__init__(message, context=context)
        self._stage = stage

    async def on_receive(self) -> None:
        work.begin(self.msg)
        self._started = time.perf_counter()
        interval = self._stage.consumer_of(self.msg).ack_wait / 3
        self._beat = asyncio.create_task(_heartbeat(self.msg, interval))

    async def consume_scope(self, call_next: Callable[[Any], Awaitable[Any]], msg: Any) -> Any:
        consumer = self._stage.consumer_of(self.msg)
        # What may have been held counts its attempts itself, when its turn is known; but it does not come for ever.
        if work.delivered() > consumer.max_deliver * (_HELD_OFTEN if consumer.held else 1):
            raise CapibaraError("nobody who tried came to an end")
        left = work.seconds_left()
        if left is not None and left <= 0:
            raise TurnExpired("the turn's deadline passed before its work was done")
        scope = asyncio.timeout(left)
        try:
            async with scope:
                return await call_next(msg)
        except TimeoutError as error:
            if scope.expired():
                because = f"; the last trouble was: {work.trouble()}" if work.trouble() else ""
                raise TurnExpired(f"the turn's deadline passed before its work was done{because}") from error
            raise

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> bool | None:
        try:
            how = await self._settle(exc_val)
        except (CapibaraError, NatsError, TimeoutError) as error:
            # Nothing is settled: the message comes again when its time is up.
            how = "unsettled"
            log.warning("work_unsettled", stage=self._stage.hop.worker, subject=self.msg.subject, error=repr(error))
        finally:
            self._beat.cancel()
        stage = self._stage.hop.worker
        SETTLED.labels(stage, how).inc()
        STAGE_SECONDS.labels(stage).observe(time.perf_counter() - self._started)
        return not isinstance(exc_val, asyncio.CancelledError)

    async def _settle(self, error: BaseException | None) -> str:
        if error is None:
            await self.msg.ack()  # unconfirmed: should it get lost, the work comes again and finds itself done
            return "done"
        if isinstance(error, asyncio.CancelledError):
            await self.msg.nak()  # we are being stopped: somebody else may start at once
            return "handed_over"
        left = work.seconds_left()
        in_time = left is None or left > self._stage.retry_seconds
        final = _as_final(error, last=not in_time or work.deliveries() >= self._stage.consumer_of(self.msg).max_deliver)
        facts = {"stage": self._stage.hop.worker, "subject": self.msg.subject, "error": repr(error), "final": final is not None}
        log.warning("work_failed", **facts, exc_info=None if isinstance(error, CapibaraError) else error)
        if isinstance(error, LeaseLost):
            # Somebody else has this very message at work: if he falls silent it comes again by itself, but not for our asking.
            return "overtaken"
        if isinstance(error, BrokerUnavailable):
            await self._stage.restore()
        if final is None:
            await self.msg.nak(delay=self._stage.retry_seconds)
            return "again"
        await self._stage.give_up(self.msg, final)
        await self.msg.term()
        return "given_up"


_LONGEST = 20.0  # seconds after which a fact that could not be kept comes again, at most


class Keep(BaseMiddleware[Any, Any]):
    """Around every fact: it is acknowledged once it is kept; one that can never be kept is told to the log, and let go.

    Nobody waits for it, so that there is no deadline: what fails for a while comes again, as long as its stream has it.
    """

    __slots__ = ("_place",)

    def __init__(self, message: Any, place: Retrying, /, *, context: ContextRepo) -> None:
        super().__init__(message, context=context)
        self._place = place

    async def on_receive(self) -> None:
        work.begin(self.msg)

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> bool | None:
        try:
            how = await self._settle(exc_val)
        except (NatsError, TimeoutError) as error:
            how = "unsettled"  # it comes again when its time is up
            log.warning("fact_unsettled", subject=self.msg.subject, error=repr(error))
        SETTLED.labels(self._place.hop.worker, how).inc()
        return not isinstance(exc_val, asyncio.CancelledError)

    async def _settle(self, error: BaseException | None) -> str:
        if error is None:
            await self.msg.ack()  # unconfirmed: should it get lost, the fact comes again and is kept already
            return "done"
        if isinstance(error, asyncio.CancelledError):
            await self.msg.nak()
            return "handed_over"
        facts = {"stage": self._place.hop.worker, "subject": self.msg.subject, "error": repr(error)}
        if isinstance(error, BadRequest):
            log.error("fact_rejected", **facts)
            await self.msg.term()
            return "given_up"
        log.warning("fact_not_kept_yet", **facts, exc_info=None if isinstance(error, CapibaraError) else error)
        await self.msg.nak(delay=min(_LONGEST, self._place.retry_seconds * 2 ** min(work.delivered() - 1, 8)))
        return "again"


def _as_final(error: BaseException, *, last: bool) -> CapibaraError | None:
    """The error to end the turn with, or none when the message shall come again."""
    if isinstance(error, LeaseLost):
        return None  # whoever took the lease will end the turn
    if isinstance(error, Terminal):
        return error
    if not last:
        return None
    return error if isinstance(error, CapibaraError) else CapibaraError("an unexpected fault; the log has the details")


async def _heartbeat(message: Msg, interval: float) -> None:
    while True:
        await asyncio.sleep(interval)
        try:
            await message.in_progress()
        except NatsError as error:
            log.warning("heartbeat_failed", subject=message.subject, error=repr(error))
