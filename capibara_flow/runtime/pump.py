"""Permit-bounded pulling, fair between those who wait: at most as many messages at work as there are hands.

Of one consumer as many messages are asked for as there are free hands. Of several, the lanes of an expert, one of each: what comes while
all hands are busy is held here, its heartbeat kept up, until it is its turn. So every lane has its standing request or its first message
here, and a hand that gets free takes the one whose turn it is (``domain.sharing.Shares``), of one bucket the most urgent.
"""

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from capibara_flow.domain.sharing import Shares, remaining
from capibara_flow.runtime import work
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.inlet import Asking, Inlet
from capibara_flow.tasks import LONG, ended
from capibara_flow.telemetry import log
from topics.chat import PRIORITIES, bucket_of
from topics.streams import FIRST_LANE

_LATELY = 64  # calls whose length is remembered
_MINUTE = 60.0


@dataclass
class Sharing:
    """What a pump knows of the world around it: a tenant's *weight* by his message, whether others have hands *elsewhere*.

    *changed* is called when another number of calls is at work, or held, and it matters to somebody.
    """

    weight: Callable[[Msg], float] = lambda _: 1.0
    elsewhere: Callable[[], bool] = lambda: False
    changed: Callable[[], None] = lambda: None


@dataclass
class _Head:
    """A message that is held here, and when the broker last heard so."""

    message: Msg
    kept: float


@dataclass(eq=False)
class _Lane:
    """What comes by one inlet: what of it is *held* here, first things first, and when its calls of the last minute began."""

    name: str
    bucket: int
    rank: int
    held: dict[str, _Head] = field(default_factory=dict)
    starts: deque[float] = field(default_factory=deque)

    def count(self, now: float) -> int:
        """How many calls began in the last minute."""
        while self.starts and now - self.starts[0] > _MINUTE:
            self.starts.popleft()
        return len(self.starts)


class Pump:
    """Feeds *handle* with at most *permits* messages at once, and none while *gate* is shut; *ensure* creates what is missing.

    *ack_wait* is after how many seconds without a sign of life the broker gives a message to somebody else.
    """

    def __init__(
        self,
        client: Client,
        stream: str,
        durable: str,
        *,
        permits: int,
        handle: Callable[[Msg], Awaitable[object]],
        ensure: Callable[[], Awaitable[None]],
        gate: Gate | None = None,
        expires: float = 30.0,
        heartbeat: float = 2.0,
        ack_wait: float = 5.0,
        sharing: Sharing | None = None,
    ) -> None:
        self._client, self._stream, self._durable = client, stream, durable
        self._handle, self._gate = handle, gate
        self._permits = self._free = permits
        self._asking = Asking(expires, heartbeat)
        self._ack_wait = ack_wait
        self._sharing = sharing or Sharing()
        self._shares = Shares()
        self._running = False
        self._lanes: dict[Inlet, _Lane] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._at_work: dict[str, tuple[_Lane, float]] = {}
        self._seconds: deque[float] = deque(maxlen=_LATELY)
        self._first = math.inf
        self._tasks: list[asyncio.Task[None]] = []
        self.add(FIRST_LANE, durable, ensure)

    # --- lanes ------------------------------------------------------------------------------------------------

    def add(self, lane: str, durable: str, ensure: Callable[[], Awaitable[None]]) -> None:
        """Take from the consumer *durable* as well, which *ensure* creates: those wait there who wait in *lane*."""
        bucket, priority = bucket_of(lane)
        calls = {"ensure": ensure, "wanted": self._wanted, "enough": self._enough, "arrived": self._arrived}
        inlet = Inlet(self._client, self._stream, durable, asking=self._asking, **calls)  # type: ignore[arg-type]  # one value each
        self._lanes[inlet] = _Lane(lane, bucket, PRIORITIES.index(priority))
        if self._wants:
            inlet.open()
            if len(self._lanes) == 2:  # the first one asked for all that there is to do
                next(iter(self._lanes)).renew_soon()

    async def keep(self, lanes: Iterable[str]) -> None:
        """Let go of all lanes but the first one and these."""
        wanted = {FIRST_LANE, *lanes}
        for inlet, lane in list(self._lanes.items()):
            if lane.name not in wanted:
                await inlet.shut()
                del self._lanes[inlet]
                await self._give_back(lane)
        await self._ask_all()

    @property
    def lanes(self) -> set[str]:
        """The lanes that are taken from."""
        return {lane.name for lane in self._lanes.values()}

    # --- from start to end --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Provision, subscribe and ask for the first messages."""
        self._running = True
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._hold())]
        if self._gate:
            self._tasks.append(asyncio.create_task(self._mind(self._gate)))
        if self._wants:
            self._open()

    async def unsubscribe(self) -> None:
        """Take no more; messages at work go on. Named as FastStream's subscriptions call it."""
        self._running = False
        for task in self._tasks:
            task.cancel()
        await self._shut()
        await ended(*self._tasks)

    async def finish(self, seconds: float) -> None:
        """Wait *seconds* for what is at work; what is not done then is cancelled, and so handed over."""
        if self._jobs:
            _, late = await asyncio.wait(self._jobs, timeout=seconds)
            await ended(*late, again=LONG)

    @property
    def _wants(self) -> bool:
        return self._running and (self._gate is None or self._gate.is_open)

    def _open(self) -> None:
        for inlet in self._lanes:
            inlet.open()

    async def _shut(self) -> None:
        await asyncio.gather(*(inlet.shut() for inlet in self._lanes))
        for lane in self._lanes.values():
            await self._give_back(lane)

    async def _mind(self, gate: Gate) -> None:
        """Ask for nothing while *gate* is shut; what is at work goes on."""
        while True:
            await gate.until_shut()
            await self._shut()
            await gate.until_open()
            self._open()

    async def _watch(self) -> None:
        """Ask anew when requests got lost: after a reconnect, or as an inlet finds out."""
        reconnects = self._client.stats["reconnects"]
        while True:
            await asyncio.sleep(self._asking.heartbeat / 2)
            before, reconnects = reconnects, self._client.stats["reconnects"]
            for inlet in list(self._lanes):
                if reconnects != before:
                    inlet.renew_soon()
                else:
                    inlet.look()

    # --- asking ---------------------------------------------------------------------------------------------------

    def _wanted(self, inlet: Inlet) -> int:
        """How many messages *inlet* may bring."""
        if not self._wants or inlet not in self._lanes:
            return 0
        if len(self._lanes) == 1:
            return self._free
        if self._free == 0 and self._sharing.elsewhere():
            return 0
        return 0 if self._lanes[inlet].held else 1

    def _enough(self) -> int:
        """Half of the hands."""
        return (self._permits + 1) // 2 if len(self._lanes) == 1 else 1

    async def _ask_all(self) -> None:
        for inlet in list(self._lanes):
            await inlet.ask()

    async def relook(self) -> None:
        """Others have got a hand free, or have none free any more: they shall do what waits here, or it shall wait here."""
        if self._free == 0 and self._sharing.elsewhere():
            for lane in self._lanes.values():
                await self._give_back(lane)
        else:
            await self._ask_all()

    # --- messages ---------------------------------------------------------------------------------------------------

    async def _arrived(self, inlet: Inlet, message: Msg) -> None:
        # A stream that was created anew counts from one again: the time it was stored tells two messages apart.
        which = f"{message.metadata.sequence.stream} {message.metadata.timestamp.timestamp()}"
        lane = self._lanes.get(inlet)
        if which in self._at_work:
            # This process was paused for longer than the broker waits. What it was doing it goes on with, and settles.
            log.info("work_goes_on", durable=inlet.durable, subject=message.subject)
            await inlet.ask()
        elif lane is None or (self._free == 0 and self._sharing.elsewhere()):
            await message.nak()  # somebody else can begin at once
        elif self._free:
            self._begin(lane, which, message)
            if len(self._lanes) > 1:
                await inlet.ask()
        else:
            lane.held[which] = _Head(message, self._now())
            self._sharing.changed()

    def _begin(self, lane: _Lane, which: str, message: Msg, *, waited: bool = False) -> None:
        self._free -= 1
        now = self._now()
        self._at_work[which] = lane, now
        self._first = min(self._first, now)
        lane.starts.append(now)
        lane.count(now)
        self._shares.begin(lane.bucket, self._sharing.weight(message), more=bool(message.metadata.num_pending))
        job = asyncio.create_task(self._work(message, which, waited=waited))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        if self._free == 0:
            self._sharing.changed()

    async def _work(self, message: Msg, which: str, *, waited: bool) -> None:
        if waited:
            work.waited()
        try:
            await self._handle(message)
        finally:
            _, began = self._at_work.pop(which)
            self._seconds.append(self._now() - began)
            self._free += 1
            if self._free == 1:
                self._sharing.changed()
            inlet = self._begin_next()
            if self._client.is_connected:
                with suppress(NatsError):  # the watchdog sees that nobody asks
                    await (inlet.ask() if inlet else self._ask_all())

    def _begin_next(self) -> Inlet | None:
        """Begin with what is held here and next; where it was held."""
        self._forget_stale()
        waiting: dict[int, tuple[Inlet, _Lane]] = {}
        for inlet, lane in self._lanes.items():
            if lane.held and (lane.bucket not in waiting or lane.rank < waiting[lane.bucket][1].rank):
                waiting[lane.bucket] = inlet, lane
        if not waiting or not self._wants:
            return None
        inlet, lane = waiting[self._shares.next(waiting)]
        which = next(iter(lane.held))
        self._begin(lane, which, lane.held.pop(which).message, waited=True)
        return inlet

    # --- what is held -----------------------------------------------------------------------------------------------

    async def _hold(self) -> None:
        """Let the broker know that what is held is not lost."""
        while True:
            await asyncio.sleep(self._ack_wait / 3)
            self._forget_stale()
            heads = [head for lane in self._lanes.values() for head in lane.held.values()]
            for head in heads if self._client.is_connected else ():
                with suppress(NatsError):
                    await head.message.in_progress()
                    head.kept = self._now()

    def _forget_stale(self) -> None:
        """What the broker may have given to somebody else meanwhile, because we were paused or cut off, is his."""
        oldest = self._now() - 0.9 * self._ack_wait
        for lane in self._lanes.values():
            for which in [which for which, head in lane.held.items() if head.kept < oldest]:
                del lane.held[which]

    async def _give_back(self, lane: _Lane) -> None:
        """Let somebody else have what is held at once."""
        held = list(lane.held.values())
        lane.held.clear()
        for head in held:
            with suppress(NatsError):  # cut off: it comes again when its time is up
                await head.message.nak()
        if held:
            self._sharing.changed()

    # --- what it tells ------------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether all hands are busy."""
        return self._free == 0

    def facts(self) -> dict[str, object]:
        """How many calls are at work, by lane, and held; how many began *over* the last minute, or as long as there were any.

        The mean length of a call, of late, and what those at work will still take, both in seconds.
        """
        now, lanes = self._now(), list(self._lanes.values())
        at_work = Counter(lane.name for lane, _ in self._at_work.values())
        facts: dict[str, object] = {
            "capacity": self._permits,
            "takes": self._wants,
            "work": dict(at_work),
            "held": {lane.name: len(lane.held) for lane in lanes if lane.held},
            "over": round(min(_MINUTE, max(1.0, now - self._first)), 1),
            "minute": {lane.name: count for lane in lanes if (count := lane.count(now))},
        }
        if self._seconds:
            left = sorted(remaining(now - began, self._seconds) for _, began in self._at_work.values())
            facts |= {"seconds": round(sum(self._seconds) / len(self._seconds), 3), "left": [round(each, 3) for each in left]}
        return facts

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
