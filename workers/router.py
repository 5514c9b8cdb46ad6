"""RouteTurn in; TurnRouted, Routed and the first command of the plan out. PreviewRoute in; the Decision out, and nothing done."""

import time
from collections.abc import Awaitable, Callable

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.figures import Choices
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routing import Chosen, Understood, candidates, choose, needs_reading
from capibara_flow.domain.turns import bucket
from capibara_flow.ports import Answers
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.work import tenant
from capibara_flow.telemetry import ROUTED, ROUTING_SECONDS
from topics.chat import CallExpert, ChatRequest, Decision, PreviewRoute, RouteTurn, TurnRouted
from topics.flow import hop
from topics.output import Routed
from topics.streams import Consumer, Layout, subject_token

HOP = hop("router")
Understand = Callable[[ChatRequest], Awaitable[Understood]]


def build(
    broker: NatsBroker,
    *,
    fleet: Callable[[], Fleet],
    answers: Answers,
    consumer: Consumer,
    understand: Understand | None = None,
    choices: Choices | None = None,
    permits: int = 32,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the router onto *broker*: decide, tell the client and the log, send the turn on.

    *understand* reads a question where no name and no rule decides; without it, the default answers those. *choices* counts.
    """
    counted = choices or Choices()
    stage = Stage(broker, HOP, answers, layout=layout, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    async def chosen(request: ChatRequest) -> Chosen:
        now = fleet()
        candidates(request, now)  # what cannot be served need not be understood
        return choose(request, now, await understand(request) if understand and needs_reading(request, now) else None)

    @stage.serves(PreviewRoute)
    async def preview(command: PreviewRoute) -> Decision:
        return (await chosen(command.request)).decision

    @stage.takes(consumer, permits=permits)
    async def route(command: RouteTurn) -> None:
        started = clock()
        found = await chosen(command.request)
        decision = found.decision
        _measure(decision, seconds := clock() - started)
        counted.add(decision, seconds)
        fact = TurnRouted(turn=command.turn, decision=decision, plan=found.plan, started=started, ended=clock())
        await stage.say(Routed.of(command.turn, decision, found.plan), fact, _call(command, found))

    return FastStream(broker)


def _call(command: RouteTurn, found: Chosen) -> CallExpert:
    """The first command of the plan."""
    name = found.decision.model_id
    return CallExpert(
        turn=command.turn,
        expert=subject_token(name),
        bucket=bucket(tenant()),
        request=command.request.model_copy(update={"model": name}),
        alternatives=found.alternatives,
        plan=found.plan.after(),
    )


def _measure(decision: Decision, seconds: float) -> None:
    ROUTED.labels(decision.route_name, decision.complexity).inc()
    ROUTING_SECONDS.observe(seconds)
