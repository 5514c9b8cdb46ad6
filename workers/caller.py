"""CallExpert in; the expert's answer, word by word, and ExpertCalled out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.answering import Account, burnt, must_reset
from capibara_flow.errors import UnknownExpert
from capibara_flow.ports import Answer, Answers, ChatEngine, Piece
from capibara_flow.runtime.hops import Stage, attempt
from capibara_flow.telemetry import FIRST_TOKEN_SECONDS, TOKENS
from topics.chat import CallExpert
from topics.flow import hop
from topics.output import Reset
from topics.streams import Consumer, Layout

HOP = hop("caller")


def build(
    broker: NatsBroker,
    *,
    engines: Mapping[str, ChatEngine],
    answers: Answers,
    consumers: Mapping[Consumer, int],
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the caller onto *broker*: *engines* by the expert's subject token, and permits by consumer."""
    stage = Stage(broker, HOP, answers, layout=layout, retry_seconds=retry_seconds)

    async def call(command: CallExpert) -> None:
        if command.expert not in engines:
            raise UnknownExpert(f"this caller does not serve {command.expert}")
        async with answers.open(command.turn, command.branch) as answer:
            if answer.said and answer.said[-1].final:
                return
            account = Account(
                turn=command.turn,
                branch=command.branch,
                expert=command.request.model or command.expert,
                attempt=attempt(),
                started=clock(),
                burnt=burnt(answer.said),
            )
            if must_reset(answer.said):
                await answer.write(Reset(turn=command.turn, reason="the answer starts anew after a fault"))
            async with answer.until_cancelled():
                # In a task of its own a piece does not pass through all that stands around a handler.
                await asyncio.create_task(_relay(engines[command.expert].stream(command.request), account, answer, clock))
            await answer.finish(account.usage, account.done(clock()))
        await stage.say(account.event(clock()))
        _measure(command.expert, account)

    for consumer, permits in consumers.items():
        call = stage.takes(consumer, permits=permits)(call)
    return FastStream(broker)


async def _relay(pieces: AsyncGenerator[Piece, None], account: Account, answer: Answer, clock: Callable[[], float]) -> None:
    async with aclosing(pieces):
        async for piece in pieces:
            if output := account.take(piece, clock()):
                await answer.write(output)


def _measure(expert: str, account: Account) -> None:
    usage = account.usage
    TOKENS.labels(expert, "in").inc(usage.prompt_tokens)
    TOKENS.labels(expert, "out").inc(usage.completion_tokens)
    if account.first_token_seconds is not None:
        FIRST_TOKEN_SECONDS.labels(expert).observe(account.first_token_seconds)
