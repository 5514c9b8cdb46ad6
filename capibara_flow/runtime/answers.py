"""The fenced writer: one owner at a time says a branch of a turn, and whoever was overtaken is refused.

To own a branch is to have written the last message of its lease subject. Every batch of output is published on the condition
that the lease is still ours (``Nats-Expected-Last-Subject-Sequence`` with ``-Subject``), so the broker itself refuses a zombie.
One batch is in flight at a time, as replicated streams demand; what is written meanwhile leaves together with the next one.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import orjson
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from capibara_flow.errors import BrokerUnavailable, LeaseLost
from capibara_flow.runtime.client import TokenClient, encoded, status
from capibara_flow.runtime.output import last_message, stored
from capibara_flow.telemetry import log
from topics.output import Output, parse

_EXPECTED, _EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence", "Nats-Expected-Last-Subject-Sequence-Subject"
_WRONG_SEQUENCE = 10071
_MAX_BATCH = 256 * 1024  # bytes; the broker's default limit of a message is 1 MiB
_PATIENCE = 15.0  # seconds that an answer waits for the broker: an election of a new leader takes 5
_STUCK = 3.0  # seconds without an acknowledgement before we look what became of a batch


class FencedAnswer:
    """A branch that is ours; see ``ports.Answer``."""

    def __init__(self, hub: "FencedAnswers", turn: str, branch: str, lease: int, said: Sequence[Output]) -> None:
        self.said = said
        self.turn = turn
        self.cancelled = False
        self._scope: asyncio.Timeout | None = None
        self._hub = hub
        self._token, self._reply = hub.register(self)
        self._subject = f"cf.out.{turn}.data.{branch}"
        self._headers = encoded({_EXPECTED: str(lease), _EXPECTED_SUBJECT: f"cf.out.{turn}.lease.{branch}"})
        self._lines: list[bytes] = []
        self._flying: bytes | None = None
        self._since = 0.0
        self._first_sent = 0.0
        self._error: Exception | None = None
        self._moved = asyncio.Event()

    def cancel(self) -> None:
        """Somebody asks the turn to stop."""
        self.cancelled = True
        if self._scope is not None:
            self._scope.reschedule(self._hub.now())

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

    async def write(self, output: Output) -> None:
        while self._error is None and len(self._lines) > 4096:
            await self._wait()
        self._raise()
        self._lines.append(output.line())
        if self._flying is None:
            await self.send()

    async def finish(self, *outputs: Output) -> None:
        for output in outputs:
            await self.write(output)
        while self._error is None and (self._flying is not None or self._lines):
            await self._wait()
        self._raise()

    async def send(self) -> None:
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
        await self._publish()

    async def _publish(self) -> None:
        if self._flying is None:
            return
        self._since = self._hub.now()
        await self._hub.client.send(self._subject, self._flying, reply=self._reply, headers=self._headers)

    async def acknowledge(self, headers: bytes, data: bytes) -> None:
        """The broker's word on the batch in flight."""
        if self._flying is None or status(headers):
            return  # a status means no stream, or no leader for now: the watchdog tries again
        error = orjson.loads(data).get("error")
        if error is not None and error["err_code"] != _WRONG_SEQUENCE:
            log.warning("output_refused", turn=self.turn, error=error["description"])
            return  # for instance "in process" during an election: the watchdog looks again
        if error is not None:
            self._error = LeaseLost(f"branch of {self.turn} was taken over: {error['description']}")
        self._flying = None
        if self._error is None and self._lines:
            await self.send()
        self._moved.set()

    async def look_again(self) -> None:
        """No acknowledgement for long: see whether the batch was stored, and publish it again if it was not."""
        if self._flying is None or self._hub.now() - max(self._since, self._hub.connected_at) < _STUCK:
            return
        if self._hub.now() - self._first_sent > _PATIENCE:
            self._error = BrokerUnavailable("the broker did not store our output in time")
            self._moved.set()
            return
        last = await last_message(self._hub.client, self._subject)
        if self._flying is None:
            return
        if last is not None and last.data == self._flying:
            self._flying = None
            if self._lines:
                await self.send()
            self._moved.set()
        else:
            await self._publish()

    def close(self) -> None:
        """Forget the branch; it stays ours until somebody takes the lease."""
        self._hub.forget(self._token)

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class FencedAnswers:
    """All answers that this process writes; one inbox for their acknowledgements, one ear for cancellations."""

    def __init__(self, client: TokenClient, owner: str) -> None:
        self.client = client
        self.connected_at = 0.0
        self._owner = owner.encode()
        self._answers: dict[str, FencedAnswer] = {}
        self._count = 0
        self._inbox = ""
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe to acknowledgements and cancellations."""
        self._inbox = self.client.new_inbox()
        await self.client.listen(f"{self._inbox}.*", self._acknowledged)
        await self.client.listen("cf.ctl.*.cancel", self._cancelled)
        await self.client.flush()
        self._watchdog = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop watching; the connection is its owner's to close."""
        if self._watchdog:
            self._watchdog.cancel()

    @asynccontextmanager
    async def open(self, turn: str, branch: str) -> AsyncIterator[FencedAnswer]:
        (lease, taken_over), cancel = await asyncio.gather(
            self._take_lease(turn, branch), last_message(self.client, f"cf.ctl.{turn}.cancel", stream="CF_CTL")
        )
        said = await self._said(turn, branch) if taken_over else ()
        answer = FencedAnswer(self, turn, branch, lease, said)
        if cancel is not None:
            answer.cancel()
        try:
            yield answer
        finally:
            answer.close()

    async def _take_lease(self, turn: str, branch: str) -> tuple[int, bool]:
        """The sequence of our lease, and whether somebody held one before us; raises ``LeaseLost``."""
        subject = f"cf.out.{turn}.lease.{branch}"
        first = await self._bid(subject, 0)  # nearly always nobody was here before
        if first is not None:
            return first, False
        before = await last_message(self.client, subject)
        lease = await self._bid(subject, before.sequence if before else 0)
        if lease is None:
            raise LeaseLost(f"somebody else took {subject} at the same time")
        return lease, True

    async def _bid(self, subject: str, expected: int) -> int | None:
        """Write our name as the lease that follows *expected*: its sequence, or none when another one followed."""
        try:
            reply = await self.client.request(subject, self._owner, timeout=5, headers={_EXPECTED: str(expected)})
        except NoRespondersError as error:
            raise BrokerUnavailable("the output stream is not there") from error
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"no lease: {error!r}") from error
        answer = orjson.loads(reply.data)
        if refusal := answer.get("error"):
            if refusal["err_code"] == _WRONG_SEQUENCE:
                return None
            raise BrokerUnavailable(f"no lease: {refusal['description']}")
        return int(answer["seq"])

    async def _said(self, turn: str, branch: str) -> tuple[Output, ...]:
        """Everything on the branch: complete, because the lease already refuses any earlier owner."""
        subject = f"cf.out.{turn}.data.{branch}"
        last = await last_message(self.client, subject)
        said: list[Output] = []
        after = 0
        while last is not None and after < last.sequence:
            # A replica that lags behind answers short: ask until the leader's last message has come.
            messages = await stored(self.client, subject, after)
            for message in messages:
                said += map(parse, message.data.split(b"\n"))
                after = message.sequence
            if not messages:
                await asyncio.sleep(0.05)
        return tuple(said)

    def register(self, answer: FencedAnswer) -> tuple[str, str]:
        """A token for *answer*, and the reply subject that reaches it."""
        self._count += 1
        token = str(self._count)
        self._answers[token] = answer
        return token, f"{self._inbox}.{token}"

    def forget(self, token: str) -> None:
        """Route no more acknowledgements to it."""
        self._answers.pop(token, None)

    @staticmethod
    def now() -> float:
        """The loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    async def _acknowledged(self, subject: bytes, headers: bytes, data: bytes) -> None:
        if answer := self._answers.get(subject.rsplit(b".", 1)[1].decode()):
            await answer.acknowledge(headers, data)

    async def _cancelled(self, subject: bytes, _: bytes, __: bytes) -> None:
        turn = subject.decode().split(".")[2]
        for answer in self._answers.values():
            if answer.turn == turn:
                answer.cancel()

    async def _watch(self) -> None:
        """Look after batches that were never acknowledged; costs nothing while all goes well."""
        while True:
            await asyncio.sleep(1)
            if not self.client.is_connected:
                self.connected_at = self.now() + 1
            for answer in list(self._answers.values()):
                try:
                    await answer.look_again()
                except (NatsError, TimeoutError, BrokerUnavailable) as error:
                    log.warning("output_delayed", turn=answer.turn, error=repr(error))
