"""The native dialect: typed server-sent events, or one JSON object."""

import time
from contextlib import aclosing
from typing import Any, cast

from aiohttp import web

from capibara_flow.domain.collecting import Collected
from capibara_flow.edge import sse
from capibara_flow.edge.asked import Place, Terms, flag, idempotency_key, resume_point
from capibara_flow.edge.bodies import ChatBody
from capibara_flow.edge.door import Door, Opened
from capibara_flow.edge.endings import Ending, counted, relay, whole
from capibara_flow.edge.problems import AGAIN, as_failed, problem
from capibara_flow.errors import BadRequest, CapibaraError, TurnUnknown
from capibara_flow.ports import Identity
from capibara_flow.telemetry import RESUMES
from topics.output import Done, Failed

_BEGINNING = Place(0)


class NativeChat:
    """``/api/chat`` and what belongs to it."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``POST /api/chat``."""
        since = time.monotonic()
        opened, greeting = await self._opened(request)
        with counted(since, replayed=opened.replayed) as ending:
            if greeting is None:
                return await self._whole(opened, ending)
            return await self._stream(request, opened, ending, greeting=greeting)

    async def _opened(self, request: web.Request) -> tuple[Opened, bytes | None]:
        """The turn that *request* asks for, and how its stream begins if it is to be one; what was asked is not kept that long."""
        identity = self._door.identify(request)
        body = await self._door.read(request, ChatBody)
        asked = body.request()
        self._door.check(asked)
        opened = await self._door.open(asked, identity, self._terms(request, body, identity))
        return opened, sse.greeting(opened.turn, identity.principal) if body.stream else None

    async def events(self, request: web.Request) -> web.StreamResponse:
        """``GET /api/chat/{turn}/events``: go on after ``Last-Event-ID`` (or ``?after=``), on any edge."""
        turn = await self._door.known(request)
        place = resume_point(request)
        RESUMES.inc()
        return await self._stream(request, await self._door.follow(turn, place.sequence), Ending(), place=place)

    async def cancel(self, request: web.Request) -> web.Response:
        """``DELETE /api/chat/{turn}``: stop wherever it is, with ``?erase=true`` leaving no trace; saying so twice is no error."""
        if flag(request, "erase"):
            turn = self._door.own(request)  # of a turn whose output has aged out other traces may be left
            return web.json_response({"turn": turn, "erased": await self._door.turns.erase(turn)})
        turn = await self._door.known(request)
        if not await self._door.turns.known(turn):
            raise TurnUnknown("there is no such turn: nothing of it is kept, and nobody works on it")
        await self._door.turns.cancel(turn, "asked")
        return web.json_response({"turn": turn, "cancelling": True}, status=202)

    def _terms(self, request: web.Request, body: ChatBody, identity: Identity) -> Terms:
        """How the turn of *body* shall be done; raises ``BadRequest``."""
        most = self._door.edge.turn_seconds
        if body.timeout_seconds is not None and body.timeout_seconds > most:
            raise BadRequest(f"timeout_seconds: must be at most {most:g}")
        attended = body.stream and not body.background
        return Terms(body.timeout_seconds or most, attended, idempotency_key(request, identity.tenant), body.background, body.priority)

    async def _stream(
        self, request: web.Request, opened: Opened, ending: Ending, *, greeting: bytes = b"", place: Place = _BEGINNING
    ) -> web.StreamResponse:
        edge, feed = self._door.edge, opened.feed

        def tell(problem: CapibaraError) -> bytes:
            return b"event: error\ndata: %s\n\n" % as_failed(opened.turn, problem).line()

        async with aclosing(feed), sse.opened(request, opened.headers, edge.heartbeat_seconds, edge.max_buffer_bytes) as stream:
            if greeting:
                await stream.write(greeting)
            encode, seconds = sse.behind(place), opened.seconds_left()
            await relay(stream, feed, encode, ending, seconds=seconds, tell=tell, after=place.sequence)
        return stream.response

    async def _whole(self, opened: Opened, ending: Ending) -> web.Response:
        collected = await whole(opened.feed, ending, seconds=opened.seconds_left())
        if collected.done:
            return web.json_response(_as_object(opened.turn, collected, collected.done), headers=opened.headers)
        failed = cast(Failed, collected.failed)
        headers = opened.headers | (AGAIN if failed.retryable else {})
        body = problem(failed.status, failed.title, failed.detail) | {"turn": opened.turn, "retryable": failed.retryable}
        return web.json_response(body, status=failed.status, headers=headers, content_type="application/problem+json")


def _as_object(turn: str, collected: Collected, done: Done) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "turn": turn,
        "model_id": done.model_id,
        "text": collected.text,
        "finish_reason": done.finish_reason,
        "timings": done.timings,
    }
    if collected.reasoning:
        answer["reasoning"] = collected.reasoning
    if collected.tool_calls:
        answer["tool_calls"] = [call.model_dump() for call in collected.tool_calls]
    told = {"routed": collected.routed, "citations": collected.citations, "usage": collected.usage}
    answer |= {name: event.model_dump(exclude={"turn", "event"}) for name, event in told.items() if event}
    if collected.sources:
        answer["sources"] = [source.model_dump() for source in collected.sources.sources]
    return answer
