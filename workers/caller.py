"""CallExpert in; the expert's answer, word by word, and ExpertCalled out; or CallExpert for the next one, when it is out of reach."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.answering import Account
from capibara_flow.domain.continuing import Held, Way, continuing, held, limited, tokens_left, way_on
from capibara_flow.domain.grounding import citations, grounded
from capibara_flow.errors import BadRequest, BrokerUnavailable, EngineBroke, EngineFault, QueueFull, UnknownExpert
from capibara_flow.ports import Answer, Answers, ChatEngine, Finish, Piece
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.queues import Queues
from capibara_flow.runtime.recalling import Recall
from capibara_flow.runtime.work import attempt, seconds_left, tenant, tries
from capibara_flow.telemetry import FIRST_TOKEN_SECONDS, TOKENS
from topics.chat import PASSED_ON, CallExpert, ChatRequest, ExpertCalled
from topics.flow import hop
from topics.output import Cited
from topics.streams import Consumer, Layout, subject_token

HOP = hop("caller")
Serve = Callable[[Mapping[Consumer, int]], Awaitable[None]]


def build(
    broker: NatsBroker,
    *,
    engines: Mapping[str, ChatEngine],
    answers: Answers,
    consumers: Mapping[Consumer, int],
    layout: Layout | None = None,
    gate: Callable[[Consumer], Gate | None] = lambda _: None,
    reloaded: Callable[[Serve], None] = lambda _: None,
    recall: Recall | None = None,
    lanes: Lanes | None = None,
    queues: Queues | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the caller onto *broker*: *engines* by the expert's subject token, and permits by consumer.

    The *gate* of a consumer is shut while others can do what this process cannot. What is given to *reloaded* is called with other
    consumers when the fleet has changed. With *recall* an answer may be one that was given before. With *queues* those who wait in
    all *lanes* of an expert are served in turn.
    """
    sharing: dict[str, Any] = {"lanes": lanes, "queues": queues}
    stage = Stage(broker, HOP, answers, layout=layout, **sharing, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    async def call(command: CallExpert) -> None:
        if (engine := engines.get(command.expert)) is None:
            await stage.say(handed_over(command))
            return
        attempted = Attempt(command, engine, clock, recall)
        try:
            async with answers.open(command.turn, command.branch) as answer:
                await attempted.run(answer)
        except EngineFault as error:
            if attempted.account is None or not _out_of_reach(command, error, 2 * retry_seconds):
                raise
            await _pass_on(stage, command, error, attempted.account.event(clock(), f"{PASSED_ON}{error.title}"), retry_seconds)
        else:
            if attempted.account is not None:
                await stage.say(attempted.account.event(clock()))
                _measure(command.expert, attempted.account)

    async def serve(wanted: Mapping[Consumer, int]) -> None:
        await stage.take_only(wanted, gate, call)

    for consumer, permits in consumers.items():
        stage.takes(consumer, permits=permits, gate=gate(consumer))(call)
    reloaded(serve)
    return FastStream(broker)


class Attempt:
    """One try at an answer, from where earlier ones left off; *account* is there once it has begun."""

    def __init__(self, command: CallExpert, engine: ChatEngine, clock: Callable[[], float], recall: Recall | None = None) -> None:
        # What the engine is asked, and what an answer is remembered by, has the sources in it.
        asked = command.model_copy(update={"request": grounded(command.request, command.context)}) if command.context else command
        self._command, self._engine, self._clock, self._recall = asked, engine, clock, recall
        self.account: Account | None = None

    async def run(self, answer: Answer) -> None:
        """Answer to the end, unless somebody has; raises what the engine raises."""
        holds = held(answer.said)
        if holds.ended:
            return
        account = self._begin(holds, way_on(holds, self._command.request, self._engine.abilities))
        try:
            await self._stream(answer, holds, account)
        except EngineFault:
            # What was made is not lost: the client gets it, and what nobody saw would not be counted later.
            with suppress(BrokerUnavailable):  # why it broke matters more
                await answer.finish(*((account.usage,) if account.unseen else ()))
            raise
        except BadRequest:
            if account.way != "prefill" or not account.untold:
                raise
            # It takes the question, but will not go on with an answer: let it say all again.
            account = self._begin(holds, "skip")
            await self._stream(answer, holds, account)
        await answer.finish(*self._cited(account), *account.ending(self._clock()))

    def _cited(self, account: Account) -> Sequence[Cited]:
        """Which of its sources the answer cites; it need not have any."""
        if not self._command.sources:
            return ()
        cited, unknown = citations(account.text, [source.n for source in self._command.sources])
        return (Cited(turn=self._command.turn, cited=cited, unknown=unknown),)

    def _begin(self, holds: Held, way: Way) -> Account:
        command = self._command
        self.account = Account(
            turn=command.turn,
            branch=command.branch,
            expert=command.request.model or command.expert,
            attempt=attempt() + command.passed,
            started=self._clock(),
            holds=holds,
            way=way,
        )
        return self.account

    async def _stream(self, answer: Answer, holds: Held, account: Account) -> None:
        request = self._command.request
        if account.way == "prefill":
            left = tokens_left(request, holds, self._engine.abilities)
            if left == 0:
                account.take(Finish("length"), self._clock())
                return
            request = continuing(request if left is None else limited(request, left), holds)
        async with answer.until_cancelled():
            # In a task of its own a piece does not pass through all that stands around a handler.
            await asyncio.create_task(relay(self._pieces(request, account.way), account, answer, self._clock))

    def _pieces(self, request: ChatRequest, way: Way) -> AsyncGenerator[Piece, None]:
        """What the engine says, or said before to the same question."""
        made = self._engine.stream(request)
        if self._recall is None or way == "prefill" or (key := self._recall.key(self._command, tenant())) is None:
            return made
        return self._recall.pieces(key, self._command.turn, made)


async def relay(pieces: AsyncGenerator[Piece, None], account: Account, answer: Answer, clock: Callable[[], float]) -> None:
    """Write what *pieces* amount to, and close them whatever happens."""
    async with aclosing(pieces):
        async for piece in pieces:
            if outputs := account.take(piece, clock()):
                await answer.write(*outputs)


async def _pass_on(stage: Stage, command: CallExpert, error: EngineFault, fact: ExpertCalled, pause: float) -> None:
    """Let the next expert answer, after a *pause* when all have been asked; raises *error* when its queue has no room."""
    if command.passed >= len(command.alternatives):
        await stage.say(stage.waiting(command.turn, error, command.passed))
        await asyncio.sleep(pause)
    try:
        await stage.say(passed_on(command), fact)
    except QueueFull:
        raise error from None  # so it stays here, and is tried again


def passed_on(command: CallExpert) -> CallExpert:
    """*command* for the next expert; the one that was out of reach comes last."""
    following, *others = command.alternatives
    name = command.request.model or command.expert
    return command.model_copy(
        update={
            "expert": subject_token(following),
            "request": command.request.model_copy(update={"model": following}),
            "alternatives": (*others, name),
            "passed": command.passed + 1,
        }
    )


def handed_over(command: CallExpert) -> CallExpert:
    """*command* for the next expert, since the one that was asked is served no more; raises ``UnknownExpert`` when there is none."""
    if not command.alternatives:
        raise UnknownExpert(f"{command.request.model or command.expert} is not served any more")
    passed = passed_on(command)
    return passed.model_copy(update={"alternatives": passed.alternatives[:-1]})


def _out_of_reach(command: CallExpert, error: EngineFault, enough: float) -> bool:
    """Whether it is the next expert's turn: one that broke off may still go on with another replica.

    With less than *enough* seconds left it is nobody's any more, and the turn ends with what went wrong last.
    """
    left = seconds_left()
    late = left is not None and left < enough and command.passed >= len(command.alternatives)
    return bool(command.alternatives) and not late and (not isinstance(error, EngineBroke) or tries() > 0)


def _measure(expert: str, account: Account) -> None:
    usage = account.usage
    TOKENS.labels(expert, "in").inc(usage.prompt_tokens)
    TOKENS.labels(expert, "out").inc(usage.completion_tokens)
    if account.first_token_seconds is not None:
        FIRST_TOKEN_SECONDS.labels(expert).observe(account.first_token_seconds)
