"""The queues of experts: what a caller's pumps need to share fairly, and what a router knows of the time that a turn will wait."""

import asyncio
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from capibara_flow.domain.sharing import Hands, Place, Share, place
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.lanes import Lanes, is_lane, subjects_of
from capibara_flow.runtime.peers import Desk, Peers
from capibara_flow.runtime.pump import Pump, Sharing
from capibara_flow.telemetry import log
from topics.chat import PRIORITIES, CallExpert, bucket_of, lane_of
from topics.message import TENANT
from topics.output import Queued
from topics.streams import FIRST_LANE, Consumer, caller_consumer, served

Ensure = Callable[[Consumer], Callable[[], Awaitable[None]]]

_FRESH = 0.25  # seconds for which a look at a queue is believed
_UNTOLD = 0.15  # seconds until whoever has taken a call has reported it, if it took his last hand
SHORT = 0.2  # seconds: a wait that is over before anybody has read of it is not told


class Queues:
    """What the pumps of this process share: the lanes, the weights of tenants, what others report, and what they shall hear of us."""

    def __init__(self, lanes: Lanes, peers: Peers, weights: Mapping[str, float]) -> None:
        self._lanes, self._peers, self._weights = lanes, peers, weights
        self._pumps: dict[str, tuple[Pump, Consumer, Ensure]] = {}
        self._full: dict[str, bool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        lanes.on_change = self._relane
        peers.on_change = self._relook
        #: Called when others should hear of us.
        self.on_change: Callable[[], None] = lambda: None

    def sharing(self, consumer: Consumer) -> Sharing:
        """What the pump of *consumer* is made with."""
        expert, _ = served(consumer)
        elsewhere, changed = partial(self._peers.elsewhere, expert), partial(self._changed, expert)
        return Sharing(self._weight, elsewhere, changed)

    def serve(self, pump: Pump, consumer: Consumer, ensure: Ensure) -> None:
        """Let *pump*, which takes from *consumer*, take from all lanes of that expert, as they come and go."""
        expert, _ = served(consumer)
        self._pumps[expert] = pump, consumer, ensure
        self._relane(expert)
        self.on_change()

    def leave(self, pump: Pump) -> None:
        """*pump* takes no more."""
        for expert in [expert for expert, (each, _, _) in self._pumps.items() if each is pump]:
            del self._pumps[expert]
        self.on_change()

    def facts(self) -> dict[str, dict[str, object]]:
        """``Pump.facts`` by expert (a token)."""
        return {expert: pump.facts() for expert, (pump, _, _) in self._pumps.items()}

    def _weight(self, message: Msg) -> float:
        return self._weights.get((message.headers or {}).get(TENANT, ""), 1.0)

    def _changed(self, expert: str) -> None:
        """Others want to know when the last hand is taken, or one is free again; and what is at work while others wait."""
        if expert in self._pumps:
            full = self._pumps[expert][0].is_full
            if full or self._full.get(expert):
                self.on_change()
            self._full[expert] = full

    def _relane(self, expert: str) -> None:
        if expert not in self._pumps:
            return
        pump, consumer, ensure = self._pumps[expert]
        wanted = set(self._lanes.of(expert)) | {FIRST_LANE}
        for lane in sorted(wanted - pump.lanes):
            with suppress(ValueError):  # of another version
                found = replace(caller_consumer(expert, lane), ack_wait=consumer.ack_wait, max_deliver=consumer.max_deliver)
                pump.add(lane, found.durable, ensure(found))
        if pump.lanes - wanted:
            self._soon(pump.keep(wanted))

    def _relook(self) -> None:
        for pump, _, _ in self._pumps.values():
            if len(pump.lanes) > 1:
                self._soon(pump.relook())

    def _soon(self, deed: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(deed)
        self._tasks.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("lanes_not_followed", error=repr(error))


@dataclass(frozen=True)
class _Look:
    """How many turns a queue had *at* that time, by lane."""

    at: float
    turns: Mapping[str, int]
    total: int


@dataclass
class _Sent:
    """A call on its way to *lane*; *at* is when it left us, as soon as it has."""

    lane: str
    at: float = math.inf


class Waits:
    """How long turns wait for an expert whose hands are all busy; while any is free, nobody is asked."""

    def __init__(
        self, client: TokenClient, peers: Peers, lanes: Lanes, weights: Mapping[str, float], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client, self._peers, self._lanes, self._weights, self._clock = client, peers, lanes, weights, clock
        self._looks: dict[str, _Look] = {}
        self._looking: dict[str, asyncio.Task[_Look]] = {}
        self._sent: dict[str, deque[_Sent]] = {}

    @asynccontextmanager
    async def telling(self, command: CallExpert, tenant: str) -> AsyncIterator[tuple[Queued, ...]]:
        """What to tell the client of *command*, which *tenant* sends in this block: nothing when it is begun at once, or nobody knows."""
        desks = self._peers.of(command.expert)
        if not sum(desk.capacity for desk in desks):
            yield ()
            return
        now, before = self._clock(), self._sent.setdefault(command.expert, deque())
        while before and now - before[0].at > 2 * _FRESH:
            before.popleft()
        untold = sum(1 for _ in takewhile(lambda each: now - each.at < _UNTOLD, reversed(before)))
        sent = tuple(before) if sum(desk.free for desk in desks) <= untold else None
        ours = _Sent(command.lane)
        before.append(ours)
        try:
            yield () if sent is None else await self._behind(command, tenant, desks, sent)
        finally:
            ours.at = self._clock()

    async def _behind(self, command: CallExpert, tenant: str, desks: list[Desk], sent: "tuple[_Sent, ...]") -> tuple[Queued, ...]:
        """What to tell of *command* while all hands are busy, and others were *sent* just before it."""
        try:
            look = await self._look(command.expert)
        except (NatsError, TimeoutError, KeyError, ValueError) as error:
            log.debug("queue_unseen", expert=command.expert, error=repr(error))
            return ()
        since = [each.lane for each in sent if each.at > look.at]
        if look.total + len(since) < sum(desk.capacity for desk in desks):
            return ()
        turns = Counter(look.turns) + Counter(since)
        found = self._place(command, tenant, desks, _waiting(turns, desks))
        known = found.seconds > 0
        return () if known and found.seconds < SHORT else (queued(command.turn, command.request.model or command.expert, found),)

    async def _look(self, expert: str) -> _Look:
        """The queue of *expert*, as it is now or was a moment ago."""
        last = self._looks.get(expert)
        if last and self._clock() - last.at < _FRESH:
            return last
        if expert not in self._looking:
            self._looking[expert] = asyncio.create_task(self._ask(expert))
            self._looking[expert].add_done_callback(lambda _: self._looking.pop(expert))
        return await asyncio.shield(self._looking[expert])

    async def _ask(self, expert: str) -> _Look:
        at = self._clock()
        turns = await turns_of(self._client, expert)
        self._looks[expert] = look = _Look(at, turns, sum(turns.values()))
        return look

    def _place(self, command: CallExpert, tenant: str, desks: list[Desk], waiting: Mapping[str, int]) -> Place:
        tenants = dict(self._lanes.of(command.expert)) | {command.lane: tenant}
        return Line(waiting, desks, tenants, self._weights, self._clock()).place(command.lane, waiting.get(command.lane, 0))


@dataclass(frozen=True)
class Line:
    """Who waits for an expert: how many turns, by lane; the *desks* where others are at work; all as of *now*.

    The *tenants* of lanes are served by their *weights*, by name.
    """

    waiting: Mapping[str, int]
    desks: list[Desk]
    tenants: Mapping[str, str]
    weights: Mapping[str, float]
    now: float

    @cached_property
    def _shares(self) -> dict[int, Share]:
        return shared(self.waiting, self.desks, {lane: self.weights.get(name, 1.0) for lane, name in self.tenants.items()})

    @cached_property
    def hands(self) -> Hands:
        """All *desks* as one."""
        return together(self.desks, self.now)

    @cached_property
    def _at_work(self) -> set[str]:
        return {lane for desk in self.desks for lane, count in desk.work.items() if count}

    def place(self, lane: str, behind: int) -> Place:
        """The place of a turn in *lane* that has so many of its lane before it."""
        bucket, priority = bucket_of(lane)
        urgent = PRIORITIES[: PRIORITIES.index(priority)]
        ahead = behind + sum(self.waiting.get(lane_of(bucket, each), 0) for each in urgent)
        fresh = not ahead and not self._at_work.intersection(lane_of(bucket, each) for each in PRIORITIES)
        return place(bucket, ahead, self._shares, self.hands, fresh=fresh)


def shared(waiting: Mapping[str, int], desks: list[Desk], weights: Mapping[str, float]) -> dict[int, Share]:
    """What each bucket has, of the turns that wait and of those that began in the last minute, both by lane, as *weights* are."""
    rates: dict[str, float] = defaultdict(float)
    for desk in desks:
        for lane, count in desk.minute.items():
            rates[lane] += count / desk.over
    found: dict[int, Share] = {}
    for lane in {*waiting, *rates}:
        bucket, _ = bucket_of(lane)
        old = found.get(bucket, Share())
        found[bucket] = Share(old.waiting + waiting.get(lane, 0), old.rate + rates.get(lane, 0.0), weights.get(lane, old.weight))
    return found


def together(desks: list[Desk], now: float) -> Hands:
    """All *desks* as one."""
    known = [(desk.seconds, max(1, sum(desk.minute.values()))) for desk in desks if desk.seconds is not None]
    calls = sum(count for _, count in known)
    seconds = sum(each * count for each, count in known) / calls if calls else 0.0
    left = [max(0.0, each - (now - desk.at)) for desk in desks for each in desk.left]
    return Hands(sum(desk.capacity for desk in desks), seconds, left)


async def turns_of(client: TokenClient, expert: str) -> dict[str, int]:
    """How many turns are in the queue of *expert* (a token), by lane, those at work among them. Raises what nats-py raises."""
    found: Counter[str] = Counter(subject.rsplit(".", 1)[-1] for subject in await subjects_of(client, expert))
    return {lane: count for lane, count in found.items() if is_lane(lane)}


def _waiting(turns: Mapping[str, int], desks: list[Desk]) -> dict[str, int]:
    """How many of *turns* wait, by lane.

    Reports are a moment old: where they tell of fewer calls at work than there can be, the longest lanes have the rest.
    """
    left = dict(turns)
    busy: Counter[str] = Counter()
    for desk in desks:
        busy.update(desk.work)
    for lane, count in busy.items():
        left[lane] = max(0, left.get(lane, 0) - count)
    too_many = sum(left.values()) - max(0, sum(turns.values()) - sum(desk.capacity for desk in desks))
    for _ in range(too_many):
        longest = max(left, key=left.__getitem__)
        left[longest] -= 1
    return left


def queued(turn: str, expert: str, found: Place) -> Queued:
    """What the client of *turn* is told of the place that was *found* for it."""
    eta = round(found.seconds, 2 if found.seconds < 10 else 1) if found.seconds > 0 else None
    return Queued(turn=turn, expert=expert, position=found.position, eta_s=eta)
