"""The door's side of the broker: publish a turn, follow its output from any machine, stop it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import stamina
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from capibara_flow.domain.reading import Cursor, Verdict
from capibara_flow.errors import BrokerUnavailable, QueueFull, TooLarge
from capibara_flow.ports import Batch, Identity
from capibara_flow.runtime.client import TokenClient, header
from capibara_flow.runtime.output import fits, last_message, stored
from capibara_flow.telemetry import log
from topics.chat import CancelTurn, RouteTurn
from topics.message import DEADLINE, PRINCIPAL, TENANT, Message
from topics.output import FINALS, event_of
from topics.streams import Consumer

#: JetStream's codes for "maximum messages exceeded" and "maximum bytes exceeded".
_FULL = {10077, 10076, 10054}
_MOST_PENDING = 2000
_IDLE_FIRST, _IDLE_MOST = 1.0, 5.0  # seconds between polls of a silent turn: the tail of a feed can be lost unseen


def _batch(sequence: int, data: bytes) -> Batch:
    lines = tuple(data.split(b"\n"))
    return Batch(sequence, lines, event_of(lines[-1]) in FINALS)


class Follower:
    """One reader of one branch: the live feed, healed from the stream."""

    def __init__(self, client: TokenClient, turn: str, branch: str, after: int) -> None:
        self._client = client
        self._turn, self._branch = turn, branch
        self._cursor = Cursor(after)
        self._pending: list[tuple[int, int, bytes]] = []
        self._arrived = asyncio.Event()

    async def start(self) -> None:
        """Listen. What is published on this connection from now on, and what it causes, will be heard."""
        self._subscription = await self._client.listen(f"cf.live.{self._turn}.{self._branch}", self._receive)

    async def stop(self) -> None:
        """Listen no more."""
        await self._client.deafen(self._subscription)

    async def batches(self, *, backfill: bool) -> AsyncIterator[Sequence[Batch]]:
        """Every batch once and in order, to the final one; several that are there together come together."""
        idle = _IDLE_FIRST
        if backfill and (found := await self._heal()):
            yield found
            if found[-1].final:
                return
        while True:
            found = await self._arrivals(idle)
            idle = _IDLE_FIRST if found else min(idle * 2, _IDLE_MOST)
            if found:
                yield found
                if found[-1].final:
                    return

    async def _arrivals(self, idle: float) -> list[Batch]:
        """What has arrived; after *idle* seconds of silence, what the stream has that never arrived."""
        if not self._pending:
            self._arrived.clear()
            try:
                async with asyncio.timeout(idle):
                    await self._arrived.wait()
            except TimeoutError:
                return await self._heal()
        found: list[Batch] = []
        pending, self._pending = self._pending, []
        for sequence, previous, data in pending:
            verdict = self._cursor.judge(sequence, previous)
            if verdict is Verdict.GAP:
                found += await self._heal()
            elif verdict is Verdict.DELIVER:
                found.append(_batch(sequence, data))
            if found and found[-1].final:
                break
        return found

    async def _heal(self) -> list[Batch]:
        """What the stream has behind the cursor. A broker that is away now is asked again at the next silence."""
        found: list[Batch] = []
        subject = f"cf.out.{self._turn}.data.{self._branch}"
        while True:
            try:
                messages = await stored(self._client, subject, self._cursor.last)
            except BrokerUnavailable as error:
                log.warning("output_unreadable", turn=self._turn, error=str(error))
                return found
            before = self._cursor.last
            for each in messages:
                if self._cursor.stored(each.sequence):
                    found.append(_batch(each.sequence, each.data))
                    if found[-1].final:
                        return found
            if self._cursor.last == before:
                return found

    async def _receive(self, _: bytes, headers: bytes, data: bytes) -> None:
        if len(self._pending) >= _MOST_PENDING:
            # A client too slow for the feed: the stream is the buffer, the gap will show and be healed from there.
            self._pending.clear()
        self._pending.append((int(header(headers, b"Nats-Sequence")), int(header(headers, b"Nats-Last-Sequence")), data))
        self._arrived.set()


class NatsTurns:
    """``ports.Turns`` on NATS; *consumers* are those without which a turn cannot be served."""

    def __init__(self, client: TokenClient, consumers: tuple[Consumer, ...]) -> None:
        self._client = client
        self._jetstream = client.jetstream()
        self._consumers = consumers
        self._opened = self._following = 0

    async def open(self, command: RouteTurn, identity: Identity, deadline: float) -> AsyncIterator[Sequence[Batch]]:
        follower = Follower(self._client, command.turn, "main", 0)
        await follower.start()
        try:
            await self._publish(command, identity, deadline)
        except BaseException:
            await follower.stop()
            raise
        self._opened += 1
        reading = self._reading(follower, backfill=False)
        await anext(reading)  # begun, it tidies up even if nobody ever reads it
        return reading

    async def follow(self, turn: str, after: int = 0) -> AsyncIterator[Sequence[Batch]]:
        follower = Follower(self._client, turn, "main", after)
        await follower.start()
        async with aclosing(self._reading(follower, backfill=True)) as reading:
            await anext(reading)
            async for batches in reading:
                yield batches

    async def _reading(self, follower: Follower, *, backfill: bool) -> AsyncGenerator[Sequence[Batch], None]:
        """What *follower* finds, after an empty beginning."""
        self._following += 1
        try:
            yield ()
            async for batches in follower.batches(backfill=backfill):
                yield batches
        finally:
            self._following -= 1
            await follower.stop()

    async def _publish(self, message: Message, identity: Identity, deadline: float) -> None:
        headers = {
            "Nats-Msg-Id": message.dedupe,
            "content-type": "application/json",
            TENANT: identity.tenant,
            PRINCIPAL: identity.principal,
            DEADLINE: f"{deadline:.3f}",
        }
        body = message.model_dump_json(exclude_none=True).encode()
        if not fits(self._client, body):
            raise TooLarge(f"{len(body)} bytes are more than the broker takes at once")
        try:
            # The same id again is stored once, so asking again is safe while a leader is being elected.
            async for attempt in stamina.retry_context(on=(TimeoutError, NoStreamResponseError), attempts=5, timeout=15, wait_max=3):
                with attempt:
                    await self._jetstream.publish(message.subject, body, timeout=5, headers=headers)
        except APIError as error:
            if error.err_code in _FULL:
                raise QueueFull("too many turns are waiting; try again later") from error
            raise BrokerUnavailable(f"the turn was not accepted: {error.description}") from error
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable("the broker does not accept turns now") from error

    async def exists(self, turn: str) -> bool:
        """Whether output of *turn* is stored."""
        return await last_message(self._client, f"cf.out.{turn}.data.main") is not None

    async def cancel(self, turn: str, reason: str) -> None:
        signal = CancelTurn(turn=turn, reason=reason)
        try:
            await self._jetstream.publish(signal.subject, signal.model_dump_json().encode(), timeout=5)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable("the broker does not take the cancellation now") from error

    async def ready(self) -> dict[str, str]:
        if not self._client.is_connected:
            return {"broker": "not connected"}
        checks = await asyncio.gather(*(self._waiting(each) for each in self._consumers))
        return {consumer.durable: missing for consumer, missing in zip(self._consumers, checks, strict=True) if missing}

    async def _waiting(self, consumer: Consumer) -> str | None:
        """Why nobody takes work of *consumer*, or none when somebody does."""
        try:
            info = await self._jetstream.consumer_info(consumer.stream, consumer.durable)
        except NotFoundError:
            return "has not been provisioned"
        except (NatsError, TimeoutError) as error:
            return f"broker: {error!r}"
        return None if info.num_waiting or info.num_ack_pending else "no worker is taking work"

    def facts(self) -> dict[str, Any]:
        return {"turns_opened": self._opened, "streams_open": self._following, "connected": self._client.is_connected}
