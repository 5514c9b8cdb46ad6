"""The native dialect: typed server-sent events, or one JSON object."""

import json
import time
from contextlib import aclosing
from typing import Any, cast

from aiohttp import web

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.turns import created
from capibara_flow.edge import sse
from capibara_flow.edge.bodies import ChatBody
from capibara_flow.edge.door import Door
from capibara_flow.edge.endings import Ending, counted, relay, whole
from capibara_flow.edge.problems import as_failed, problem
from capibara_flow.errors import BadRequest, CapibaraError
from capibara_flow.ports import Feed
from capibara_flow.telemetry import RESUMES
from topics.output import Done, Failed


class NativeChat:
    """``/api/chat`` and what belongs to it."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``POST /api/chat``."""
        since = time.monotonic()
        identity = self._door.identify(request)
        body = await self._door.read(request, ChatBody)
        asked = body.request()
        self._door.check(asked)
        turn, feed = await self._door.open(asked, identity)
        with counted(since) as ending:
            if not body.stream:
                return await self._whole(turn, feed, ending)
            first = {"turn": turn, "created": created(turn), "principal": identity.principal}
            return await self._stream(request, turn, feed, ending, greeting=b"event: turn\ndata: %s\n\n" % json.dumps(first).encode())

    async def events(self, request: web.Request) -> web.StreamResponse:
        """``GET /api/chat/{turn}/events``: go on after ``Last-Event-ID`` (or ``?after=``), on any edge."""
        turn = await self._door.known(request)
        after = resume_point(request)
        RESUMES.inc()
        feed = await self._door.turns.follow(turn, after)
        return await self._stream(request, turn, feed, Ending(), after=after)

    async def cancel(self, request: web.Request) -> web.Response:
        """``DELETE /api/chat/{turn}``: stop wherever it is; saying so twice is no error."""
        turn = await self._door.known(request)
        await self._door.turns.cancel(turn, "asked")
        return web.json_response({"turn": turn, "cancelling": True}, status=202)

    async def _stream(
        self, request: web.Request, turn: str, feed: Feed, ending: Ending, *, greeting: bytes = b"", after: int = 0
    ) -> web.StreamResponse:
        edge = self._door.edge

        def tell(problem: CapibaraError) -> bytes:
            return b"event: error\ndata: %s\n\n" % as_failed(turn, problem).line()

        async with aclosing(feed), sse.opened(request, {"X-Capibara-Turn": turn}, edge.heartbeat_seconds, edge.max_buffer_bytes) as stream:
            if greeting:
                await stream.write(greeting)
            await relay(stream, feed, sse.native, ending, seconds=self._door.seconds_left(turn), tell=tell, after=after)
        return stream.response

    async def _whole(self, turn: str, feed: Feed, ending: Ending) -> web.Response:
        collected = await whole(feed, ending, seconds=self._door.seconds_left(turn))
        headers = {"X-Capibara-Turn": turn}
        if collected.done:
            return web.json_response(_as_object(turn, collected, collected.done), headers=headers)
        failed = cast(Failed, collected.failed)
        body = problem(failed.status, failed.title, failed.detail) | {"turn": turn, "retryable": failed.retryable}
        return web.json_response(body, status=failed.status, headers=headers, content_type="application/problem+json")


def resume_point(request: web.Request) -> int:
    """The sequence to go on after; raises ``BadRequest``."""
    given = request.headers.get("Last-Event-ID") or request.query.get("after") or "0"
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise BadRequest("Last-Event-ID must be the id of an event of this turn")
    return int(given)


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
    for name, event in (("routed", collected.routed), ("usage", collected.usage)):
        if event:
            answer[name] = event.model_dump(exclude={"turn", "event"})
    return answer
