"""RouteTurn in; TurnRouted, Routed and the first command of the plan out."""

import time
from collections.abc import Callable

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routing import alternatives, decide, plan
from capibara_flow.domain.turns import bucket
from capibara_flow.ports import Answers
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.work import tenant
from topics.chat import CallExpert, RouteTurn, TurnRouted
from topics.flow import hop
from topics.output import Routed
from topics.streams import Consumer, Layout, subject_token

HOP = hop("router")


def build(
    broker: NatsBroker,
    *,
    fleet: Fleet,
    answers: Answers,
    consumer: Consumer,
    permits: int = 32,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the router onto *broker*: decide, tell the client and the log, send the turn on."""
    stage = Stage(broker, HOP, answers, layout=layout, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    @stage.takes(consumer, permits=permits)
    async def route(command: RouteTurn) -> None:
        started = clock()
        decision = decide(command.request, fleet)
        slip = plan(decision)
        call = CallExpert(
            turn=command.turn,
            expert=subject_token(decision.model_id),
            bucket=bucket(tenant()),
            request=command.request.model_copy(update={"model": decision.model_id}),
            alternatives=alternatives(command.request, fleet, decision),
            plan=slip.after(),
        )
        fact = TurnRouted(turn=command.turn, decision=decision, plan=slip, started=started, ended=clock())
        await stage.say(Routed.of(command.turn, decision, slip), fact, call)

    return FastStream(broker)
