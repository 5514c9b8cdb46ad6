"""``/api/rag``: documents come in, are listed and removed, and what they say is searched. All of it for the asker's own tenant."""

import asyncio
import re
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.flat import flattened
from capibara_flow.edge import sse
from capibara_flow.edge.asked import flag
from capibara_flow.edge.bodies import SearchBody
from capibara_flow.edge.door import Door, Opened
from capibara_flow.edge.endings import Ending, relay, whole
from capibara_flow.edge.problems import AGAIN, as_failed, problem
from capibara_flow.edge.uploads import Upload, collection, uploads
from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, DocumentRefused, DocumentUnknown, TooLarge
from capibara_flow.ports import Identity, Reply
from topics.grounding import (
    Found,
    IngestDocument,
    ListDocuments,
    Listing,
    Removed,
    RemoveDocument,
    SearchKnowledge,
)
from topics.message import Request
from topics.output import SourceShown

_DOCUMENT = re.compile(r"[0-9a-f]{1,64}")
_SECONDS = 30.0  # that a search, a list or a removal may take
_NOBODY = "nobody is there who knows the documents: start a retriever (`capibara worker retriever`)"
_TOON, _STREAM = "application/toon", "text/event-stream"
#: More sources than these are told in TOON to who takes it.
_FEW = 5


@dataclass
class _Held:
    """A document that lies at the broker, and that nobody has been told of."""

    upload: Upload
    turn: str
    size: int = 0
    pieces: int = 0


@dataclass(frozen=True)
class Taken:
    """A document that is on its way in."""

    name: str
    opened: Opened

    @property
    def facts(self) -> dict[str, Any]:
        """What is told of it before anything has become of it."""
        return {"name": self.name, "turn": self.opened.turn, "events": f"/api/chat/{self.opened.turn}/events"}


class Knowledge:
    """The handlers of ``/api/rag``."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._tasks: set[asyncio.Task[None]] = set()

    # --- documents come in --------------------------------------------------------------------------------------------

    async def ingest(self, request: web.Request) -> web.StreamResponse:
        """``POST /api/rag/documents``: one document after the other, each a turn of its own.

        With ``wait=true`` it is answered when all have come to an end, with ``Accept: text/event-stream`` the one document's events.
        """
        identity = self._door.identify(request)
        place, wait = collection(request), flag(request, "wait")
        if _STREAM in request.headers.get("Accept", ""):
            return await self._followed(request, identity, place)
        taken: list[Taken] = []
        try:
            await self._bring(request, identity, place, taken)
            if wait:
                return _results([await self._result(each) for each in taken])
        except CapibaraError as error:
            if not taken:
                raise
            return _broken_off(error, taken)
        finally:
            for each in taken:
                await each.opened.feed.aclose()
        return web.json_response({"documents": [each.facts for each in taken]}, status=202)

    async def _bring(self, request: web.Request, identity: Identity, place: str, taken: list[Taken], most: int | None = None) -> None:
        """Add the documents of *request*, at most so many, to *taken*: each as soon as the body goes on behind it as it should."""
        held: _Held | None = None
        try:
            async for upload in uploads(request, self._door):
                if held:
                    _check_count(len(taken) + 1, most)
                    taken.append(await self._open(held, identity, place))
                    held = None
                held = _Held(upload, self._door.new_turn(time.time(), identity))
                await self._deposit(request, held)
            if held:
                taken.append(await self._open(held, identity, place))
        except BaseException:
            if held:
                self._drop(held)
            raise

    async def _deposit(self, request: web.Request, held: _Held) -> None:
        most, upload = self._door.edge.document_bytes, held.upload
        too_large = f"{upload.name}: a document may have {most} bytes at most (CAPIBARA_EDGE__DOCUMENT_BYTES): split it"
        if (request.content_length or 0) > most and not request.content_type.startswith("multipart/"):
            raise TooLarge(too_large)
        try:
            async with aclosing(upload.bytes()) as data:
                held.size, held.pieces = await self._door.turns.deposit(held.turn, data, most)
        except TooLarge as error:
            raise TooLarge(too_large) from error

    async def _open(self, held: _Held, identity: Identity, place: str) -> Taken:
        upload, deadline = held.upload, time.time() + self._door.edge.ingest_seconds
        if not held.size:
            raise DocumentRefused(f"{upload.name}: the document is empty")
        said = {"name": upload.name, "address": upload.address, "title": upload.title, "media_type": upload.media_type}
        command = IngestDocument(turn=held.turn, collection=place, **said, size=held.size, pieces=held.pieces)
        # It is done to its end, whoever reads on; and it ends in time, should nobody ever take it.
        feed = await self._door.turns.open(command, identity, deadline, recalled=True)
        return Taken(upload.name, Opened(held.turn, feed, deadline, replayed=False))

    def _drop(self, held: _Held) -> None:
        """Have removed what has already come of a document, should anything have: nobody waits for it."""
        if held.upload.size:
            task = asyncio.create_task(self._erase(held.turn))
            self._tasks.add(task)  # the loop alone would not keep it
            task.add_done_callback(self._tasks.discard)

    async def _erase(self, turn: str) -> None:
        with suppress(BrokerUnavailable):  # what is left of it goes with its age
            await self._door.turns.erase(turn)

    async def _result(self, taken: Taken) -> dict[str, Any]:
        """What became of a document: facts, or a problem with its status."""
        try:
            collected = await whole(taken.opened.feed, Ending(), seconds=taken.opened.seconds_left())
        except CapibaraError as error:
            return taken.facts | {"problem": _problem(error)}
        return taken.facts | _outcome(collected)

    async def _followed(self, request: web.Request, identity: Identity, place: str) -> web.StreamResponse:
        found: list[Taken] = []
        await self._bring(request, identity, place, found, most=1)
        opened, edge = found[0].opened, self._door.edge

        def tell(error: CapibaraError) -> bytes:
            return b"event: error\ndata: %s\n\n" % as_failed(opened.turn, error).line()

        async with aclosing(opened.feed), sse.opened(request, opened.headers, edge.heartbeat_seconds, edge.max_buffer_bytes) as stream:
            await stream.write(sse.greeting(opened.turn, identity.principal))
            await relay(stream, opened.feed, sse.native, Ending(), seconds=opened.seconds_left(), tell=tell)
        return stream.response

    # --- what is there ------------------------------------------------------------------------------------------------

    async def listed(self, request: web.Request) -> web.Response:
        """``GET /api/rag/documents``: by id, behind ``after``; ``next`` is what to go on after, null at the end."""
        identity, limit = self._door.identify(request), _count(request, "limit", 100, 1000)
        after = request.query.get("after", "")
        if after and not _DOCUMENT.fullmatch(after):
            raise BadRequest("after: must be the id of a document")
        turn = self._door.new_turn(time.time(), identity)
        asked = ListDocuments(turn=turn, tenant=identity.tenant, collection=collection(request), limit=limit, after=after)
        listing = await self._ask(asked, Listing)
        documents = [each.model_dump() for each in listing.documents]
        return web.json_response({"documents": documents, "next": documents[-1]["id"] if len(documents) == limit else None})

    async def shown(self, request: web.Request) -> web.Response:
        """``GET /api/rag/documents/{document}``."""
        identity, document = self._door.identify(request), _document(request)
        turn = self._door.new_turn(time.time(), identity)
        asked = ListDocuments(turn=turn, tenant=identity.tenant, collection=collection(request), limit=1, document=document)
        listing = await self._ask(asked, Listing)
        if not listing.documents:
            raise DocumentUnknown("there is no such document in this collection")
        return web.json_response(listing.documents[0].model_dump())

    async def removed(self, request: web.Request) -> web.Response:
        """``DELETE /api/rag/documents/{document}``: from every store."""
        identity, document = self._door.identify(request), _document(request)
        turn = self._door.new_turn(time.time(), identity)
        asked = RemoveDocument(turn=turn, tenant=identity.tenant, collection=collection(request), document=document)
        if not (await self._ask(asked, Removed)).removed:
            raise DocumentUnknown("there is no such document in this collection")
        return web.json_response({"id": document, "removed": True})

    async def search(self, request: web.Request) -> web.Response:
        """``POST /api/rag/search``: what has most to do with ``query``, the best first; many sources in TOON to who accepts it.

        Where it is not ``related``, a chat would go on without these sources.
        """
        identity = self._door.identify(request)
        body = await self._door.read(request, SearchBody)
        turn = self._door.new_turn(time.time(), identity)
        found = await self._ask(SearchKnowledge(turn=turn, tenant=identity.tenant, **body.model_dump()), Found)
        sources, seconds = [SourceShown.of(each) for each in found.sources], round(found.seconds, 4)
        more = {"seconds": seconds, "related": found.related}
        if len(sources) > _FEW and _TOON in request.headers.get("Accept", ""):
            toon = _toon({"sources": flattened(sources), **more})
            if toon is not None:
                return web.Response(text=toon, content_type=_TOON, charset="utf-8")
        return web.json_response({"sources": [each.model_dump() for each in sources], **more})

    async def _ask(self, asked: Request, reply: type[Reply]) -> Reply:
        """The reply to *asked*; raises ``BrokerUnavailable`` when there is none, and ``Refused``."""
        return await self._door.turns.ask(asked, reply, seconds=_SECONDS, nobody=_NOBODY)


def _check_count(count: int, most: int | None) -> None:
    if most is not None and count >= most:
        raise BadRequest("only one document at a time can be followed: send each in a request of its own")


def _toon(value: dict[str, Any]) -> str | None:
    """*value* in TOON, none where that cannot be had."""
    try:
        import toons  # noqa: PLC0415  an extra: without it everything is JSON
    except ImportError:
        return None
    return str(toons.dumps(value))


def _document(request: web.Request) -> str:
    """The document's id in the path; raises ``DocumentUnknown`` for what cannot be one."""
    given = request.match_info["document"]
    if not _DOCUMENT.fullmatch(given):
        raise DocumentUnknown("there is no such document: an id is a hexadecimal number, as the list of documents has it")
    return given


def _count(request: web.Request, name: str, usual: int, most: int) -> int:
    given = request.query.get(name, str(usual))
    if not (given.isascii() and given.isdecimal() and len(given) < 6 and 1 <= int(given) <= most):
        raise BadRequest(f"{name}: must be a whole number from 1 to {most}")
    return int(given)


def _outcome(collected: Collected) -> dict[str, Any]:
    """What became of a document that came to its end."""
    if collected.failed:
        failed = collected.failed
        return {"problem": problem(failed.status, failed.title, failed.detail) | {"retryable": failed.retryable}}
    if collected.ingested:
        return collected.ingested.model_dump(include={"document", "how", "title", "passages"})
    return {"problem": problem(409, "cancelled", "it was stopped before the document was in") | {"retryable": False}}


def _problem(error: CapibaraError) -> dict[str, Any]:
    return problem(error.status, error.title, str(error)) | {"retryable": error.retryable}


def _results(results: list[dict[str, Any]]) -> web.Response:
    """All came to an end: 201 if anything is new, 200 if not; the first problem where there is one, and beside it what became of all."""
    told = {"documents": results}
    bad = next((each["problem"] for each in results if "problem" in each), None)
    if bad:
        return web.json_response(bad | told, status=bad["status"], headers=AGAIN if bad["retryable"] else None, content_type=_PROBLEM)
    return web.json_response(told, status=201 if any(each["how"] == "created" for each in results) else 200)


def _broken_off(error: CapibaraError, taken: list[Taken]) -> web.Response:
    """What went wrong with a request, and which documents of it are on their way in all the same."""
    body = _problem(error) | {"documents": [each.facts for each in taken]}
    return web.json_response(body, status=error.status, headers=AGAIN if error.retryable else None, content_type=_PROBLEM)


_PROBLEM = "application/problem+json"
