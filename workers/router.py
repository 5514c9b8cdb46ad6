"""RouteTurn in; TurnRouted, Routed and the first command of the plan out. PreviewRoute in; the Decision out, and nothing done."""

import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow import __version__
from capibara_flow.domain.figures import Choices
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.grounding import is_courtesy
from capibara_flow.domain.routing import Chosen, Understood, candidates, choose, needs_reading
from capibara_flow.domain.turns import bucket
from capibara_flow.ports import Answers
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.queues import Waits
from capibara_flow.runtime.work import tenant
from capibara_flow.telemetry import ROUTED, ROUTING_SECONDS
from topics.chat import CallExpert, ChatRequest, Decision, PreviewRoute, RouteTurn, TurnRouted
from topics.flow import hop
from topics.grounding import RetrieveSources
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
    configuration: Callable[[], str] = str,
    lanes: Lanes | None = None,
    waits: Waits | None = None,
    has_documents: Callable[[str], bool] = lambda _: False,
    grounding_seconds: float = 5.0,
    permits: int = 32,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the router onto *broker*: decide, tell the client and the log, send the turn on.

    *understand* reads a question where no name and no rule decides; without it, the default answers those. *choices* counts.
    *waits* tells who has to wait for an expert.
    *configuration* names what is decided by.

    What a tenant asks who *has_documents* is grounded in them, unless it only greets or thanks, or says otherwise; that may take
    *grounding_seconds*.
    """
    counted = choices or Choices()
    stage = Stage(broker, HOP, answers, layout=layout, lanes=lanes, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

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
        wish = command.request.grounded
        grounded = has_documents(tenant()) and not is_courtesy(command.request) if wish is None else wish
        plan = found.plan(grounded=grounded)
        by = {"version": __version__, "configuration": configuration()}
        fact = TurnRouted(turn=command.turn, decision=decision, plan=plan, started=started, ended=clock(), **by)
        call = _call(command, found)
        following = _grounding(call, clock() + grounding_seconds) if grounded else call
        routed = Routed.of(command.turn, decision, plan)
        async with waits.telling(call, tenant()) if waits and following is call else nullcontext(()) as queued:
            await stage.say(routed, *queued, fact, following)

    return FastStream(broker)


def _call(command: RouteTurn, found: Chosen) -> CallExpert:
    """The first command of the plan."""
    name = found.decision.model_id
    return CallExpert(
        turn=command.turn,
        expert=subject_token(name),
        bucket=bucket(tenant()) if command.bucket is None else command.bucket,
        priority=command.priority,
        request=command.request.model_copy(update={"model": name}),
        alternatives=found.alternatives,
    )


def _grounding(call: CallExpert, until: float) -> RetrieveSources:
    """Look for sources first, no longer than *until*, then do *call*."""
    return RetrieveSources(turn=call.turn, collection=call.request.collection, call=call, until=until)


def _measure(decision: Decision, seconds: float) -> None:
    ROUTED.labels(decision.route_name, decision.complexity).inc()
    ROUTING_SECONDS.observe(seconds)
