"""A hop of the map becomes a subscription and a ``say``; every message is heartbeaten, timed and settled here.

The subscriber is FastStream's, with its decoding, validation, middlewares and AsyncAPI; only the way that it fetches is ours
(``Pump``), because FastStream's own loop takes more messages than it has hands and spins when its consumer is gone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

from faststream import AckPolicy, BaseMiddleware, ContextRepo
from faststream.message import StreamMessage
from faststream.nats import JStream, NatsBroker, PullSub
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError
from pydantic import ValidationError

from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, LeaseLost, Terminal, TurnExpired
from capibara_flow.ports import Answers
from capibara_flow.runtime.output import fits, publish_once
from capibara_flow.runtime.provision import ensure_consumer, ensure_stream
from capibara_flow.runtime.pump import Pump
from capibara_flow.telemetry import SETTLED, STAGE_SECONDS, log
from topics.chat import TurnFailed
from topics.flow import Hop
from topics.message import DEADLINE, PRINCIPAL, TENANT, TRACE, Command, Message
from topics.output import Failed, Output
from topics.streams import Consumer, Layout

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[None]])

_CARRIED = (TENANT, PRINCIPAL, DEADLINE, TRACE)
_work: ContextVar[Msg] = ContextVar("work")


def carried() -> dict[str, str]:
    """The headers of the message at work that everything said about its turn carries on."""
    headers: Mapping[str, str] = _work.get().headers or {}
    return {name: headers[name] for name in _CARRIED if name in headers}


def tenant() -> str:
    """Whose turn is at work."""
    return carried().get(TENANT, "")


def attempt() -> int:
    """How often the message at work has been delivered, this time included."""
    return int(_work.get().metadata.num_delivered)


class Stage:
    """A worker's place at the broker: what it takes, how it says, how its failures end."""

    def __init__(self, broker: NatsBroker, hop: Hop, answers: Answers, *, layout: Layout | None = None, retry_seconds: float = 2.0) -> None:
        self.hop = hop
        self._broker = broker
        self._answers = answers
        self._layout = layout or Layout()
        self._retry_seconds = retry_seconds
        self._consumers: dict[str, Consumer] = {}
        broker.add_middleware(self._settling)
        for message in hop.speaks:
            broker.publisher(message.pattern, schema=message, title=message.__name__)

    def _settling(self, message: Any, /, *, context: ContextRepo) -> "Settle":
        return Settle(message, self, context=context)

    def takes(self, consumer: Consumer, *, permits: int) -> Callable[[Handler], Handler]:
        """Subscribe a handler of the hop's command to *consumer*, *permits* messages at once."""
        subscriber = self._broker.subscriber(
            self.hop.consumes.pattern if consumer.filter == self.hop.consumes.subjects() else consumer.filter,
            stream=JStream(consumer.stream, declare=False),
            durable=consumer.durable,
            pull_sub=PullSub(batch_size=permits),
            decoder=self._understand,
            config=ConsumerConfig(ack_wait=consumer.ack_wait),
            ack_policy=AckPolicy.MANUAL,
            no_reply=True,
            title=f"{self.hop.consumes.__name__} at {consumer.durable}",
        )
        self._consumers[consumer.filter] = consumer
        _pump_instead(subscriber, consumer, permits, self._layout, self._broker.config.graceful_timeout or 0)
        return subscriber  # type: ignore[return-value]  # FastStream wraps the handler; callers use it as a decorator only

    async def _understand(self, message: StreamMessage[Msg]) -> Command:
        """The command that *message* carries; raises ``BadRequest``."""
        try:
            return self.hop.consumes.read(message.body)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BadRequest(f"a message that cannot be understood: {error.error_count()} problems, first: {problem}") from error

    async def say(self, *messages: Message) -> None:
        """Publish *messages* once each, in order; commands and output are stored when this returns.

        Raises ``BrokerUnavailable`` or ``TooLarge``.

        Refuses (``TypeError``) what the map does not list for this hop.
        """
        for message in messages:
            if type(message) not in self.hop.speaks:
                raise TypeError(f"{self.hop.worker} may not say {type(message).__name__}: topics.flow does not list it")
        # One connection keeps their order; the acknowledgements are waited for together.
        results = await asyncio.gather(*map(self._publish, messages), return_exceptions=True)
        if faults := [result for result in results if result is not None]:
            raise faults[0]

    async def _publish(self, message: Message) -> None:
        headers = {"Nats-Msg-Id": message.dedupe, "content-type": "application/json", **carried()}
        body = message.line() if isinstance(message, Output) else message.model_dump_json(exclude_none=True).encode()
        if not isinstance(message, Command | Output):
            # A fact for the log: the turn does not wait for it, and a switched-off log is no fault.
            await self._broker.publish(body, message.subject, headers=headers)
            return
        await self._store(message.subject, body, headers)

    async def _store(self, subject: str, body: bytes, headers: dict[str, str]) -> None:
        """Store a message; raises ``BrokerUnavailable`` or ``TooLarge``."""
        state = self._broker.config.connection_state
        try:
            await publish_once(state.connection, state.stream, subject, body, headers)
        except (NatsError, APIError, TimeoutError) as error:
            raise BrokerUnavailable(f"{subject} was not stored: {error}") from error

    async def give_up(self, message: Msg, error: CapibaraError) -> None:
        """End the turn with an honest ``Failed`` and keep the command for inspection; raises ``LeaseLost``."""
        turn = message.subject.split(".")[2]
        failed = Failed(turn=turn, title=error.title, status=error.status, detail=str(error), retryable=error.retryable)
        async with self._answers.open(turn, "main") as answer:
            if not (answer.said and answer.said[-1].final):
                await answer.finish(failed)
        body = message.data.decode("utf-8", "replace")
        dead = TurnFailed(turn=turn, stage=self.hop.worker, title=error.title, detail=str(error), body=body)
        line = dead.model_dump_json().encode()
        connection = self._broker.config.connection_state.connection
        if not fits(connection, line):  # what just fitted as it was does not as a string inside JSON
            line = dead.model_copy(update={"body": body[: connection.max_payload // 8]}).model_dump_json().encode()
        headers = {"Nats-Msg-Id": f"{dead.dedupe}:{dead.stage}", "content-type": "application/json", **carried()}
        await self._store(dead.subject, line, headers)

    async def restore(self) -> None:
        """Create the streams that every turn needs, should they have disappeared."""
        jetstream = self._broker.config.connection_state.stream
        for name in ("CF_OUT", "CF_CTL"):
            await ensure_stream(jetstream, self._layout.named(name))

    def consumer_of(self, message: Msg) -> Consumer:
        """The consumer that *message* came by."""
        durable = message.metadata.consumer
        return next(each for each in self._consumers.values() if each.durable == durable)

    @property
    def retry_seconds(self) -> float:
        """How long a message waits before it comes again after a transient error."""
        return self._retry_seconds


def _pump_instead(subscriber: Any, consumer: Consumer, permits: int, layout: Layout, graceful_seconds: float) -> None:
    """Let *subscriber* be fed by a ``Pump``: a private hook of FastStream 0.7, held in place by a test."""
    stop = subscriber.stop

    async def create() -> None:
        if subscriber.subscription is not None:
            return
        jetstream = subscriber.jetstream

        async def ensure() -> None:
            await ensure_stream(jetstream, layout.named(consumer.stream))
            await ensure_consumer(jetstream, consumer)

        pump = Pump(subscriber.connection, consumer.stream, consumer.durable, permits=permits, handle=subscriber.consume, ensure=ensure)
        subscriber.subscription = pump
        # FastStream drops messages until it calls itself running, which it does right after this returns.
        subscriber.running = True
        await pump.start()

    async def stop_pulling_first() -> None:
        if subscriber.subscription is not None:
            await subscriber.subscription.unsubscribe()
            await subscriber.subscription.finish(graceful_seconds)
        await stop()

    subscriber._create_subscription = create
    subscriber.stop = stop_pulling_first


class Settle(BaseMiddleware[Any, Any]):
    """Around every work message: a heartbeat while it is worked on, and one of ack, nak or term at the end."""

    __slots__ = ("_beat", "_stage", "_started")

    def __init__(self, message: Any, stage: Stage, /, *, context: ContextRepo) -> None:
        super().__init__(message, context=context)
        self._stage = stage

    async def on_receive(self) -> None:
        _work.set(self.msg)
        self._started = time.perf_counter()
        interval = self._stage.consumer_of(self.msg).ack_wait / 3
        self._beat = asyncio.create_task(_heartbeat(self.msg, interval))

    async def consume_scope(self, call_next: Callable[[Any], Awaitable[Any]], msg: Any) -> Any:
        if attempt() > self._stage.consumer_of(self.msg).max_deliver:
            raise CapibaraError("nobody who tried came to an end")
        deadline = (self.msg.headers or {}).get(DEADLINE)
        left = None if deadline is None else float(deadline) - time.time()
        if left is not None and left <= 0:
            raise TurnExpired("the turn's deadline passed before its work began")
        scope = asyncio.timeout(left)
        try:
            async with scope:
                return await call_next(msg)
        except TimeoutError as error:
            if scope.expired():
                raise TurnExpired("the turn's deadline passed before its work was done") from error
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
        final = _as_final(error, last=attempt() >= self._stage.consumer_of(self.msg).max_deliver)
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
