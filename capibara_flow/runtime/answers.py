"""The fenced writer: one owner at a time says a branch of a turn, and whoever was overtaken is refused.

To own a branch is to have written the last message of its lease subject. Every batch of output is published on the condition
that the lease is still ours (``Nats-Expected-Last-Subject-Sequence`` with ``-Subject``), so the broker itself refuses a zombie.
One batch is in flight at a time, as replicated streams demand; what is written meanwhile leaves together with the next one.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import orjson
from nats.errors import Error as NatsError

from capibara_flow import tasks
from capibara_flow.domain.turns import created, is_turn_id
from capibara_flow.errors import BrokerUnavailable, LeaseLost, TooLarge
from capibara_flow.runtime.client import TokenClient, flushed, status
from capibara_flow.runtime.lease import WRONG_SEQUENCE, Lease
from capibara_flow.runtime.output import ended, everything, fits, last_message
from capibara_flow.runtime.work import attempts
from capibara_flow.telemetry import log
from topics.output import Output, known
from topics.streams import erased_mark

_MAX_BATCH = 256 * 1024  # bytes; the broker's default limit of a message is 1 MiB
_PATIENCE = 15.0  # seconds that an answer waits for the broker: an election of a new leader takes 5
_STUCK = 3.0  # seconds without an acknowledgement before we look what became of a batch
_WATCH = 1.0  # seconds between looks for such batches
_SKEW = 5.0  # seconds by which the clocks of two machines may differ; a cancellation missed beyond it is the undertaker's to enforce
_REMEMBERED = 10_000  # turns of which we heard that they were cancelled: 130 bytes each


class FencedAnswer:
    """A branch that is ours; see ``ports.Answer``."""

    def __init__(self, hub: "FencedAnswers", turn: str, branch: str) -> None:
        self.said: Sequence[Output] = ()
        self.turn = turn
        self.cancelled = False
        self.unsure = False
        self._scope: asyncio.Timeout | None = None
        self._hub = hub
        self._token, self._reply = hub.expect(self)
        self._subject = f"cf.out.{turn}.data.{branch}"
        self._lease = Lease(hub.client, _lease(turn, branch), f"{hub.owner} {self._reply} {attempts()}")
        self._stored = 0
        self._lines: list[bytes] = []
        self._flying: bytes | None = None
        self._since = self._first_sent = 0.0
        self._error: Exception | None = None
        self._moved: asyncio.Event | None = None  # while somebody waits; most answers are never waited for
        self._closed = False

    async def take(self) -> None:
        """Become the owner, and learn what an owner before us said; raises ``LeaseLost``."""
        if await self._lease.take():
            messages = await everything(self._hub.client, self._subject, 0, _PATIENCE)
            read = (known(line) for message in messages for line in message.data.split(b"\n"))
            self.said = tuple(output for output in read if output is not None)
            self._stored = messages[-1].sequence if messages else 0

    def cancel(self) -> None:
        """Somebody asks the turn to stop; asking twice is asking once."""
        if self._scope is not None and not self.cancelled:
            self._scope.reschedule(self._hub.now())
        self.cancelled = True

    @asynccontextmanager
    async def until_cancelled(self) -> AsyncIterator[None]:
        scope = self._scope = asyncio.timeout(0 if self.cancelled else None)
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            self._scope = None

    async def write(self, *outputs: Output) -> None:
        while self._error is None and len(self._lines) > 4096:
            await self._wait()
        self._raise()
        lines = [output.line() for output in outputs]
        for line in lines:
            if len(line) > _MAX_BATCH and not fits(self._hub.client, line):
                raise TooLarge(f"an output of {len(line)} bytes is more than the broker takes at once")
        self._lines += lines
        if self._flying is None and self._lines:
            self._send()

    async def finish(self, *outputs: Output) -> None:
        await self.write(*outputs)
        while self._error is None and (self._flying is not None or self._lines):
            await self._wait()
        self._raise()

    def _send(self) -> None:
        """Publish what has gathered as one batch."""
        size = count = 0
        for line in self._lines:
            size += len(line) + 1
            if count and size > _MAX_BATCH:
                break
            count += 1
        self._flying = b"\n".join(self._lines[:count])
        del self._lines[:count]
        self._first_sent = self._hub.now()
        self._publish(self._flying)

    def _publish(self, batch: bytes) -> None:
        self._since = self._hub.now()
        try:
            self._hub.client.send(self._subject, batch, reply=self._reply, headers=self._lease.condition)
        except NatsError as error:  # no connection, and no room to keep it: the watchdog tries again
            log.warning("output_delayed", turn=self.turn, error=repr(error))

    def acknowledge(self, headers: bytes, data: bytes) -> None:
        """The broker's word on the batch in flight."""
        if self._flying is None or status(headers):
            return  # a status means no stream, or no leader for now: the watchdog tries again
        answer = orjson.loads(data)
        error = answer.get("error")
        if error is None:
            self._done(answer["seq"])
        elif error["err_code"] == WRONG_SEQUENCE:
            self._fail(LeaseLost(f"branch of {self.turn} was taken over: {error['description']}"))
        else:  # for instance "in process" during an election: the watchdog looks again
            log.warning("output_refused", turn=self.turn, error=error["description"])

    def _done(self, sequence: int) -> None:
        """The batch in flight is stored."""
        self._stored = sequence
        self._flying = None
        if self._lines:
            self._send()
        if self._moved:
            self._moved.set()

    def _fail(self, error: Exception) -> None:
        self._error, self._flying = error, None
        if self._moved:
            self._moved.set()

    @property
    def stuck(self) -> bool:
        """Whether an acknowledgement is overdue, or may have been lost with the connection."""
        return self._flying is not None and (self.unsure or self._hub.now() - self._since > _STUCK)

    async def look_again(self) -> None:
        """No acknowledgement for long: see whether the batch was stored, and publish it again if it was not."""
        if self._hub.now() - self._first_sent > _PATIENCE:
            self._fail(BrokerUnavailable("the broker did not store our output in time"))
        elif self._hub.client.is_connected:
            # From here on no word on what we sent so far counts, and with a new lease none of it will be stored any more.
            self._hub.forget(self._token)
            try:
                await self._lease.renew()
            except LeaseLost as error:
                self._fail(error)
                return
            found = await everything(self._hub.client, self._subject, self._stored, _PATIENCE)
            if self._closed:
                return
            self._token, self._reply = self._hub.expect(self)
            same = next((message.sequence for message in found if message.data == self._flying), None)
            if same is not None:
                self._done(same)
            elif self._flying is not None:
                self._publish(self._flying)

    def close(self) -> None:
        """Forget the branch; it stays ours until somebody takes the lease."""
        self._closed = True
        self._hub.forget(self._token)

    async def _wait(self) -> None:
        self._moved = self._moved or asyncio.Event()
        self._moved.clear()
        await self._moved.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class FencedAnswers:
    """All answers that this process writes; one inbox for their acknowledgements, one ear for cancellations."""

    def __init__(self, client: TokenClient, owner: str) -> None:
        self.client = client
        #: The loop's clock, in seconds.
        self.now = asyncio.get_running_loop().time
        self.owner = owner
        self._open: set[FencedAnswer] = set()
        self._expected: dict[str, FencedAnswer] = {}
        self._stopped: set[str] = set()
        self._began = math.inf  # since when we have listened without a break
        self._reconnects = 0
        self._count = 0
        self._inbox = ""
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe to acknowledgements and cancellations."""
        self._inbox = self.client.new_inbox()
        await self.client.listen(f"{self._inbox}.*", self._acknowledged)
        await self.client.listen("cf.ctl.*.cancel", self._cancelled)
        await flushed(self.client)
        self._began, self._reconnects = self.now(), self.client.stats["reconnects"]
        self._watchdog = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop watching; the connection is its owner's to close."""
        await tasks.ended(self._watchdog)

    @asynccontextmanager
    async def open(self, turn: str, branch: str) -> AsyncIterator[FencedAnswer]:
        answer = FencedAnswer(self, turn, branch)
        self._open.add(answer)  # a cancellation that comes while we look for one counts
        try:
            if turn in self._stopped:
                answer.cancel()
            if self._heard_all_of(turn):
                await answer.take()
            else:
                await asyncio.gather(answer.take(), self._look_for_cancel(answer))
            yield answer
        finally:
            self._open.discard(answer)
            answer.close()

    async def erased(self, turn: str) -> bool:
        return await last_message(self.client, erased_mark(turn), stream="CF_CTL") is not None

    async def stopping(self, turn: str) -> bool:
        return await last_message(self.client, f"cf.ctl.{turn}.cancel", stream="CF_CTL") is not None

    async def begun(self, turn: str, branch: str) -> int:
        last = await last_message(self.client, _lease(turn, branch))
        if last is None:
            return 0
        number = last.data.rsplit(b" ", 1)[-1]
        return int(number) if number.isdigit() else 1  # of a version that did not count

    async def ended(self, turn: str, branch: str) -> bool:
        return bool(await ended(self.client, turn, branch))

    def _heard_all_of(self, turn: str) -> bool:
        """Whether we have been listening without a break for longer than *turn* has been there, so that there is nothing to look for.

        Nobody knows that in a cluster, whose members may lose each other while we keep our connection.
        """
        self._mind_breaks()
        if self.client.clustered or not is_turn_id(turn):
            return False
        return self.now() - self._began > time.time() - created(turn) + _SKEW

    async def _look_for_cancel(self, answer: FencedAnswer) -> None:
        """Whether somebody asked for it when we could not hear."""
        if await self.stopping(answer.turn):
            answer.cancel()
        answer.unsure = False

    def expect(self, answer: FencedAnswer) -> tuple[str, str]:
        """A token for the acknowledgements of *answer*, and the reply subject that brings them."""
        self._count += 1
        token = str(self._count)
        self._expected[token] = answer
        return token, f"{self._inbox}.{token}"

    def forget(self, token: str) -> None:
        """Route no more acknowledgements to it."""
        self._expected.pop(token, None)

    def _acknowledged(self, subject: bytes, headers: bytes, data: bytes) -> None:
        if answer := self._expected.get(subject.rsplit(b".", 1)[1].decode()):
            answer.acknowledge(headers, data)

    def _cancelled(self, subject: bytes, _: bytes, __: bytes) -> None:
        turn = subject.decode().split(".")[2]
        if len(self._stopped) >= _REMEMBERED:
            self._stopped.clear()
            self._began = self.now()  # as if we had not heard of what is forgotten
        self._stopped.add(turn)
        for answer in self._open:
            if answer.turn == turn:
                answer.cancel()

    async def _watch(self) -> None:
        """Look after batches that were never acknowledged; costs nothing while all goes well."""
        while True:
            await asyncio.sleep(_WATCH)
            self._mind_breaks()
            await asyncio.gather(*(self._look_after(answer) for answer in self._open if answer.stuck or answer.unsure))

    def _mind_breaks(self) -> None:
        """Where the connection broke and came back since the last time, we may have missed something."""
        if (reconnects := self.client.stats["reconnects"]) != self._reconnects:
            self._reconnects, self._began = reconnects, self.now()
            for answer in self._open:
                answer.unsure = True

    async def _look_after(self, answer: FencedAnswer) -> None:
        try:
            if answer.stuck:
                await answer.look_again()
            if answer.unsure:
                await self._look_for_cancel(answer)
        except (NatsError, TimeoutError, BrokerUnavailable) as error:
            log.warning("output_delayed", turn=answer.turn, error=repr(error))


def _lease(turn: str, branch: str) -> str:
    return f"cf.out.{turn}.lease.{branch}"
