"""What each worker is built with, opened before it starts and closed after it has ended."""

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from capibara_flow.domain.configuration import digest
from capibara_flow.domain.figures import Choices
from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.domain.routes import Routes
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.engines.host.host import HostedEngine, build_host
from capibara_flow.engines.pools import Pools
from capibara_flow.engines.weights import located
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.cache import AnswerCache
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.depositing import Deposit
from capibara_flow.runtime.erasing import erase
from capibara_flow.runtime.gating import Gate, Gatekeeper
from capibara_flow.runtime.holdings import Holdings
from capibara_flow.runtime.joining import Join
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.peers import QUEUE, Peers
from capibara_flow.runtime.places import Places
from capibara_flow.runtime.queues import Queues, Waits
from capibara_flow.runtime.readers import Absences
from capibara_flow.runtime.recalling import Recall
from capibara_flow.runtime.reports import Reporter, reports_or_none, this_process
from capibara_flow.runtime.understanding import Tools, Understanding
from capibara_flow.runtime.watching import Watched
from capibara_flow.settings import ROUTES, Settings, read_routes
from capibara_flow.wiring.extracting import extractor
from capibara_flow.wiring.fleets import is_hosted, watched_fleet
from capibara_flow.wiring.knowledge import library
from capibara_flow.wiring.streams import connected, expert_consumers, layout, tuned
from capibara_flow.wiring.usage import books
from topics.flow import hop, kind
from topics.streams import (
    Consumer,
    accountant_consumer,
    every_stream,
    ingester_consumer,
    retriever_consumer,
    router_consumer,
    served,
    subject_token,
    undertaker_consumer,
)

Needs = dict[str, Any]
Serve = Callable[[Mapping[Consumer, int]], Awaitable[None]]


@asynccontextmanager
async def worker_needs(name: str, settings: Settings) -> AsyncIterator[Needs]:
    """What the worker *name* is built with; whatever it opens is closed at the end."""
    async with AsyncExitStack() as stack:
        # A connection beside FastStream's: tokens take the fast lane.
        client = await stack.enter_async_context(connected(settings, kind(name)))
        common = {"layout": layout(settings), "retry_seconds": settings.worker.retry_seconds}
        if not hop(kind(name)).takes_facts:
            answers = FencedAnswers(client, f"{name}@{socket.gethostname()}:{os.getpid()}")
            await answers.start()
            stack.push_async_callback(answers.stop)
            common |= {"answers": answers, "patience_seconds": settings.worker.patience_seconds}
        yield common | await _OWN_NEEDS[name](settings, client, stack)


async def _router_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    choices = Choices()
    understanding = Understanding(partial(_tools, settings), read_routes, ROUTES)
    stack.push_async_callback(understanding.aclose)
    follow = partial(understanding.follow, settings.fleet_file)
    fleet = await watched_fleet(settings, stack, follow)
    await follow(fleet.value)
    _reporter(client, "router", lambda: choices.facts() | understanding.facts() | {"fleet_file": fleet.facts()}, stack)
    lanes, peers, weights = await _neighbours(settings, client, stack)
    holdings = Holdings(partial(reports_or_none, client))
    holdings.start()
    stack.push_async_callback(holdings.stop)
    grounding = {"has_documents": holdings, "grounding_seconds": settings.knowledge.seconds}
    waiting = {"lanes": lanes, "waits": Waits(client, peers, lanes, weights)}
    places = Places(client, peers, lanes, weights, lambda: [expert.name for expert in fleet.value.active])
    places.start()
    stack.push_async_callback(places.stop)
    consumer = tuned(router_consumer(), settings)
    needs = {"understand": understanding, "choices": choices, "consumer": consumer, "permits": settings.worker.router_permits}
    needs |= grounding | waiting
    return {"fleet": lambda: fleet.value, "configuration": _digest(lambda: (fleet.value, understanding.routes)), **needs}


def _digest(configured: Callable[[], tuple[Fleet, Routes | None]]) -> Callable[[], str]:
    """The digest of what is *configured*, computed anew only when that is something else."""
    known: list[tuple[Fleet, Routes | None, str]] = []

    def current() -> str:
        fleet, routes = configured()
        if not known or known[0][0] is not fleet or known[0][1] is not routes:
            known[:] = [(fleet, routes, digest(fleet, routes if fleet.policy else None))]
        return known[0][2]

    return current


def _tools(settings: Settings) -> Tools:
    embedder = build_embedder(settings.router.embedder, capacity=settings.router.cache_size)
    from capibara_flow.domain.understanding import Learned  # noqa: PLC0415  needs numpy, which is there when a model is

    return Tools(embedder, Learned.learn)


async def _caller_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    serving = Serving(settings, lambda expert: bool(expert.urls))
    fleet = await watched_fleet(settings, stack, lambda fleet: serving.reload(fleet, pools.reload))
    pools = Pools(fleet.value)
    stack.push_async_callback(pools.aclose)
    gates = Gatekeeper(this_process(), pools.available, partial(reports_or_none, client))
    stack.push_async_callback(gates.stop)
    lanes, queues = await _queues(settings, client, stack, this_process())
    facts = {"experts": pools.facts, "fleet_file": fleet.facts, QUEUE: queues.facts}
    reporter = _reporter(client, "caller", lambda: {name: tell() for name, tell in facts.items()}, stack)
    queues.on_change = reporter.changed

    def changed() -> None:
        gates.look()
        reporter.changed()

    def gate(consumer: Consumer) -> Gate | None:
        pool = pools.get(served(consumer)[0])
        return gates.gate(pool.expert) if pool else None

    pools.on_change = changed
    pools.start()
    gates.start()
    consumers = serving.begin(fleet.value)
    own = {"gate": gate, "recall": _recall(settings, client, fleet), "lanes": lanes, "queues": queues}
    return {"engines": pools, "consumers": consumers, "reloaded": serving.follow, **own}


async def _host_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    serving = Serving(settings, is_hosted)
    engines: dict[str, HostedEngine] = {}

    def reload(fleet: Fleet) -> None:
        """Launch what *fleet* says from now on; what it has no more is let go once nobody uses it."""
        wanted = {subject_token(each.name): _found(each, settings.fleet_file.parent) for each in fleet.active if is_hosted(each)}
        for token in engines.keys() - wanted.keys():
            host.release(engines.pop(token).expert.name)
        engines.update({token: host.engine(expert) for token, expert in wanted.items()})

    fleet = await watched_fleet(settings, stack, lambda fleet: serving.reload(fleet, reload))
    host = build_host((), settings.host)
    stack.push_async_callback(host.aclose)
    reload(fleet.value)
    lanes, queues = await _queues(settings, client, stack, f"{this_process()}-host")
    facts = {"host": host.facts, "fleet_file": fleet.facts, QUEUE: queues.facts}
    reporter = _reporter(client, "caller", lambda: {name: tell() for name, tell in facts.items()}, stack, "host")
    queues.on_change = reporter.changed
    consumers = serving.begin(fleet.value)
    own = {"recall": _recall(settings, client, fleet), "lanes": lanes, "queues": queues}
    return {"engines": engines, "consumers": consumers, "reloaded": serving.follow, **own}


async def _undertaker_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    absences = Absences(client, layout(settings))
    await absences.start()
    stack.push_async_callback(absences.stop)
    _reporter(client, "undertaker", dict, stack)
    # Every stream that there can be: a log may have been kept before it was switched off.
    erasing = partial(erase, client, streams=every_stream(), retry_seconds=settings.worker.retry_seconds)
    # A signal has no deadline of its own.
    patience = {"patience_seconds": settings.log.turn_age_seconds}
    return {"consumer": tuned(undertaker_consumer(), settings), "erase": erasing, **patience}


async def _retriever_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    found = await stack.enter_async_context(library(settings.knowledge))
    _reporter(client, "retriever", found.facts, stack)
    lanes, peers, weights = await _neighbours(settings, client, stack)
    knowledge = settings.knowledge
    limits = {"limit": knowledge.sources, "permits": knowledge.permits, "consumer": tuned(retriever_consumer(), settings)}
    deeds = {"search": found.search, "written": found.written, "documents": found.listed, "remove": found.remove}
    return {**deeds, **limits, "join": Join(client), "lanes": lanes, "waits": Waits(client, peers, lanes, weights)}


async def _ingester_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    found = await stack.enter_async_context(library(settings.knowledge))
    found.extract = await extractor(settings, stack)
    _reporter(client, "ingester", found.facts, stack)
    consumer, permits = tuned(ingester_consumer(), settings), settings.knowledge.ingest_permits
    return {"ingest": found.take_in, "check": found.check, "deposit": Deposit(client), "consumer": consumer, "permits": permits}


async def _accountant_needs(settings: Settings, client: TokenClient, stack: AsyncExitStack) -> Needs:
    kept = books(settings, client)
    # Before it starts, which may fail half-way.
    stack.push_async_callback(kept.stop)
    await kept.start()
    _reporter(client, "accountant", kept.facts, stack)
    return {"record": kept.record, "by_day": kept.by_day, "gate": kept.gate, "consumer": accountant_consumer()}


_OWN_NEEDS = {
    "router": _router_needs,
    "caller": _caller_needs,
    "host": _host_needs,
    "retriever": _retriever_needs,
    "ingester": _ingester_needs,
    "undertaker": _undertaker_needs,
    "accountant": _accountant_needs,
}


# --- who waits for an expert ----------------------------------------------------------------------------------


async def _neighbours(
    settings: Settings, client: TokenClient, stack: AsyncExitStack, process: str = ""
) -> tuple[Lanes, Peers, Mapping[str, float]]:
    """The lanes of all experts, what callers report (*process* is ourselves), and the weights of tenants."""
    lanes, peers = Lanes(client), Peers(client, (process,))
    for each in (lanes, peers):
        await each.start()
        stack.push_async_callback(each.stop)
    return lanes, peers, settings.worker.tenant_weights


async def _queues(settings: Settings, client: TokenClient, stack: AsyncExitStack, process: str) -> tuple[Lanes, Queues]:
    """What the pumps of this *process* share, and the lanes that they take from."""
    lanes, peers, weights = await _neighbours(settings, client, stack, process)
    return lanes, Queues(lanes, peers, weights)


# --- the fleet, as it changes ---------------------------------------------------------------------------------


class Serving:
    """Whose calls a worker takes, as the fleet changes: those of the experts that are *mine*.

    Calls that wait for an expert which is no longer there are taken as well, to be passed on: nobody else would.
    """

    def __init__(self, settings: Settings, mine: Callable[[Expert], bool]) -> None:
        self._settings, self._mine = settings, mine
        self._taken: dict[Consumer, int] = {}
        self._serve: Serve | None = None

    def begin(self, fleet: Fleet) -> Mapping[Consumer, int]:
        """What is taken at first, with as many permits."""
        self._taken = expert_consumers(self._settings, tuple(filter(self._mine, fleet.active)))
        return self._taken

    def follow(self, serve: Serve) -> None:
        """Call *serve* with what is to be taken, each time that this changes."""
        self._serve = serve

    async def reload(self, fleet: Fleet, engines: Callable[[Fleet], object]) -> None:
        """Let *engines* follow *fleet*, and take the calls of its experts."""
        engines(fleet)
        others = expert_consumers(self._settings, tuple(each for each in fleet.active if not self._mine(each)))
        orphans = {consumer: permits for consumer, permits in self._taken.items() if consumer not in others}
        taken = orphans | dict(self.begin(fleet))
        self._taken = taken
        if self._serve:
            await self._serve(taken)


def _found(expert: Expert, folder: Path) -> Expert:
    """*expert* with its weights where they are, seen from the fleet's *folder*."""
    return expert.model_copy(update={"weights": located(expert.weights or "", folder)})


def _recall(settings: Settings, client: TokenClient, fleet: Watched[Fleet]) -> Recall | None:
    def expert(name: str) -> Expert | None:
        return fleet.value.find(name)

    answers = settings.answers
    return Recall(AnswerCache(client), expert, answers.warmest) if answers.age_seconds else None


def _reporter(client: TokenClient, worker: str, facts: Callable[[], Mapping[str, Any]], stack: AsyncExitStack, part: str = "") -> Reporter:
    """Somebody who tells what this process knows as a *worker*, or as a *part* of one, until *stack* is closed."""
    reporter = Reporter(client, worker, f"{this_process()}{part and f'-{part}'}", facts)
    reporter.start()
    stack.push_async_callback(reporter.stop)
    return reporter
