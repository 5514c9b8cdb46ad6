"""The door's side of the broker: publish a turn, follow its output from any machine, stop it, have it erased."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from capibara_flow.domain.reading import Cursor, Verdict
from capibara_flow.errors import BrokerUnavailable, QueueFull, TooLarge, TurnUnknown
from capibara_flow.ports import Batch, Entry, Feed, Identity, Reply, Take
from capibara_flow.runtime.attending import Attendance, Seat
from capibara_flow.runtime.client import TokenClient, header
from capibara_flow.runtime.depositing import Deposit
from capibara_flow.runtime.history import History
from capibara_flow.runtime.kept import Kept
from capibara_flow.runtime.keys import Keys
from capibara_flow.runtime.output import FULL, OUT, cancel, publish_once, stored
from capibara_flow.runtime.reports import reports_or_none
from capibara_flow.runtime.requests import replied
from capibara_flow.runtime.room import Room
from capibara_flow.telemetry import log
from topics.chat import EXPIRED, ChatRequest, Decision, Erased, EraseTurn, PreviewRoute, RouteTurn
from topics.grounding import IngestDocument
from topics.message import DEADLINE, PRINCIPAL, TENANT, Message, Request
from topics.output import FINALS, event_of
from topics.streams import Consumer

_MOST_PENDING = 2000
_ERASE_SECONDS = 20.0
_PREVIEW_SECONDS = 10.0
_IDLE_FIRST, _IDLE_MOST = 1.0, 5.0  # seconds between polls of a silent turn: the tail of a feed can be lost unseen


def _batch(sequence: int, data: bytes) -> Batch:
    lines = tuple(data.split(b"\n"))
    return Batch(sequence, lines, event_of(lines[-1]) in FINALS)


class Follower:
    """One reader of one branch: the live feed, healed from the stream.

    While there is nothing of the turn at all, *expected* is awaited now and then; what it raises ends the reading.
    """

    def __init__(
        self, client: TokenClient, turn: str, branch: str, after: int, expected: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._client = client
        self._turn, self._branch = turn, branch
        self._cursor = Cursor(after)
        self._expected = expected
        self._pending: list[tuple[int, int, bytes]] = []
        self._take: Take | None = None
        self._refused: list[tuple[int, bytes]] = []
        self.ended = False
        self._heard = False
        self._idle = _IDLE_FIRST
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[bool] | None = None

    async def start(self) -> None:
        """Listen. What is published on this connection from now on, and what it causes, will be heard."""
        self._subscription = await self._client.listen(f"cf.live.{self._turn}.{self._branch}", self._receive)

    async def stop(self) -> None:
        """Listen no more."""
        await self._client.deafen(self._subscription)

    async def batches(self, *, backfill: bool) -> AsyncIterator[Sequence[Batch]]:
        """Every batch once and in order, to the final one; several that are there together come together."""
        found = await self._heal() if backfill else []
        while True:
            self.ended |= bool(found and found[-1].final)
            if found:
                yield found
            if self.ended:
                return
            found = await self._arrivals(self._idle)
            self._idle = _IDLE_FIRST if found else min(self._idle * 2, _IDLE_MOST)
            if not found and not self._cursor.last and self._expected:
                await self._expected()

    async def _arrivals(self, idle: float) -> list[Batch]:
        """What has arrived; after *idle* seconds of silence, what the stream has that never arrived."""
        if not self._pending and not await self._something(idle):
            return await self._heal()
        refused, self._refused = self._refused, []
        pending, self._pending = self._pending, []
        found = [_batch(sequence, data) for sequence, data in refused]
        for sequence, previous, data in pending:
            if self.ended or (found and found[-1].final):
                break
            verdict = self._cursor.judge(sequence, previous)
            if verdict is Verdict.GAP:
                found += await self._heal()
            elif verdict is Verdict.DELIVER:
                found.append(_batch(sequence, data))
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

    async def _something(self, idle: float) -> bool:
        """Wait for what has to be looked at; false after *idle* seconds without any word."""
        self._heard = False
        self._waiting = self._loop.create_future()
        self._timer = self._loop.call_later(idle, self._silence)
        try:
            return await self._waiting
        finally:
            self._waiting = None
            self._timer.cancel()

    def _silence(self) -> None:
        if self._waiting is None or self._waiting.done():
            return
        if self._heard:  # the tap took it
            self._heard = False
            self._listen_closely()
        else:
            self._waiting.set_result(False)

    def _listen_closely(self) -> None:
        """The turn speaks: should it fall silent, look soon."""
        self._timer.cancel()
        self._idle = _IDLE_FIRST
        self._timer = self._loop.call_later(self._idle, self._silence)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(True)

    def _receive(self, _: bytes, headers: bytes, data: bytes) -> None:
        sequence, previous = int(header(headers, b"Nats-Sequence")), int(header(headers, b"Nats-Last-Sequence"))
        if self._take is None or self._waiting is None or self._waiting.done():
            self._keep(sequence, previous, data)
            return
        self._heard = True
        if self._idle > _IDLE_FIRST:
            self._listen_closely()
        verdict = self._cursor.judge(sequence, previous)
        if verdict is Verdict.GAP:
            self._keep(sequence, previous, data)
        elif verdict is Verdict.DELIVER:
            self._offer(self._take, sequence, data)

    def _offer(self, take: Take, sequence: int, data: bytes) -> None:
        taken = False
        try:
            batch = _batch(sequence, data)
            taken = take(batch)
            self.ended = taken and batch.final
        except Exception as error:  # noqa: BLE001  the reader meets the same fault in its own task, where somebody is told
            log.warning("output_untaken", turn=self._turn, error=repr(error))
        if not taken:
            self._refused.append((sequence, data))
        if not taken or self.ended:
            self._wake()

    def _keep(self, sequence: int, previous: int, data: bytes) -> None:
        if len(self._pending) >= _MOST_PENDING:
            # A client too slow for the feed: the stream is the buffer, the gap will show and be healed from there.
            self._pending.clear()
        self._pending.append((sequence, previous, data))
        self._wake()

    def tap(self, take: Take) -> None:
        """See ``ports.Feed``."""
        self._take = take


class _Feed:
    """``ports.Feed``."""

    def __init__(self, follower: Follower, reading: AsyncGenerator[Sequence[Batch], None]) -> None:
        self.tap = follower.tap
        self.aclose = reading.aclose
        self._reading = reading

    def __aiter__(self) -> AsyncIterator[Sequence[Batch]]:
        return self._reading


class NatsTurns:
    """``ports.Turns`` on NATS; *consumers* are those without which a turn cannot be served.

    An attended turn without a reader is stopped after *abandon_seconds*. Output is kept for *turn_age* seconds.
    """

    def __init__(
        self,
        client: TokenClient,
        consumers: tuple[Consumer, ...],
        *,
        abandon_seconds: float = 15,
        turn_age: float = 3600,
    ) -> None:
        self._client = client
        self._jetstream = client.jetstream()
        self._consumers = consumers
        self._attendance = Attendance(client, abandon_seconds)
        self._kept = Kept(client, turn_age, consumers)
        self._keys = Keys(client)
        self._deposit = Deposit(client)
        self._history = History(client)
        self._room = Room(client, consumers)
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = self._following = 0

    def rely_on(self, consumers: Sequence[Consumer]) -> None:
        self._consumers = tuple(consumers)
        self._kept.rely_on(self._consumers)
        self._room.rely_on(self._consumers)

    async def open(
        self, command: RouteTurn | IngestDocument, identity: Identity, deadline: float, *, attended: bool = False, recalled: bool = False
    ) -> Feed:
        if isinstance(command, RouteTurn):
            await self._room.check()
        follower = Follower(self._client, command.turn, "main", 0)
        seat = Seat(self._attendance, command.turn, self._expire)
        await follower.start()
        # Before the turn, lest nobody attends it should this door die in between.
        if attended:
            seat.take(deadline)
        else:
            seat.watch(deadline, remember=recalled)
        try:
            await self._publish(command, identity, deadline)
        except BaseException as error:
            # Whatever else went wrong, the turn may be on its way: then nobody reads it.
            seat.leave(ended=isinstance(error, QueueFull | TooLarge))
            await follower.stop()
            raise
        self._opened += 1
        return await self._feed(follower, seat, backfill=False)

    async def follow(self, turn: str, after: int = 0) -> Feed:
        if after:
            after = await self._kept.resume(turn, after)
        else:
            await self._beginning(turn)
        follower = Follower(self._client, turn, "main", after, partial(self._beginning, turn))
        seat = Seat(self._attendance, turn, self._expire)
        await follower.start()
        seat.look()
        return await self._feed(follower, seat, backfill=True)

    async def _beginning(self, turn: str) -> None:
        """Raises ``TurnGone`` or ``TurnUnknown`` when *turn* has no beginning to wait for, as far as is known now."""
        try:
            await self._kept.beginning(turn)
        except BrokerUnavailable as error:
            log.warning("output_unreadable", turn=turn, error=str(error))

    def _expire(self, turn: str) -> None:
        """Nobody has ended *turn*, though it is late: it waits in a queue, say. Let it be stopped wherever it is."""
        task = asyncio.create_task(self._cancel_late(turn))
        self._tasks.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._tasks.discard)

    async def _cancel_late(self, turn: str) -> None:
        try:
            await self.cancel(turn, EXPIRED)
        except BrokerUnavailable as error:
            log.warning("turn_not_cancelled", turn=turn, error=str(error))

    async def _feed(self, follower: Follower, seat: Seat, *, backfill: bool) -> Feed:
        """What *follower* finds; without *backfill* the turn is new and nothing of it is stored."""
        reading = self._reading(follower, seat, backfill=backfill)
        await anext(reading)  # begun, it tidies up even if nobody ever reads it
        return _Feed(follower, reading)

    async def _reading(self, follower: Follower, seat: Seat, *, backfill: bool) -> AsyncGenerator[Sequence[Batch], None]:
        """What *follower* finds, after an empty beginning."""
        self._following += 1
        try:
            yield ()
            async for batches in follower.batches(backfill=backfill):
                yield batches
        finally:
            self._following -= 1
            seat.leave(ended=follower.ended)
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
        try:
            await publish_once(self._client, self._jetstream, message.subject, body, headers)
        except APIError as error:
            if error.err_code in FULL:
                raise QueueFull("too many turns are waiting; try again later") from error
            raise BrokerUnavailable(f"the turn was not accepted: {error.description}") from error
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable("the broker does not accept turns now") from error

    async def claim(self, key: str, digest: str, turn: str, deadline: float) -> tuple[str, float]:
        return await self._keys.claim(key, digest, turn, deadline)

    async def exists(self, turn: str) -> bool:
        """Whether output of *turn* is stored."""
        return await self._kept.exists(turn)

    async def known(self, turn: str) -> bool:
        try:
            await self._kept.expected(turn)
        except TurnUnknown:
            return False
        return True

    async def cancel(self, turn: str, reason: str) -> None:
        await cancel(self._jetstream, turn, reason)

    async def erase(self, turn: str) -> int:
        nobody = "nobody is there who can erase a turn: start an undertaker"
        late = "the turn could not be erased now; ask again"
        return (await replied(self._client, EraseTurn(turn=turn), Erased, seconds=_ERASE_SECONDS, nobody=nobody, late=late)).messages

    async def preview(self, turn: str, request: ChatRequest) -> Decision:
        nobody = "nobody is there who can route: start a router"
        asked = PreviewRoute(turn=turn, request=request)
        late = "no router answers now; ask again"
        return await replied(self._client, asked, Decision, seconds=_PREVIEW_SECONDS, nobody=nobody, late=late)

    async def deposit(self, turn: str, data: AsyncIterable[bytes], most: int) -> tuple[int, int]:
        return await self._deposit.put(turn, data, most)

    async def ask(self, request: Request, reply: type[Reply], *, seconds: float, nobody: str) -> Reply:
        return await replied(self._client, request, reply, seconds=seconds, nobody=nobody)

    async def reports(self) -> list[dict[str, Any]]:
        return await reports_or_none(self._client)

    async def ready(self) -> dict[str, str]:
        if not self._client.is_connected:
            return {"broker": "not connected"}
        output, *checks = await asyncio.gather(self._output(), *(self._waiting(each) for each in self._consumers))
        found = {consumer.durable: missing for consumer, missing in zip(self._consumers, checks, strict=True)} | {OUT: output}
        return {name: missing for name, missing in found.items() if missing}

    async def _output(self) -> str | None:
        """Why no output can be stored, or none when it can."""
        try:
            await self._jetstream.stream_info(OUT)
        except NotFoundError:
            return "has not been provisioned"
        except (NatsError, TimeoutError) as error:
            return f"broker: {error!r}"
        return None

    async def _waiting(self, consumer: Consumer) -> str | None:
        """Why nobody takes work of *consumer*, or none when somebody does."""
        try:
            info = await self._jetstream.consumer_info(consumer.stream, consumer.durable)
        except NotFoundError:
            return "has not been provisioned"
        except (NatsError, TimeoutError) as error:
            return f"broker: {error!r}"
        return None if info.num_waiting or info.num_ack_pending else "no worker is taking work"

    async def record(self, turn: str) -> Sequence[Entry]:
        return (await self._history.of(turn)).entries

    def newest(self, *, since: float = 0.0) -> AsyncIterator[Entry]:
        return self._history.newest(since=since)

    def facts(self) -> dict[str, Any]:
        return {"turns_opened": self._opened, "streams_open": self._following, "connected": self._client.is_connected}
