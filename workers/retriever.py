"""RetrieveSources in; SourcesFound, SourcesRetrieved and the call that follows out. It also searches, lists and removes on request."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from faststream import FastStream
from faststream.nats import NatsBroker
from pydantic import TypeAdapter

from capibara_flow.domain.grounding import put_together, query
from capibara_flow.errors import CapibaraError, Transient
from capibara_flow.ports import Answers
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.joining import Join
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.queues import Waits
from capibara_flow.runtime.requests import refusal
from capibara_flow.runtime.work import tenant
from capibara_flow.telemetry import RETRIEVAL_SECONDS, RETRIEVED, log
from topics.flow import hop
from topics.grounding import (
    DocumentFacts,
    Found,
    ListDocuments,
    Listing,
    PartDone,
    Removed,
    RemoveDocument,
    RetrieveSources,
    SearchKnowledge,
    SourcesRetrieved,
)
from topics.knowledge import Document, Scope, Source
from topics.message import Refusable, Request
from topics.output import SourcesFound, SourceShown
from topics.streams import Consumer, Layout

HOP = hop("retriever")
Search = Callable[[Scope, str, int], Awaitable[Sequence[Source]]]
Written = Callable[[Sequence[Source], str], tuple[Sequence[Source], str]]
Asked = TypeVar("Asked", bound=Request)
Reply = TypeVar("Reply", bound=Refusable)
_AGAIN = 0.1  # seconds before a store that was away is asked again
_SOURCES: TypeAdapter[tuple[Source, ...]] = TypeAdapter(tuple[Source, ...])


def _or_refused(kind: type[Reply]) -> Callable[[Callable[[Asked], Awaitable[Reply]]], Callable[[Asked], Awaitable[Reply]]]:
    """Let a handler's errors be replied as a *kind* that says why: whoever asked waits for a word."""

    def replying(handler: Callable[[Asked], Awaitable[Reply]]) -> Callable[[Asked], Awaitable[Reply]]:
        @functools.wraps(handler)
        async def reply(command: Asked) -> Reply:
            try:
                return await handler(command)
            except CapibaraError as error:
                return kind(refused=refusal(error))

        return reply

    return replying


def build(
    broker: NatsBroker,
    *,
    search: Search,
    written: Written,
    documents: Callable[[ListDocuments], Awaitable[Sequence[Document]]],
    remove: Callable[[Scope, str], Awaitable[bool]],
    answers: Answers,
    join: Join,
    consumer: Consumer,
    limit: int = 10,
    permits: int = 16,
    lanes: Lanes | None = None,
    waits: Waits | None = None,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the retriever onto *broker*: at most *limit* sources for a turn, as far as a prompt takes them as *written*.

    A turn goes on without sources when there are none in time. *waits* tells who has to wait for an expert.
    """
    stage = Stage(broker, HOP, answers, layout=layout, lanes=lanes, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    @stage.serves(SearchKnowledge)
    @_or_refused(Found)
    async def look(command: SearchKnowledge) -> Found:
        started = clock()
        found = await search(Scope(command.tenant, command.collection), command.query, command.limit)
        seconds = clock() - started
        return Found(sources=tuple(found), seconds=seconds, related=bool(written(found, command.query)[0]))

    @stage.serves(ListDocuments)
    @_or_refused(Listing)
    async def listed(command: ListDocuments) -> Listing:
        return Listing(documents=tuple(map(facts, await documents(command))))

    @stage.serves(RemoveDocument)
    @_or_refused(Removed)
    async def removed(command: RemoveDocument) -> Removed:
        return Removed(removed=await remove(Scope(command.tenant, command.collection), command.document))

    retrieval = Retrieval(stage, join, search=search, written=written, limit=limit, clock=clock, waits=waits)
    stage.takes(consumer, permits=permits)(retrieval.retrieve)
    return FastStream(broker)


class Retrieval:
    """A turn is grounded: its sources are found in time or not at all, told, and given to the call that follows."""

    def __init__(
        self,
        stage: Stage,
        join: Join,
        *,
        search: Search,
        written: Written,
        limit: int,
        clock: Callable[[], float],
        waits: Waits | None = None,
    ) -> None:
        self._stage, self._search, self._written = stage, search, written
        self._join, self._limit, self._clock, self._waits = join, limit, clock, waits

    async def retrieve(self, command: RetrieveSources) -> None:
        """Do what *command* asks for; a redelivered one does it again, and says it once."""
        started = self._clock()
        found, context, problem = await self._in_time(command)
        RETRIEVAL_SECONDS.observe(self._clock() - started)
        RETRIEVED.labels("problem" if problem else "found" if found else "nothing").inc()
        shown = SourcesFound(turn=command.turn, sources=tuple(map(SourceShown.of, found)), problem=problem or None)
        await self._stage.say(shown, self._fact(command, found, problem, started))
        gives = {"sources": _SOURCES.dump_python(tuple(found), mode="json"), "context": context}
        own = PartDone(turn=command.turn, step=command.step, part=HOP.worker, gives=gives, problem=problem)
        call = put_together(command.call, await self._join.joined(own, command.parts, command.until))
        async with self._waits.telling(call, tenant()) if self._waits else nullcontext(()) as queued:
            await self._stage.say(*queued, call)

    def _fact(self, command: RetrieveSources, found: Sequence[Source], problem: str, started: float) -> SourcesRetrieved:
        ids = tuple(each.passage.id for each in found)
        facts = {"collection": command.collection, "sources": ids, "problem": problem}
        return SourcesRetrieved(turn=command.turn, **facts, started=started, ended=self._clock())

    async def _in_time(self, command: RetrieveSources) -> tuple[Sequence[Source], str, str]:
        """What is found before the step's time is up, the text that puts it before the question, and what stood in the way."""
        scope, asked = Scope(tenant(), command.collection), query(command.call.request)
        problem = "the search did not come to an end in time"
        while (left := command.until - self._clock()) > 0:
            try:
                async with asyncio.timeout(left):
                    found = await self._search(scope, asked, self._limit) if asked else ()
                    return *self._written(found, asked), ""
            except TimeoutError:
                break
            except Transient as error:
                problem = str(error)
            except CapibaraError as error:
                log.warning("search_refused", turn=command.turn, error=repr(error))
                return (), "", str(error)
            await asyncio.sleep(_AGAIN)
        return (), "", problem


def facts(document: Document) -> DocumentFacts:
    """*document* as it is listed."""
    same = {name: getattr(document, name) for name in ("id", "title", "address", "language", "digest", "passages")}
    return DocumentFacts(**same, updated=document.updated.timestamp())
