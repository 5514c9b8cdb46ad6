"""All addresses of one expert, used as one engine: watched, and asked only where an answer may be expected."""

import asyncio
import errno
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from capibara_flow.domain.health import Breaker, Fault, Thresholds
from capibara_flow.errors import CapibaraError, EngineBroke, EngineBusy, EngineFault, EngineUnreachable
from capibara_flow.ports import Abilities, ChatEngine, Piece
from capibara_flow.tasks import ended
from capibara_flow.telemetry import BREAKER_OPENED, ENGINE_STREAMS, ENGINE_UP, log
from topics.chat import ChatRequest

#: How long a replica that was busy, or failed, comes last.
REST_SECONDS = 5.0
_MOMENT = 0.01  # seconds: what a timer may come too early


@dataclass(frozen=True)
class Probing:
    """Seconds between two looks at an address, give or take *jitter* of them: processes are not to march in step."""

    up_seconds: float = 15.0
    down_seconds: float = 2.0
    jitter: float = 0.2


_LIMITS, _PROBING = Thresholds(), Probing()


@dataclass(eq=False)
class _Replica:
    engine: ChatEngine
    index: int = 0
    shown: bool = False
    breaker: Breaker = field(default_factory=Breaker)
    streams: int = 0
    rests_until: float = 0.0
    last_used: int = 0
    openings: int = 0
    last_fault: str | None = None
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    probe: "asyncio.Task[None] | None" = None

    def facts(self) -> dict[str, Any]:
        """What is known of it, without its address."""
        known = {"replica": self.index, "state": self.breaker.state, "streams": self.streams}
        return known | {"faults": self.breaker.faults, "opened": self.openings, "last_fault": self.last_fault}


class Pool:
    """A ``ports.ChatEngine`` over equal engines of one *expert*, one for each of *urls*: the least busy one answers, or else the next.

    Whoever fails repeatedly is left alone for a while (``domain.health.Breaker``); when nobody may be asked that is said at once, with
    ``EngineUnreachable``. Once a piece has been yielded an error is the caller's, who knows how to go on; it will be with another
    replica. Between ``start`` and ``aclose`` every address is probed, so that one that comes back is soon used again.
    """

    def __init__(
        self,
        expert: str,
        urls: Sequence[str],
        build: Callable[[str], ChatEngine],
        *,
        limits: Thresholds = _LIMITS,
        probing: Probing = _PROBING,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if not urls:
            raise ValueError(f"{expert} has no address")
        self.expert = expert
        self.on_change = on_change
        self._limits, self._probing, self._clock, self._chance = limits, probing, clock, chance
        self._replicas = {url: _Replica(build(url)) for url in dict.fromkeys(urls)}
        self._leaving: set[_Replica] = set()
        self._uses = 0
        self._probes = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._show()

    # --- asking -----------------------------------------------------------------------------------------------

    @property
    def abilities(self) -> Abilities:
        """They are equal: those of the first."""
        return next(iter(self._replicas.values())).engine.abilities

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """The answer of the first replica that can begin; raises what the last one raised when none can."""
        waiting = list(self._replicas.values())
        trouble: EngineFault | None = None
        while (replica := self._choice(waiting)) is not None:
            waiting.remove(replica)
            begun = told = False
            self._begin(replica)
            try:
                async with aclosing(replica.engine.stream(request)) as pieces:
                    async for piece in pieces:
                        if not begun:
                            begun = True
                            self._settle(replica, replica.breaker.began(self._limits))
                        yield piece
            except EngineFault as error:
                told, trouble = True, error
                self._failed(replica, error)
                if begun:
                    raise
            else:
                told = True
                self._settle(replica, replica.breaker.succeeded())
                return
            finally:
                self._end(replica, told)
        raise trouble or EngineUnreachable(f"no server of {self.expert} can be reached now{self._because()}")

    async def health(self) -> None:
        """Return when one replica can answer; raises what the last one raised otherwise."""
        *others, last = self._replicas.values()
        for replica in others:
            with suppress(EngineFault):
                return await replica.engine.health()
        return await last.engine.health()

    def _choice(self, waiting: list[_Replica]) -> _Replica | None:
        now = self._clock()
        able = [each for each in waiting if each.breaker.admits(now) and each not in self._leaving]
        return min(able, key=lambda each: (each.rests_until > now, each.streams, each.last_used), default=None)

    def _begin(self, replica: _Replica) -> None:
        self._uses += 1
        replica.last_used = self._uses
        self._count(replica, 1)
        self._settle(replica, replica.breaker.admitted(self._clock(), self._limits))

    def _end(self, replica: _Replica, told: bool) -> None:
        if not told:
            self._settle(replica, replica.breaker.let_go())
        self._count(replica, -1)
        self._ended.set()

    def _count(self, replica: _Replica, more: int) -> None:
        replica.streams += more
        if replica.shown:
            ENGINE_STREAMS.labels(self.expert, replica.index).set(replica.streams)

    def _failed(self, replica: _Replica, error: EngineFault) -> None:
        replica.rests_until = self._clock() + REST_SECONDS
        if isinstance(error, EngineBusy) and replica.breaker.state == "closed":
            replica.last_fault = str(error)
            return  # it is well, but has enough to do
        self._fault(replica, error)

    def _fault(self, replica: _Replica, error: CapibaraError) -> None:
        replica.last_fault = str(error)
        self._settle(replica, replica.breaker.failed(self._clock(), _kind(error), self._limits))

    def _because(self) -> str:
        told = {each.last_fault for each in self._replicas.values() if each.last_fault}
        return f": {told.pop()}" if len(told) == 1 else ""

    def _settle(self, replica: _Replica, breaker: Breaker) -> None:
        """From here on *breaker* is what is known of *replica*."""
        before, replica.breaker = replica.breaker, breaker
        if before.state == breaker.state or not replica.shown:
            return
        if breaker.state == "open":
            replica.openings += 1
            replica.opened.set()
            BREAKER_OPENED.labels(self.expert, replica.index).inc()
        ENGINE_UP.labels(self.expert, replica.index).set(breaker.state == "closed")
        facts = {"expert": self.expert, "replica": replica.index, "state": breaker.state, "last_fault": replica.last_fault}
        log.log(logging.WARNING if breaker.state == "open" else logging.INFO, "engine_breaker", **facts)
        self._tell()

    # --- telling ----------------------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether somebody may be asked now."""
        now = self._clock()
        return any(each.breaker.admits(now) for each in self._staying())

    async def wait_available(self) -> None:
        """Return as soon as somebody may be asked."""
        while not self.available:
            chance = min((each.breaker.until for each in self._staying()), default=math.inf) - self._clock()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if chance == math.inf else max(_MOMENT, chance)):
                    await self._changed.wait()

    def _staying(self) -> Iterator[_Replica]:
        return (each for each in self._replicas.values() if each not in self._leaving)

    def facts(self) -> dict[str, Any]:
        """What is known of the expert's engines, for reports: no address is in it."""
        replicas = [each.facts() for each in self._replicas.values()]
        return {"available": self.available, "streams": sum(each["streams"] for each in replicas), "replicas": replicas}

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self.on_change()

    # --- probing ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to probe every address."""
        self._probes = True
        for replica in self._replicas.values():
            replica.probe = replica.probe or asyncio.create_task(self._watch(replica))

    async def _watch(self, replica: _Replica) -> None:
        while True:
            try:
                await replica.engine.health()
            except CapibaraError as error:
                self._fault(replica, error)
            else:
                self._settle(replica, replica.breaker.alive())
            await self._pause(replica)

    async def _pause(self, replica: _Replica) -> None:
        """Wait until the next look: soon, when it is out of reach, or as soon as it is."""
        share = 1 + self._probing.jitter * (2 * self._chance() - 1)
        if replica.breaker.state == "closed":
            replica.opened.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._probing.up_seconds * share):
                    await replica.opened.wait()
            if replica.breaker.state == "closed":
                return
        await asyncio.sleep(self._probing.down_seconds * share)

    # --- coming and going -------------------------------------------------------------------------------------

    def update(self, urls: Sequence[str], build: Callable[[str], ChatEngine]) -> "asyncio.Task[None]":
        """Serve *urls* from now on: what is known of those that stay is kept, new ones are built.

        What is no longer among them ends its streams in peace, and is closed then: that is when the returned task is done.
        """
        self._show(shown=False)
        known = self._replicas
        self._replicas = {url: known.get(url) or _Replica(build(url)) for url in dict.fromkeys(urls)}
        self._show()
        if self._probes:
            self.start()
        self._tell()
        return self._part_with([each for url, each in known.items() if url not in self._replicas])

    def drain(self) -> "asyncio.Task[None]":
        """Let the streams at work end in peace, and no others begin; the returned task is done when everything is closed."""
        self._show(shown=False)
        leaving = self._part_with(list(self._replicas.values()))
        self._tell()
        return leaving

    async def aclose(self) -> None:
        """Stop probing and close all engines, whatever is at work."""
        everybody = {*self._replicas.values(), *self._leaving}
        self._show(shown=False)
        await _stopped(everybody)
        for replica in everybody:
            await replica.engine.aclose()

    def _show(self, *, shown: bool = True) -> None:
        """Number the replicas and put them into the metrics, or take them out."""
        for index, replica in enumerate(self._replicas.values()):
            labels = (self.expert, str(index))
            if shown:
                ENGINE_UP.labels(*labels).set(replica.breaker.state == "closed")
                ENGINE_STREAMS.labels(*labels).set(replica.streams)
                BREAKER_OPENED.labels(*labels)
            elif replica.shown:
                for metric in (ENGINE_UP, ENGINE_STREAMS, BREAKER_OPENED):
                    metric.remove(*labels)
            replica.index, replica.shown = index, shown

    def _part_with(self, gone: list[_Replica]) -> "asyncio.Task[None]":
        self._leaving |= set(gone)
        return asyncio.create_task(self._leave(gone))

    async def _leave(self, gone: list[_Replica]) -> None:
        await _stopped(gone)
        while any(each.streams for each in gone):
            self._ended.clear()
            await self._ended.wait()
        for replica in gone:
            await replica.engine.aclose()
        self._leaving -= set(gone) - set(self._replicas.values())


async def _stopped(replicas: Collection[_Replica]) -> None:
    probes = [each.probe for each in replicas if each.probe]
    for replica in replicas:
        replica.probe = None
    await ended(*probes)


def _kind(error: CapibaraError) -> Fault:
    """What *error* tells of the engine."""
    # What was said by somebody who was reached tells of the model behind him: that he still answers probes disproves nothing.
    if isinstance(error, EngineBroke) or error.__cause__ is None:
        return "broke"
    return "refused" if getattr(error.__cause__, "errno", None) == errno.ECONNREFUSED else "unreachable"
