"""The native dialect: typed server-sent events, or one JSON object."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

from aiohttp import web

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.turns import created
from capibara_flow.edge import sse
from capibara_flow.edge.bodies import ChatBody
from capibara_flow.edge.door import Door, collect
from capibara_flow.edge.problems import as_failed, problem
from capibara_flow.errors import BadRequest, BrokerUnavailable, CapibaraError, TurnExpired
from capibara_flow.ports import Feed
from capibara_flow.telemetry import TURNS
from topics.output import Done


class NativeChat:
    """``/api/chat`` and what belongs to it."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``POST /api/chat``."""
        identity = self._door.identify(request)
        body = await self._door.read(request, ChatBody)
        asked = body.request()
        self._door.check(asked)
        turn, batches = await self._door.open(asked, identity)
        if not body.stream:
            return await self._whole(turn, batches)
        first = {"turn": turn, "created": created(turn), "principal": identity.principal}
        return await self._stream(request, turn, batches, b"event: turn\ndata: %s\n\n" % json.dumps(first).encode())

    async def events(self, request: web.Request) -> web.StreamResponse:
        """``GET /api/chat/{turn}/events``: go on after ``Last-Event-ID`` (or ``?after=``), on any edge."""
        turn = await self._door.known(request)
        after = resume_point(request)
        # From one before: if that event was the last one, the reader learns at once that nothing more will come.
        batches = await self._door.turns.follow(turn, max(0, after - 1))
        return await self._stream(request, turn, batches, after=after)

    async def cancel(self, request: web.Request) -> web.Response:
        """``DELETE /api/chat/{turn}``: stop wherever it is; saying so twice is no error."""
        turn = await self._door.known(request)
        await self._door.turns.cancel(turn, "asked")
        return web.json_response({"turn": turn, "cancelling": True}, status=202)

    async def _stream(self, request: web.Request, turn: str, batches: Feed, greeting: bytes = b"", after: int = 0) -> web.StreamResponse:
        heartbeat = self._door.edge.heartbeat_seconds
        async with aclosing(batches), sse.opened(request, {"X-Capibara-Turn": turn}, heartbeat) as stream:
            if greeting:
                await stream.write(greeting)
            outcome = "left"
            try:
                async with asyncio.timeout(self._door.seconds_left(turn)):
                    outcome = "ended" if await stream.copy(batches, sse.native, after) else "broken"
            except (TimeoutError, CapibaraError) as error:
                problem = error if isinstance(error, CapibaraError) else TurnExpired("the turn did not end within its time")
                outcome = "broken" if problem is error else "expired"
                await stream.write(b"event: error\ndata: %s\n\n" % as_failed(turn, problem).line())
            finally:
                TURNS.labels(outcome).inc()
        return stream.response

    async def _whole(self, turn: str, batches: Feed) -> web.Response:
        try:
            async with asyncio.timeout(self._door.seconds_left(turn)):
                collected = await collect(batches)
        except TimeoutError as error:
            raise TurnExpired("the turn did not end within its time") from error
        TURNS.labels("ended").inc()
        headers = {"X-Capibara-Turn": turn}
        if collected.failed:
            failed = collected.failed
            body = problem(failed.status, failed.title, failed.detail) | {"turn": turn, "retryable": failed.retryable}
            return web.json_response(body, status=failed.status, headers=headers, content_type="application/problem+json")
        if collected.done is None:
            raise BrokerUnavailable("the output ended without its final event")
        return web.json_response(_as_object(turn, collected, collected.done), headers=headers)


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
