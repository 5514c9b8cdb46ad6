"""A hop of the map becomes a subscription and a ``say``.

The subscriber is FastStream's, with its middlewares, context and AsyncAPI. What comes is validated by the map's own messages, once; and
the way that it fetches is ours (``Pump``), because FastStream's own loop takes more messages than it has hands and spins when its consumer
is gone.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from faststream import AckPolicy, BaseMiddleware, ContextRepo
from faststream.message import StreamMessage
from faststream.nats import JStream, NatsBroker, PullSub
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError
from pydantic import ValidationError

from capibara_flow.domain.continuing import failing, held
from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, LeaseLost, QueueFull, Transient
from capibara_flow.ports import Answers
from capibara_flow.runtime import work
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.lease import WRONG_SEQUENCE, unbegun
from capibara_flow.runtime.output import FULL, fits, publish_once
from capibara_flow.runtime.provision import ensure_consumer, ensure_stream
from capibara_flow.runtime.pump import Pump
from capibara_flow.runtime.queues import Ensure, Queues
from capibara_flow.runtime.settling import Keep, Settle
from capibara_flow.telemetry import log
from topics.chat import CallExpert, TurnFailed
from topics.flow import Hop
from topics.message import Command, Message, Part, Request, Signal
from topics.output import Output, Waiting
from topics.streams import LANES, Consumer, Layout

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[None]])

_REQUESTS = 16  # replied to at once


class Intake:
    """What a worker takes at the broker, and which requests it replies to; how its work ends is for those below."""

    def __init__(
        self, broker: NatsBroker, hop: Hop, *, layout: Layout | None = None, queues: Queues | None = None, retry_seconds: float = 2.0
    ) -> None:
        self.hop = hop
        self._broker = broker
        self._layout = layout or Layout()
        self._queues = queues
        self._retry_seconds = retry_seconds
        self._consumers: dict[str, Consumer] = {}
        self._taken: dict[tuple[str, int], Any] = {}
        broker.add_middleware(self._settling)

    def _settling(self, message: Any, /, *, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        if isinstance(message, Msg) and message.reply.startswith("$JS.ACK."):
            return self._settler(message, context)
        return BaseMiddleware(message, context=context)  # a request: it waits for its reply, and nobody brings it again

    def _settler(self, message: Msg, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        """What settles *message*."""
        raise NotImplementedError

    def _around(self, handler: Callable[..., Awaitable[None]], gate: Gate | None) -> Callable[..., Awaitable[None]]:
        """*handler*, as it is called with each message."""
        return handler

    def serves(self, request: type[Request]) -> Callable[[Callable[..., Awaitable[Part]]], object]:
        """Let a handler reply to *request*, one process of all that serve it."""
        if request not in self.hop.serves:
            raise TypeError(f"{self.hop.worker} does not serve {request.__name__}: topics.flow does not list it")

        async def understand(message: StreamMessage[Msg]) -> Request:
            try:
                return request.read(message.body)
            except ValidationError as error:  # who asked it is told nothing: it is not one of ours
                log.warning("request_not_understood", stage=self.hop.worker, request=request.__name__, problems=error.error_count())
                raise

        queue, title = self.hop.worker, request.__name__
        return self._broker.subscriber(request.pattern, queue=queue, max_workers=_REQUESTS, decoder=understand, title=title)

    def takes(self, consumer: Consumer, *, permits: int, gate: Gate | None = None) -> Callable[[Handler], Handler]:
        """Subscribe a handler of what the hop consumes to *consumer*, *permits* messages at once, and none while *gate* is shut."""
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
        self._taken[consumer.durable, permits] = subscriber
        _pump_instead(
            subscriber, consumer, permits, self._ensuring(subscriber), self._broker.config.graceful_timeout or 0, gate, self._queues
        )

        def subscribe(handler: Handler) -> Handler:
            subscriber(self._around(handler, gate))
            return handler

        return subscribe

    def _ensuring(self, subscriber: Any) -> Ensure:
        """Makes, of a consumer that *subscriber* takes from, what creates it where it is missing."""

        def ensuring(consumer: Consumer) -> Callable[[], Awaitable[None]]:
            self._consumers[consumer.filter] = consumer

            async def ensure() -> None:
                await ensure_stream(subscriber.jetstream, self._layout.named(consumer.stream))
                await ensure_consumer(subscriber.jetstream, consumer)

            return ensure

        return ensuring

    async def _understand(self, message: StreamMessage[Msg]) -> Message:
        """What *message* carries; raises ``BadRequest``."""
        try:
            return self.hop.consumes.read(message.body)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BadRequest(f"a message that cannot be understood: {error.error_count()} problems, first: {problem}") from error

    def consumer_of(self, message: Msg) -> Consumer:
        """The consumer that *message* came by."""
        durable = message.metadata.consumer
        return next(each for each in self._consumers.values() if each.durable == durable)

    @property
    def retry_seconds(self) -> float:
        """How long a message waits before it comes again after a transient error."""
        return self._retry_seconds


class Facts(Intake):
    """The place of a worker that takes facts of the log: nobody waits for it, and it says nothing."""

    def _settler(self, message: Msg, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        return Keep(message, self, context=context)


class Stage(Intake):
    """A worker's place at the broker, where it works on turns: what it takes, how it says, how its failures end.

    What goes wrong for a while is tried again here, so that deliveries count only the attempts that processes did not survive. But a
    shut gate means that others can do what this process cannot: it is left to them then.
    """

    def __init__(
        self,
        broker: NatsBroker,
        hop: Hop,
        answers: Answers,
        *,
        layout: Layout | None = None,
        lanes: Lanes | None = None,
        queues: Queues | None = None,
        retry_seconds: float = 2.0,
        patience_seconds: float | None = None,
    ) -> None:
        super().__init__(broker, hop, layout=layout, queues=queues, retry_seconds=retry_seconds)
        self._answers = answers
        self._lanes = lanes
        self._patience_seconds = patience_seconds
        for message in hop.speaks:
            broker.publisher(message.pattern, schema=message, title=message.__name__)

    def _settler(self, message: Msg, context: ContextRepo) -> BaseMiddleware[Any, Any]:
        return Settle(message, self, context=context)

    async def take_only(self, wanted: Mapping[Consumer, int], gate: Callable[[Consumer], Gate | None], handler: Handler) -> None:
        """While running: let *handler* take from *wanted* (permits by consumer) and nothing else; what is at work goes on to its end."""
        keep = {(consumer.durable, permits) for consumer, permits in wanted.items()}
        gone = [self._taken.pop(each) for each in self._taken.keys() - keep]
        if self._queues:
            for subscriber in gone:
                self._queues.leave(subscriber.subscription)
        await asyncio.gather(*(subscriber.subscription.unsubscribe() for subscriber in gone))
        for consumer, permits in wanted.items():
            if (consumer.durable, permits) not in self._taken:
                self.takes(consumer, permits=permits, gate=gate(consumer))(handler)
                await self._taken[consumer.durable, permits].start()

    def _around(self, handler: Callable[..., Awaitable[None]], gate: Gate | None) -> Callable[..., Awaitable[None]]:
        """*handler*, tried again after transient errors: at once, then with pauses, as long as this delivery's share of the time lasts."""

        @functools.wraps(handler)
        async def patient(command: Message) -> None:
            until = time.monotonic() + self._patience()
            while True:
                began = time.monotonic()
                try:
                    if work.comes_late() and await self._answers.erased(command.turn):
                        return None  # somebody who was paused, or waited, comes back to what shall not be known any more
                    await self._count(command)
                    return await handler(command)
                except LeaseLost:
                    raise
                except Transient as error:
                    # An attempt that lasted has come somewhere: the next one goes on from there without a pause.
                    lasted = work.tries() == 0 or time.monotonic() - began > self._retry_seconds
                    pause = 0.0 if lasted else self._retry_seconds
                    if time.monotonic() + pause >= until or self._is_for_others(gate):
                        raise
                    await self._wait(command, error, pause)

        return patient

    async def _count(self, command: Message) -> None:
        """Of a message that comes again, see how often it was really begun with; raises ``CapibaraError`` when that was too often."""
        consumer = self.consumer_of(work.message())
        if consumer.held and work.delivered() > 1 and not work.tries():
            work.begun(await self._answers.begun(command.turn, getattr(command, "branch", "main")))
            if work.deliveries() > consumer.max_deliver:
                raise CapibaraError("nobody who tried came to an end")

    def _is_for_others(self, gate: Gate | None) -> bool:
        """Whether the message at work should go back: others can do it, and there is a delivery left for them."""
        return gate is not None and not gate.is_open and work.deliveries() < self.consumer_of(work.message()).max_deliver

    def _patience(self) -> float:
        """The share of the time left to a turn that one delivery may take: others may reach what this process cannot."""
        left = work.seconds_left()
        if left is None:
            return self._patience_seconds or 0.0
        share = left / max(1, self.consumer_of(work.message()).max_deliver - work.deliveries() + 1)
        return share if self._patience_seconds is None else min(share, self._patience_seconds)

    async def _wait(self, command: Message, error: Transient, pause: float) -> None:
        """Let *pause* seconds pass before the next try, and the client know what it waits for."""
        work.try_again(error)
        log.warning("work_tried_again", stage=self.hop.worker, turn=command.turn, error=repr(error), pause=pause)
        with suppress(CapibaraError, NatsError, TimeoutError):  # what the broker refuses now, the next try meets again
            if isinstance(error, BrokerUnavailable):
                await self.restore()
            elif pause:
                await self.say(self.waiting(command.turn, error))
        await asyncio.sleep(pause)

    def waiting(self, turn: str, error: Transient, passed: int = 0) -> Waiting:
        """What the client is told while *turn* waits because of *error*, after it was *passed* on so often."""
        return Waiting(turn=turn, stage=self.hop.worker, title=error.title, reason=str(error), attempt=work.attempt() + passed)

    async def say(self, *messages: Message) -> None:
        """Publish *messages* once each; commands and output are stored when this returns, in order unless one has to be published again.

        Raises ``BrokerUnavailable``, ``QueueFull`` or ``TooLarge``.

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
        headers = {"Nats-Msg-Id": message.dedupe, "content-type": "application/json", **work.carried()}
        body = message.line() if isinstance(message, Output) else message.model_dump_json(exclude_none=True).encode()
        if not isinstance(message, Command | Signal | Output):
            # A fact for the log: the turn does not wait for it. One that was switched off may still be there: it gets nothing more.
            if self._layout.log:
                await self._broker.config.connection_state.connection.publish(message.subject, body, headers=headers)
            return
        if isinstance(message, CallExpert) and self._lanes:
            await self._lanes.announce(message, work.tenant())
        if isinstance(message, Output) and message.opening:
            headers |= unbegun(message.subject)
        await self._store(message.subject, body, headers)

    async def _store(self, subject: str, body: bytes, headers: dict[str, str]) -> None:
        """Store a message, unless it comes too late; raises ``BrokerUnavailable``, ``QueueFull`` or ``TooLarge``."""
        state = self._broker.config.connection_state
        try:
            await publish_once(state.connection, state.stream, subject, body, headers)
        except APIError as error:
            if error.err_code in FULL:
                raise QueueFull("too many turns are waiting; try again later") from error
            if error.err_code != WRONG_SEQUENCE:
                raise BrokerUnavailable(f"{subject} was not stored: {error}") from error
            log.info("said_too_late", subject=subject)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"{subject} was not stored: {error}") from error

    async def give_up(self, message: Msg, error: CapibaraError) -> None:
        """End the turn with an honest ``Failed`` and keep the command for inspection; raises ``LeaseLost``."""
        turn = message.subject.split(".")[2]
        if await self._answers.erased(turn):
            return
        async with self._answers.open(turn, "main") as answer:
            if not held(answer.said).ended:
                await answer.finish(*failing(turn, answer.said, error))
        body = message.data.decode("utf-8", "replace")
        dead = TurnFailed(turn=turn, stage=self.hop.worker, title=error.title, detail=str(error), body=body)
        line = dead.model_dump_json().encode()
        connection = self._broker.config.connection_state.connection
        if not fits(connection, line):  # what just fitted as it was does not as a string inside JSON
            line = dead.model_copy(update={"body": body[: connection.max_payload // 8]}).model_dump_json().encode()
        headers = {"Nats-Msg-Id": f"{dead.dedupe}:{dead.stage}", "content-type": "application/json", **work.carried()}
        await self._store(dead.subject, line, headers)

    async def restore(self) -> None:
        """Create the streams that every turn needs, should they have disappeared."""
        jetstream = self._broker.config.connection_state.stream
        for name in ("CF_OUT", "CF_CTL", *((LANES,) if self._lanes else ())):
            await ensure_stream(jetstream, self._layout.named(name))


def _pump_instead(  # noqa: PLR0917  all are needed, once
    subscriber: Any, consumer: Consumer, permits: int, ensuring: Ensure, graceful_seconds: float, gate: Gate | None, queues: Queues | None
) -> None:
    """Let *subscriber* be fed by a ``Pump``: a private hook of FastStream 0.7, held in place by a test.

    With *queues* it takes from all lanes that *consumer* is the first of.
    """
    stop = subscriber.stop

    async def create() -> None:
        if subscriber.subscription is not None:
            return
        sharing = queues.sharing(consumer) if queues else None
        what = {"permits": permits, "handle": subscriber.consume, "ensure": ensuring(consumer), "gate": gate}
        what |= {"ack_wait": consumer.ack_wait, "sharing": sharing}
        pump = Pump(subscriber.connection, consumer.stream, consumer.durable, **what)
        subscriber.subscription = pump
        if queues:
            queues.serve(pump, consumer, ensuring)
        # FastStream drops messages until it calls itself running, which it does right after this returns.
        subscriber.running = True
        await pump.start()

    async def stop_pulling_first() -> None:
        if queues and subscriber.subscription is not None:
            queues.leave(subscriber.subscription)
        if subscriber.subscription is not None:
            await subscriber.subscription.unsubscribe()
            await subscriber.subscription.finish(graceful_seconds)
        await stop()

    subscriber._create_subscription = create
    subscriber.stop = stop_pulling_first
