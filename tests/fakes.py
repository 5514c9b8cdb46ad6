"""Fakes of the ports: they remember what was asked of them, they can be slow, and they can fail."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from capibara_flow.domain.refusing import Refused
from capibara_flow.errors import BrokerUnavailable, KeyReused, LeaseLost, TooLarge, TurnUnknown
from capibara_flow.ports import Abilities, Batch, Entry, Finish, Identity, Piece, Reply, Take, Tally, Text
from capibara_flow.runtime.work import attempts
from topics.chat import ChatRequest, Decision, RouteTurn
from topics.grounding import IngestDocument
from topics.message import Part, Refusable, Request
from topics.output import Output
from topics.streams import Consumer


def spoken(*words: str, reason: str = "stop") -> tuple[Piece, ...]:
    """A complete answer of *words*."""
    return (*map(Text, words), Tally(3, len(words)), Finish(reason))


@dataclass
class FakeEngine:
    """``ports.ChatEngine``: says *pieces*; raises *error* after *fails_after* of them, *times* times; falls silent after *hangs_after*."""

    pieces: Sequence[Piece] = spoken("Hello", " there")
    pause: float = 0.0
    error: Exception | None = None
    fails_after: int = 0
    times: int = 1_000_000
    hangs_after: int | None = None
    abilities: Abilities = field(default_factory=Abilities)
    requests: list[ChatRequest] = field(default_factory=list)
    closings: int = 0
    silent: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        self.requests.append(request)
        fails = self.error is not None and len(self.requests) <= self.times
        try:
            for number, piece in enumerate((*self.pieces, None)):
                if self.error is not None and fails and number == self.fails_after:
                    raise self.error
                if number == self.hangs_after:
                    self.silent.set()
                    await asyncio.Event().wait()
                if piece is not None:
                    await asyncio.sleep(self.pause)
                    yield piece
        finally:
            self.closings += 1

    async def health(self) -> None:
        if self.error:
            raise self.error

    async def aclose(self) -> None:
        return None


class FakeAnswer:
    """``ports.Answer``: *outputs* is what was written, *finished* whether all of it is stored."""

    def __init__(self, said: Sequence[Output] = (), *, lose_after: int | None = None, cancelled: bool = False) -> None:
        self.said = tuple(said)
        self.outputs: list[Output] = []
        self.cancelled = cancelled
        self.finished = False
        self._lose_after = lose_after
        self._scope: asyncio.Timeout | None = None

    def cancel(self) -> None:
        """Somebody asks the turn to stop."""
        self.cancelled = True
        if self._scope:
            self._scope.reschedule(asyncio.get_running_loop().time())

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
        for output in outputs:
            if self._lose_after is not None and len(self.outputs) >= self._lose_after:
                raise LeaseLost("somebody else writes this answer now")
            self.outputs.append(output)

    async def finish(self, *outputs: Output) -> None:
        await self.write(*outputs)
        self.finished = True


class FakeAnswers:
    """``ports.Answers``: every opening is a :class:`FakeAnswer` that begins with what its predecessors of the branch said."""

    def __init__(self, said: Sequence[Output] = (), *, lose_after: int | None = None, cancelled: bool = False) -> None:
        self.opened: list[FakeAnswer] = []
        self._begun: dict[tuple[str, str], int] = {}
        self._said: dict[tuple[str, str], list[Output]] = defaultdict(lambda: list(said))
        self._lose_after = lose_after
        self._cancelled = cancelled

    @asynccontextmanager
    async def open(self, turn: str, branch: str) -> AsyncIterator[FakeAnswer]:
        said = self._said[turn, branch]
        self._begun[turn, branch] = attempts()
        answer = FakeAnswer(said, lose_after=self._lose_after, cancelled=self._cancelled)
        self.opened.append(answer)
        try:
            yield answer
        finally:
            said += answer.outputs

    async def erased(self, turn: str) -> bool:
        return False

    async def stopping(self, turn: str) -> bool:
        return self._cancelled

    async def begun(self, turn: str, branch: str) -> int:
        return self._begun.get((turn, branch), 0)

    async def ended(self, turn: str, branch: str) -> bool:
        said = self._said[turn, branch]
        return bool(said) and said[-1].final

    @property
    def outputs(self) -> list[Output]:
        """Everything that was written, over all openings."""
        return [output for answer in self.opened for output in answer.outputs]


class FakeFeed:
    """``ports.Feed`` over *batches*; a tap is never used."""

    def __init__(self, batches: AsyncGenerator[Sequence[Batch], None]) -> None:
        self.aclose = batches.aclose
        self._batches = batches

    def __aiter__(self) -> AsyncIterator[Sequence[Batch]]:
        return self._batches

    def tap(self, take: Take) -> None:
        """Every batch waits for the reader."""


class FakeTurns:
    """``ports.Turns`` in memory: a turn answers with *script*, a list of what is stored together; sequences begin at 11.

    *refusal* is raised instead of accepting a turn; *breaks* is raised by the feed after the script; without either,
    a feed whose script has no final output waits for ever. *gone* is raised instead of following, *erased* is how many messages
    there are to erase, or the reason why nobody does.
    """

    def __init__(self, *script: Iterable[Output], refusal: Exception | None = None, breaks: Exception | None = None) -> None:
        self.script = [tuple(outputs) for outputs in script]
        self.refusal = refusal
        self.breaks = breaks
        self.gone: Exception | None = None
        self.erased: int | Exception = 0
        self.opened: list[tuple[RouteTurn | IngestDocument, Identity, float]] = []
        self.deposits: dict[str, bytes] = {}
        self.replies: Mapping[type[Request], Part] = {}
        self.requests: list[Request] = []
        self.erasures: list[str] = []
        self.attended: set[str] = set()
        self.recalled: set[str] = set()
        self.followed: list[tuple[str, int]] = []
        self.keys: dict[str, tuple[str, str, float]] = {}
        self.cancelled: list[str] = []
        self.previewed: list[ChatRequest] = []
        self.stored: set[str] = set()
        self.missing: dict[str, str] = {}
        self.entries: list[Entry] = []
        self.closed = 0

    async def open(
        self, command: RouteTurn | IngestDocument, identity: Identity, deadline: float, *, attended: bool = False, recalled: bool = False
    ) -> "FakeFeed":
        if self.refusal:
            raise self.refusal
        self.opened.append((command, identity, deadline))
        self.stored.add(command.turn)
        self.attended |= {command.turn} if attended else set()
        self.recalled |= {command.turn} if recalled else set()
        return self._feed(command.turn)

    async def follow(self, turn: str, after: int = 0) -> "FakeFeed":
        if self.gone:
            raise self.gone
        self.followed.append((turn, after))
        return self._feed(turn, after)

    def _feed(self, turn: str, after: int = 0) -> "FakeFeed":
        return FakeFeed(self._batches(turn, min(after, 9 + len(self.script))))

    async def _batches(self, turn: str, after: int) -> AsyncGenerator[Sequence[Batch], None]:
        try:
            for sequence, outputs in enumerate(self.script, 11):
                if sequence > after:
                    lines = tuple(output.model_copy(update={"turn": turn}).line() for output in outputs)
                    yield (Batch(sequence, lines, outputs[-1].final),)
            if self.breaks:
                raise self.breaks
            if not (self.script and self.script[-1][-1].final):
                await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def claim(self, key: str, digest: str, turn: str, deadline: float) -> tuple[str, float]:
        owner, known, until = self.keys.setdefault(key, (turn, digest, deadline))
        if known != digest:
            raise KeyReused("this Idempotency-Key came with another request before")
        return owner, until

    async def exists(self, turn: str) -> bool:
        return turn in self.stored

    async def known(self, turn: str) -> bool:
        return turn in self.stored

    async def cancel(self, turn: str, reason: str) -> None:
        self.cancelled.append(turn)

    async def erase(self, turn: str) -> int:
        self.erasures.append(turn)
        if isinstance(self.erased, Exception):
            raise self.erased
        self.stored.discard(turn)
        return self.erased

    async def preview(self, turn: str, request: ChatRequest) -> Decision:
        if self.refusal:
            raise self.refusal
        self.previewed.append(request)
        return Decision(model_id="phi", route_name="default", complexity="simple", confidence=0.5, reasoning="because")

    async def deposit(self, turn: str, data: AsyncIterable[bytes], most: int) -> tuple[int, int]:
        whole = b""
        async for chunk in data:
            whole += chunk
            if len(whole) > most:
                raise TooLarge(f"a document may have {most} bytes at most")
        self.deposits[turn] = whole
        return len(whole), 1

    async def ask(self, request: Request, reply: type[Reply], *, seconds: float, nobody: str) -> Reply:
        self.requests.append(request)
        if type(request) not in self.replies:
            raise BrokerUnavailable(nobody)
        answer = self.replies[type(request)]
        assert isinstance(answer, reply)
        if isinstance(answer, Refusable) and answer.refused:
            raise Refused(answer.refused)
        return answer

    def rely_on(self, consumers: Sequence[Consumer]) -> None:
        self.relied_on = tuple(consumers)

    async def record(self, turn: str) -> Sequence[Entry]:
        found = [entry for entry in self.entries if entry.turn == turn]
        if not found:
            raise TurnUnknown(f"nothing is kept of {turn!r}")
        return found

    async def newest(self, *, since: float = 0.0) -> AsyncIterator[Entry]:
        for entry in reversed(self.entries):
            if entry.subject.endswith(".asked.router") and entry.when >= since:
                yield entry

    async def reports(self) -> list[dict[str, Any]]:
        return [{"worker": "router", "process": "p", "since": 1.0, "at": 2.0, "facts": {"routes": {"math": 2}}}]

    async def ready(self) -> dict[str, str]:
        return self.missing

    def facts(self) -> dict[str, Any]:
        return {"turns_opened": len(self.opened), "connected": True}
