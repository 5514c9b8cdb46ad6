"""The host: loads experts when they are asked for, keeps as many as there is room for, and speaks with them.

What is loaded when is decided in ``domain.hosting``; here it is done.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.hosting import Admit, Hosting, Limits, Refuse, Rest, Start, Stop, Why
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.host import launch, machine
from capibara_flow.engines.host.child import Child, Launcher, LoadFailed
from capibara_flow.engines.requests import refuse_beyond
from capibara_flow.errors import EngineBroke, EngineUnreachable
from capibara_flow.ports import Abilities, ChatEngine, Load, Piece
from capibara_flow.settings import HostSettings
from capibara_flow.tasks import LONG, ended
from capibara_flow.telemetry import EXPERT_EVICTIONS, EXPERT_LOAD_SECONDS, EXPERT_LOADED, EXPERT_LOADS, log
from topics.chat import ChatRequest

#: How often who waits for a load is told how long it still takes.
TELL_SECONDS = 2.0
_NOWHERE = "http://127.0.0.1"


class ExpertHost:
    """Serves *experts*, each by an engine of its own that is started on first use; ``engine`` is how to speak with one.

    A load may take *load_timeout_s*, an end *grace_s*, and a word on its health *ask_s*. Nothing of it outlives ``aclose``, or this
    process. Use it within one event loop, in a thread that lives on.
    """

    def __init__(
        self,
        experts: Iterable[Expert] = (),
        limits: Limits | None = None,
        *,
        load_timeout_s: float = 600,
        grace_s: float = 10,
        ask_s: float = 5,
        launcher: Launcher = launch.command,
        free_mib: Callable[[], int] = machine.free_mib,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosting = Hosting(limits or Limits())
        self._load_timeout, self._grace, self._ask_seconds = load_timeout_s, grace_s, ask_s
        self._launcher, self._free_mib, self._clock = launcher, free_mib, clock
        self._experts: dict[str, Expert] = {}
        self._children: dict[str, Child] = {}
        self._tickets: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        for expert in experts:
            self.engine(expert)

    def engine(self, expert: Expert) -> "HostedEngine":
        """The engine of *expert*; who is served already is served in the new way, once nobody uses the old one."""
        if self._experts.get(expert.name) != expert:
            self._hosting.add(launch.need(expert))
            self._experts[expert.name] = expert
            EXPERT_LOADED.labels(expert.name).set(0)
        return HostedEngine(self, expert, self._launcher)

    def release(self, name: str) -> None:
        """Serve *name* no longer; who uses it may finish."""
        if self._experts.pop(name, None) is not None and not self._closed:
            self._hosting.retire(name)
            self._step()

    def reason_against(self, name: str) -> str:
        """Why *name* cannot be asked for now, or nothing."""
        return "the host is being stopped" if self._closed else self._hosting.blocked(name, self._clock())

    async def stream(self, name: str, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """The answer of *name*, after ``Load`` pieces while it has to be loaded; raises as ``ports.ChatEngine`` says."""
        number, admitted = self._ask(name)
        try:
            while not admitted.done():
                yield Load(self._hosting.eta(name, self._clock()))
                await asyncio.wait({admitted}, timeout=TELL_SECONDS)
            admitted.result()
            child = self._alive(name)
            if child.resting:
                yield Load()
            await child.wake()
            async with aclosing(child.engine.stream(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except (EngineBroke, EngineUnreachable):
            self._suspect(name)
            raise
        finally:
            self._leave(number)

    def facts(self) -> dict[str, Any]:
        """Figures for ``/stats``."""
        experts = self._hosting.facts(self._clock())
        return {
            "max_loaded_experts": self._hosting.limits.max_loaded,
            "queued": self._hosting.queued,
            "free_mib": self._free_mib(),
            "reserve_mib": self._hosting.limits.reserve_mib,
            "experts": {
                name: each | {"pid": self._children[name].pid if name in self._children else None} for name, each in experts.items()
            },
        }

    async def aclose(self) -> None:
        """Refuse who waits, and end every engine; returns when nothing is left."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for admitted in self._tickets.values():
            if not admitted.done():
                admitted.set_exception(EngineUnreachable("the host is being stopped"))
        await ended(*self._tasks, again=LONG)
        children, self._children = list(self._children.values()), {}
        await asyncio.gather(*(child.stop() for child in children))
        for child in children:
            EXPERT_LOADED.labels(child.name).set(0)

    # --- one request ----------------------------------------------------------------------------------------------

    def _alive(self, name: str) -> Child:
        if name not in self._children:
            raise EngineUnreachable(f"{name} ended before it could be asked")
        return self._children[name]

    def _ask(self, name: str) -> tuple[int, asyncio.Future[None]]:
        if self._closed:
            raise EngineUnreachable("the host is being stopped")
        number = next(self._numbers)
        self._hosting.ask(name, number, self._clock())
        admitted = self._tickets[number] = asyncio.get_running_loop().create_future()
        self._step()
        return number, admitted

    def _leave(self, number: int) -> None:
        admitted = self._tickets.pop(number)
        if admitted.done():
            admitted.exception()  # nobody else will look at it
        self._hosting.leave(number, self._clock())
        self._step()

    def _suspect(self, name: str) -> None:
        """An answer broke off: if the engine does not even tell its health any more, end it, so that it is started anew."""
        child = self._children.get(name)
        if child and not self._closed and not child.stopping:
            self._do(self._examine(child))

    async def _examine(self, child: Child) -> None:
        if await child.hangs():
            log.warning("expert_hangs", expert=child.name)
            await child.put_down()

    # --- doing what was decided -----------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._closed:
            return
        now = self._clock()
        for deed in self._hosting.decide(now, self._free_mib()):
            match deed:
                case Start(name):
                    self._do(self._load(self._experts[name]))
                case Stop(name, why):
                    self._do(self._unload(name, why))
                case Rest(name):
                    self._do(self._children[name].rest(partial(self._hosting.idle, name)))
                case Admit(number):
                    self._tickets[number].set_result(None)
                case Refuse(number, error):
                    log.warning("expert_refused", reason=str(error))
                    self._tickets[number].set_exception(error)
        if self._timer:
            self._timer.cancel()
        due = self._hosting.due(now)
        self._timer = None if due is None else asyncio.get_running_loop().call_later(due, self._step)

    def _do(self, deed: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(deed)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, expert: Expert) -> None:
        name, began = expert.name, self._clock()
        log.info("expert_loading", expert=name, eta_s=self._hosting.eta(name, began))
        child: Child | None = None
        try:
            child = self._child(expert)
            await child.start()
            await child.ready(self._load_timeout)
            self._welcome(child, began, await child.memory_mib())
        except LoadFailed as failure:
            await self._give_up(name, child, str(failure))
        except BaseException:  # we are being stopped, or something is wrong with us: in any case it must not stay
            await self._give_up(name, child, f"{name} could not be loaded")
            raise
        else:
            self._step()

    def _child(self, expert: Expert) -> Child:
        after = self._hosting.limits.auto_unload_after_s
        rest_after = None if after is None else after / 2
        try:
            return Child(expert, self._launcher, rest_after_s=rest_after, grace_seconds=self._grace, ask_seconds=self._ask_seconds)
        except OSError as error:  # no port, say
            raise LoadFailed(f"{expert.name} could not be started: {error.strerror}") from error

    async def _give_up(self, name: str, child: Child | None, reason: str) -> None:
        if child:
            await child.stop()
        if self._closed:
            return
        log.error("expert_load_failed", expert=name, error=reason, said=child.last_words if child else "")
        EXPERT_LOADS.labels(name, "failed").inc()
        self._hosting.crashed(name, reason, self._clock())
        self._step()

    def _welcome(self, child: Child, began: float, memory_mib: int | None) -> None:
        self._children[child.name] = child
        seconds = self._clock() - began
        self._hosting.loaded(child.name, self._clock(), memory_mib)
        self._do(self._watch(child))
        EXPERT_LOADS.labels(child.name, "loaded").inc()
        EXPERT_LOAD_SECONDS.labels(child.name).observe(seconds)
        EXPERT_LOADED.labels(child.name).set(1)
        log.info("expert_loaded", expert=child.name, seconds=round(seconds, 2), memory_mib=memory_mib)

    async def _watch(self, child: Child) -> None:
        code = await child.ended()
        if child.stopping or self._closed:
            return
        log.error("expert_crashed", expert=child.name, code=code, said=child.last_words)
        EXPERT_LOADED.labels(child.name).set(0)
        EXPERT_LOADS.labels(child.name, "crashed").inc()
        del self._children[child.name]
        self._hosting.crashed(child.name, f"the engine of {child.name} crashed", self._clock())
        await child.stop()
        self._step()

    async def _unload(self, name: str, why: Why) -> None:
        # It stays among the children until it is gone: should we be stopped meanwhile, it is not forgotten.
        child = self._children[name]
        child.stopping = True
        EXPERT_LOADED.labels(name).set(0)
        if why == "evicted":
            EXPERT_EVICTIONS.labels(name).inc()
        self._hosting.measured(name, await child.memory_mib())
        await child.stop()
        del self._children[name]
        log.info("expert_unloaded", expert=name, why=why)
        self._hosting.stopped(name)
        self._step()


class HostedEngine:
    """A ``ports.ChatEngine`` for one expert of a host. Asking for what it cannot do does not load it."""

    def __init__(self, host: ExpertHost, expert: Expert, launcher: Launcher) -> None:
        self._host = host
        self.expert = expert
        dialect = launcher(expert, launch.Place(0, "")).dialect
        # It is never asked: it knows what its dialect can do.
        self._alike: ChatEngine = build_engine(expert.model_copy(update={"dialect": dialect, "urls": (_NOWHERE,)}), _NOWHERE)

    @property
    def abilities(self) -> Abilities:
        """What the engine can do in its dialect."""
        return self._alike.abilities

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """The answer, after ``Load`` pieces while the expert has to be loaded."""
        refuse_beyond(self.abilities, request, self.expert.name)
        async with aclosing(self._host.stream(self.expert.name, request)) as pieces:
            async for piece in pieces:
                yield piece

    async def health(self) -> None:
        """Return unless the host rests from a crash of this expert: it need not be loaded to be well."""
        if reason := self._host.reason_against(self.expert.name):
            raise EngineUnreachable(reason)

    async def aclose(self) -> None:
        """The host serves this expert no longer; its engine is ended once nobody uses it."""
        self._host.release(self.expert.name)


def build_host(experts: Iterable[Expert], settings: HostSettings) -> ExpertHost:
    """A host for those *experts* that are to be launched."""
    limits = Limits(
        max_loaded=settings.max_loaded_experts,
        queue_size=settings.queue_size,
        auto_unload_after_s=settings.auto_unload_after_s or None,
        reserve_mib=settings.reserve_mib,
    )
    launched = [expert for expert in experts if expert.launch]
    return ExpertHost(launched, limits, load_timeout_s=settings.load_timeout_s, grace_s=settings.grace_s)
