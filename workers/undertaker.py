"""CancelTurn in; Done out, where nobody else ends the turn. EraseTurn in; the turn gone, and Erased out."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.continuing import failing, held, stopped
from capibara_flow.errors import TurnExpired
from capibara_flow.ports import Answers
from capibara_flow.runtime.hops import Stage
from topics.chat import EXPIRED, CancelTurn, Erased, EraseTurn
from topics.flow import hop
from topics.output import Output
from topics.streams import Consumer, Layout

HOP = hop("undertaker")


def build(
    broker: NatsBroker,
    *,
    answers: Answers,
    erase: Callable[[str], Awaitable[int]],
    consumer: Consumer,
    permits: int = 256,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    grace_seconds: float = 0.4,
) -> FastStream:
    """Wire the undertaker onto *broker*: whoever works on a cancelled turn has *grace_seconds* to end it himself."""
    stage = Stage(broker, HOP, answers, layout=layout, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    @stage.takes(consumer, permits=permits)
    async def end(command: CancelTurn) -> None:
        await asyncio.sleep(grace_seconds)
        if await answers.ended(command.turn, "main") or not await answers.stopping(command.turn):
            return  # he has, or the turn has been erased meanwhile
        # It waits in a queue, or with somebody who is dead or paused: taking the branch over fences him off.
        async with answers.open(command.turn, "main") as answer:
            if not held(answer.said).ended:
                await answer.finish(*_end_of(command, answer.said))

    @stage.serves(EraseTurn)
    async def erase_turn(command: EraseTurn) -> Erased:
        return Erased(messages=await erase(command.turn))

    return FastStream(broker)


def _end_of(command: CancelTurn, said: Sequence[Output]) -> Sequence[Output]:
    if command.reason == EXPIRED:
        return failing(command.turn, said, TurnExpired("the turn's deadline passed before its work was done"))
    return stopped(command.turn, said)
