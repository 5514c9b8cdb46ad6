"""A laboratory: a broker of its own, the workers of today, and engines that say again what was recorded of others.

Recorded turns are played in it under their own ids, so that every byte can be compared. Nothing of it reaches any other broker.
"""

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from time import time
from typing import Any

from capibara_flow.domain.configuration import digest
from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.domain.forking import RETRIEVER, Stage, begun
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.recording import Recording
from capibara_flow.domain.routes import Routes
from capibara_flow.domain.routing import DEFAULT, Understood
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.engines.recorded import Played, RecordedEngine
from capibara_flow.errors import BadRequest, BrokerUnavailable, CannotStart, CapibaraError
from capibara_flow.ports import Abilities
from capibara_flow.runtime import brokers, provision, work
from capibara_flow.runtime.answers import FencedAnswer, FencedAnswers
from capibara_flow.runtime.client import TokenClient, fields, flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.forking import publish
from capibara_flow.runtime.joining import Join
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.output import cancel, one_message
from capibara_flow.runtime.peers import Peers
from capibara_flow.runtime.queues import Queues
from capibara_flow.runtime.reports import this_process
from capibara_flow.runtime.understanding import Tools, Understanding
from capibara_flow.settings import ROUTES, NatsSettings, RouterSettings, Settings, SettingsError, WorkerSettings, read_routes
from capibara_flow.tasks import ended
from capibara_flow.wiring.streams import connected, consumers, expert_consumers, layout, tuned
from topics.chat import ChatRequest
from topics.grounding import SourcesRetrieved
from topics.knowledge import Scope, Source
from topics.message import DEADLINE, ORIGIN, PRINCIPAL, TENANT
from topics.output import FINALS, SourcesFound, event_of
from topics.streams import caller_consumer, retriever_consumer, router_consumer, subject_token, undertaker_consumer

#: Seconds: between two tries at what went wrong for a while, and what an attempt takes that lasted longer than that.
_RETRY, _LASTING = 0.4, 0.5
#: Seconds until the deadline of a turn that is to miss it, beside those for each attempt; of any other turn; and until we give one up.
_SHORT, _LONG, _PATIENCE = 2.0, 120.0, 60.0
_AT_ONCE = 8  # turns that are played at a time
_PERMITS = 64  # calls at once, far more than those of these turns
_PIECES = frozenset({"token", "tool"})
_NOWHERE = "http://127.0.0.1:9"
_LOOK = 0.01  # seconds between looks whether a turn's work is done


@dataclass(frozen=True)
class Setup:
    """The configuration to play with; *embedder* is the model that reads questions where a fleet has a policy.

    Raises ``SettingsError`` when the policy has a row for a route that is not there.
    """

    fleet: Fleet
    routes: Routes | None = None
    embedder: str = "universal"

    def __post_init__(self) -> None:
        if self.routes and (unknown := sorted(self.fleet.policy.keys() - set(self.routes.names))):
            raise SettingsError(f"policy: no route is called {', '.join(unknown)}; there are: {', '.join(self.routes.names)}")


@dataclass(frozen=True)
class Shelves:
    """Where sources are looked for: *search* takes scope, question and *limit*; *written* says which fit into a prompt, and the text."""

    search: Callable[[Scope, str, int], Awaitable[Sequence[Source]]]
    written: Callable[[Sequence[Source], str], tuple[Sequence[Source], str]]
    limit: int


@dataclass
class _Heard:
    """What was heard of a turn that is being played."""

    entries: list[Entry] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@contextmanager
def own_broker() -> Iterator[Settings]:
    """A broker in a temporary folder, and settings that reach it; raises ``CannotStart``."""
    with tempfile.TemporaryDirectory(prefix="capibara-") as folder, EmbeddedBroker(Path(folder)) as broker:
        nats = NatsSettings(url=broker.url, passwords=broker.passwords, replicas=1)
        worker = WorkerSettings(retry_seconds=_RETRY, max_deliver=1, ack_wait_seconds=60, graceful_seconds=1)
        yield Settings(nats=nats, worker=worker, router=RouterSettings())


@asynccontextmanager
async def laboratory(
    settings: Settings, setup: Setup, *, router: bool = True, retriever: bool = True, caller: bool = True, shelves: Shelves | None = None
) -> AsyncIterator["Laboratory"]:
    """Workers on the empty broker of *settings*, for the length of a block: an undertaker, and those that are wanted.

    Sources are looked for on *shelves*; without any those of the recording are taken.
    """
    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(connected(settings, "provisioner"))
        house = (tuned(undertaker_consumer(), settings),)
        await provision.apply(operator.jetstream(timeout=15), layout(settings), (*consumers(settings, setup.fleet), *house))
        observer = await stack.enter_async_context(connected(settings, "observer"))
        made = Laboratory(operator, observer, router=router, retriever=retriever, caller=caller, shelves=shelves)
        await made.listen()
        reading = Reading(setup, made.playing, made.notes)
        stack.push_async_callback(reading.aclose)
        wanted = {"router": router, "retriever": router, "caller": caller, "undertaker": True}
        for name in (name for name, there in wanted.items() if there):
            needs = await stack.enter_async_context(_needs(name, settings, setup, made, reading))
            broker = brokers.broker(settings, name)
            # By name: the package below the workers knows them no other way.
            await import_module(f"workers.{name}").build(broker, **needs).start()
            stack.push_async_callback(broker.stop)
        yield made


class Laboratory:
    """Where recordings are played; *notes* tell what could not be done as it was."""

    def __init__(
        self,
        operator: TokenClient,
        observer: TokenClient,
        *,
        router: bool,
        retriever: bool,
        caller: bool,
        shelves: Shelves | None = None,
    ) -> None:
        self._operator, self._observer = operator, observer
        self._router, self._retriever, self._caller = router, retriever, caller
        self.shelves = shelves
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._played: dict[str, Played] = {}
        self._records: dict[str, Record] = {}
        self._heard: dict[str, _Heard] = {}
        self.notes: dict[str, None] = {}

    async def play(self, recording: Recording, record: Record) -> Record:
        """Let the turn of *record* happen again: what is kept of it then. One that does not come to its end is cut short.

        Any number may be asked for at a time; few are played together.
        """
        async with self._room:
            return await self._play(recording, record)

    async def _play(self, recording: Recording, record: Record) -> Record:
        played = self._played[recording.turn] = Played(recording)
        heard = self._heard[recording.turn] = _Heard()
        self._records[recording.turn] = record
        stage: Stage = recording.stage if self._router else "caller"
        try:
            await self._begin(record, stage, _deadline(recording))
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE + _LASTING * len(recording.takes)):
                    await self._finish(recording, played, heard)
        finally:
            del self._played[recording.turn], self._heard[recording.turn], self._records[recording.turn]
            played.over = True
            played.quiet.set()
        return Record(recording.turn, tuple(heard.entries))

    def playing(self) -> Played:
        """The turn whose message is at work; raises ``BadRequest`` when it is none of ours."""
        turn = work.message().subject.split(".")[2]
        if (played := self._played.get(turn)) is None:
            raise BadRequest(f"{turn} is not played any more")
        return played

    @property
    def grounds(self) -> bool:
        """Whether sources were looked for, for the turn whose message is at work; raises ``BadRequest`` when it is none of ours."""
        record = self._records[self.playing().recording.turn]
        return record.routed is not None and any(step.stage == RETRIEVER for step in record.routed.plan.steps)

    @property
    def context(self) -> str:
        """The text that puts before the question what was found for the turn whose message is at work."""
        calls = self._records[self.playing().recording.turn].calls
        return calls[0].message.context if calls else ""

    @property
    def came_in_time(self) -> bool:
        """Whether the client was told what was found for the turn whose message is at work: it had ended before, if not."""
        record = self._records[self.playing().recording.turn]
        return any(isinstance(output, SourcesFound) for _, output in record.said())

    async def found(self) -> Sequence[Source]:
        """The sources that were found for the turn whose message is at work.

        Raises ``CapibaraError`` with the problem that there was. Where the turn had ended by then, that is waited for first.
        """
        turn = self.playing().recording.turn
        record = self._records[turn]
        if not self.came_in_time:
            self._played[turn].quiet.set()
            await self._heard[turn].ended.wait()
        if not self.shelves:
            self.notes["sources are not looked for anew: those of the recording are taken"] = None
        if problem := next((each.message.problem for each in record.of(SourcesRetrieved) if each.message.problem), ""):
            raise CapibaraError(problem)
        return record.calls[0].message.sources if record.calls else ()

    async def until_taken(self, turn: str) -> None:
        """Return when somebody may begin with *turn*: not while its recording says that nobody was there to do it."""
        played, heard = self._played.get(turn), self._heard.get(turn)
        left = work.seconds_left()
        if played and heard and played.waits and (left is None or left > 0):
            played.quiet.set()
            await heard.ended.wait()

    async def listen(self) -> None:
        """Hear all that is said here."""
        await self._observer.listen("cf.live.*.main", self._hear_output)
        for subject in ("cf.log.>", "cf.dead.*.*", "cf.ctl.*.cancel"):
            await self._observer.listen(subject, self._hear)
        await flushed(self._observer)

    async def _begin(self, record: Record, stage: Stage, deadline: float) -> None:
        headers = {TENANT: record.tenant, PRINCIPAL: record.principal, DEADLINE: f"{deadline:.3f}"}
        if record.origin:
            headers[ORIGIN] = record.origin
        await publish(self._operator, begun(record, stage, until=time() + _LONG), headers)

    async def _finish(self, recording: Recording, played: Played, heard: _Heard) -> None:
        """Return when all has been said about the turn; stop it at its time if it was stopped."""
        if not self._caller:
            await _first(heard.decided.wait(), played.quiet.wait())
            if heard.decided.is_set():
                return
        if recording.cancelled is not None:
            await _first(played.quiet.wait(), heard.ended.wait())
            if not heard.ended.is_set():
                await cancel(self._operator.jetstream(), recording.turn, recording.cancelled)
        await heard.ended.wait()
        # Facts are published before the work is settled, and come by the same connection as the answer to our question.
        for consumer in (router_consumer(), retriever_consumer(), *((caller_consumer("any"),) if self._caller else ())):
            while await self._at_work(consumer.stream, recording.turn):  # noqa: ASYNC110  the broker has no event for it
                await asyncio.sleep(_LOOK)

    async def _at_work(self, stream: str, turn: str) -> bool:
        try:
            return await one_message(self._observer, stream, last_by_subj=f"cf.work.{turn}.>") is not None
        except BrokerUnavailable:
            return True

    def _hear_output(self, _: bytes, headers: bytes, data: bytes) -> None:
        told = fields(headers)
        subject = told["Nats-Subject"]
        if heard := self._heard.get(subject.split(".")[2]):
            heard.entries.append(Entry("CF_OUT", int(told["Nats-Sequence"]), time(), subject, {}, data))
            if played := self._played.get(subject.split(".")[2]):
                played.hears(sum(event_of(each) in _PIECES for each in data.split(b"\n")))
            if event_of(data.rsplit(b"\n", 1)[-1]) in FINALS:
                heard.ended.set()
                heard.decided.set()

    def _hear(self, subject: bytes, headers: bytes, data: bytes) -> None:
        where, told = subject.decode(), fields(headers)
        heard = self._heard.get(where.split(".")[2])
        if heard is None or told.get("Nats-Msg-Id", where) in heard.ids:
            return
        if "Nats-Msg-Id" in told:
            heard.ids.add(told["Nats-Msg-Id"])
        heard.entries.append(Entry("CF_LOG", len(heard.entries), time(), where, told, data))
        if self._is_decided(where.split(".")):
            heard.decided.set()

    def _is_decided(self, subject: list[str]) -> bool:
        """Whether all that stages before the caller decide has been said when this is heard."""
        return subject[3:5] == ["asked", "call"] if self._retriever else subject[1::2] == ["log", "router"]


class Reading:
    """What a question is about: read anew by the model, which is loaded when it is first needed, or as it was recorded.

    The recording speaks where the model cannot be loaded on this machine; *notes* say so then.
    """

    def __init__(self, setup: Setup, playing: Callable[[], Played], notes: dict[str, None]) -> None:
        self._setup, self._playing, self._notes = setup, playing, notes
        self._folder = tempfile.TemporaryDirectory(prefix="capibara-")
        self._understanding: Understanding | None = None
        self._missing = False
        self._loading = asyncio.Lock()

    async def __call__(self, request: ChatRequest) -> Understood:
        """What *request* is about."""
        if understanding := await self._loaded():
            return await understanding(request)
        if known := self._playing().recording.reading:
            return known.understood()
        self._notes["a question that was not read before cannot be read here: it goes to the default route"] = None
        return Understood(DEFAULT, "moderate", 0.5, "nothing here can read it")

    async def aclose(self) -> None:
        """Let the model go."""
        if self._understanding:
            await self._understanding.aclose()
        self._folder.cleanup()

    async def _loaded(self) -> Understanding | None:
        async with self._loading:
            if self._understanding is None and not self._missing:
                try:
                    self._understanding = await self._load()
                except (CannotStart, SettingsError) as error:
                    self._missing = True
                    self._notes[f"questions are not read anew, the recorded readings are taken: {error}"] = None
        return self._understanding

    async def _load(self) -> Understanding:
        # A watched file of our own stands for the routes of the setup; what it holds is never read.
        own = Path(self._folder.name) / "routes.toml"
        own.touch()
        routes = self._setup.routes
        fleet = self._setup.fleet.model_copy(update={"routes": own.name if routes else None})

        def read(path: Path) -> Routes:
            return routes if routes and path == own else read_routes(path)

        understanding = Understanding(partial(_tools, self._setup.embedder), read, ROUTES)
        await understanding.follow(own.with_name("fleet.toml"), fleet)
        return understanding


class UntilTaken(FencedAnswers):
    """``ports.Answers`` for callers: who opens a turn that nobody had taken waits until it has ended otherwise."""

    def __init__(self, client: TokenClient, owner: str, until_taken: Callable[[str], Awaitable[None]]) -> None:
        super().__init__(client, owner)
        self._until_taken = until_taken

    @asynccontextmanager
    async def open(self, turn: str, branch: str) -> AsyncIterator[FencedAnswer]:
        """See ``ports.Answers``."""
        await self._until_taken(turn)
        async with super().open(turn, branch) as answer:
            yield answer


@asynccontextmanager
async def _needs(name: str, settings: Settings, setup: Setup, made: Laboratory, reading: Reading) -> AsyncIterator[dict[str, Any]]:
    """What the worker *name* is built with here."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(settings, name))
        owner = f"{name}@{socket.gethostname()}:{os.getpid()}"
        answers = UntilTaken(client, owner, made.until_taken) if name == "caller" else FencedAnswers(client, owner)
        await answers.start()
        stack.push_async_callback(answers.stop)
        common = {"answers": answers, "layout": layout(settings), "retry_seconds": settings.worker.retry_seconds}
        lanes = await _lanes(name, client, stack)
        yield common | lanes | _OWN_NEEDS[name](settings, setup, made, reading)


async def _lanes(name: str, client: TokenClient, stack: AsyncExitStack) -> dict[str, Any]:
    """Where turns wait for an expert: known to whoever sends them there, or takes them."""
    if name == "undertaker":
        return {}
    if name == RETRIEVER:
        return {"lanes": Lanes(client), "join": Join(client)}
    lanes, peers = Lanes(client), Peers(client, (this_process(),))
    for each in (lanes, peers):
        await each.start()
        stack.push_async_callback(each.stop)
    return {"lanes": lanes, "queues": Queues(lanes, peers, {})} if name == "caller" else {"lanes": lanes}


def _router_needs(settings: Settings, setup: Setup, made: Laboratory, reading: Reading) -> dict[str, Any]:
    by = digest(setup.fleet, setup.routes)
    own = {"consumer": tuned(router_consumer(), settings), "permits": settings.worker.router_permits}
    own |= {"has_documents": lambda _: made.grounds, "grounding_seconds": _LONG}
    return {"fleet": lambda: setup.fleet, "understand": reading, "configuration": lambda: by, **own}


def _retriever_needs(settings: Settings, setup: Setup, made: Laboratory, reading: Reading) -> dict[str, Any]:
    shelves = made.shelves

    async def search(scope: Scope, query: str, limit: int) -> Sequence[Source]:
        return await shelves.search(scope, query, limit) if shelves and made.came_in_time else await made.found()

    def as_recorded(sources: Sequence[Source], question: str) -> tuple[Sequence[Source], str]:
        return sources, made.context

    async def refused(*_: object) -> Any:
        raise BadRequest("no documents are kept here")

    how: dict[str, Any] = {"written": shelves.written, "limit": shelves.limit} if shelves else {"written": as_recorded}
    own = {"consumer": tuned(retriever_consumer(), settings), "permits": settings.worker.router_permits}
    return {"search": search, **how, **own, "documents": refused, "remove": refused}


def _caller_needs(settings: Settings, setup: Setup, made: Laboratory, reading: Reading) -> dict[str, Any]:
    parts = (made.playing, work.seconds_left, _LASTING)
    engines = {subject_token(expert.name): RecordedEngine(expert.name, _abilities(expert), *parts) for expert in setup.fleet.active}
    taken = dict.fromkeys(expert_consumers(settings, setup.fleet.active), _PERMITS)
    return {"engines": engines, "consumers": taken}


def _undertaker_needs(settings: Settings, setup: Setup, made: Laboratory, reading: Reading) -> dict[str, Any]:
    async def erase(turn: str) -> int:
        raise BadRequest(f"{turn}: nothing is erased here")

    return {"consumer": tuned(undertaker_consumer(), settings), "erase": erase, "patience_seconds": _LONG}


_OWN_NEEDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "router": _router_needs,
    "retriever": _retriever_needs,
    "caller": _caller_needs,
    "undertaker": _undertaker_needs,
}


def _abilities(expert: Expert) -> Abilities:
    """What the engine of *expert* can do, which is asked for nothing else; one that a host would start speaks the dialect of its kind."""
    dialect = expert.dialect
    if expert.launch and not expert.urls and dialect != "llama_completion":
        dialect = "vllm" if expert.launch.engine == "vllm" else "llama_server"
    return build_engine(expert.model_copy(update={"dialect": dialect, "urls": (_NOWHERE,)}), _NOWHERE).abilities


def _tools(embedder: str) -> Tools:
    model = build_embedder(embedder)
    from capibara_flow.domain.understanding import Learned  # noqa: PLC0415  needs numpy, which is there when a model is

    return Tools(model, Learned.learn)


def _deadline(recording: Recording) -> float:
    """When a turn is due: soon, if it is to be late."""
    return time() + (_SHORT + _LASTING * len(recording.takes) if recording.expires else _LONG)


async def _first(*waiting: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(each) for each in waiting]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await ended(*tasks)
