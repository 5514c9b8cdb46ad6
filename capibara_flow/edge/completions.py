"""The OpenAI dialect: ``/v1/chat/completions`` and ``/v1/models``, as its official clients expect them."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any, cast

import orjson
from aiohttp import web

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.turns import created
from capibara_flow.edge import sse
from capibara_flow.edge.asked import Terms, flag, idempotency_key, resume_point
from capibara_flow.edge.bodies import CompletionBody
from capibara_flow.edge.door import PREFIX, Door, Opened
from capibara_flow.edge.endings import Ending, counted, relay, whole
from capibara_flow.edge.problems import AGAIN, openai_error
from capibara_flow.errors import BadRequest, CapibaraError, TurnGone, TurnUnknown
from capibara_flow.ports import Batch
from capibara_flow.telemetry import RESUMES
from topics.output import Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage, event_of, parse

_LOOK_SECONDS = 5.0  # for what is stored already
_RESET = "the answer had to start anew, which this dialect cannot express; ask again, under another Idempotency-Key if there was one"
_WORDS = "\x00"  # where the words go in a chunk that is written once; nothing behind it looks so


class Completions:
    """``/v1/chat/completions`` and ``/v1/models``."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/chat/completions``."""
        since = time.monotonic()
        opened, chunks = await self._opened(request)
        with counted(since, replayed=opened.replayed) as ending:
            if chunks is None:
                return await self._whole(opened, ending)
            return await self._stream(request, opened, ending, chunks, chunks.encode)

    async def _opened(self, request: web.Request) -> tuple[Opened, "Chunks | None"]:
        """The turn that *request* asks for, and its chunks if it is to be streamed; what was asked is not kept that long."""
        identity = self._door.identify(request)
        body = await self._door.read(request, CompletionBody)
        asked = body.request()
        self._door.check(asked)
        key, priority = idempotency_key(request, identity.tenant), body.priority or "normal"
        terms = Terms(self._door.edge.turn_seconds, bool(body.stream), key, priority=priority)
        opened = await self._door.open(asked, identity, terms)
        return opened, Chunks(opened.turn, body.model or "auto", usage=body.wants_usage) if body.stream else None

    async def events(self, request: web.Request) -> web.StreamResponse:
        """``GET /v1/chat/completions/{turn}/events``: go on after ``Last-Event-ID`` (or ``?after=``), on any edge.

        Who has all there is gets the end again.
        """
        turn = await self._door.known(request)
        place, usage = resume_point(request), flag(request, "include_usage")
        if place.lines:
            raise BadRequest("Last-Event-ID must be the id of a chunk: this one, with a hyphen, is of the native dialect")
        after = place.sequence
        RESUMES.inc()
        model = await self._model(turn) if after else "auto"
        opened = await self._door.follow(turn, after)
        chunks = Chunks(turn, model, usage=usage, said=after > 0)

        def encode(batch: Batch) -> bytes:
            return chunks.encode(batch) if batch.sequence > after else chunks.end_again(batch)

        return await self._stream(request, opened, Ending(), chunks, encode)

    async def models(self, request: web.Request) -> web.Response:
        """``GET /v1/models``: the experts, and ``auto`` for whoever leaves the choice to us."""
        self._door.identify(request)
        rows = [{"id": "auto", "object": "model", "created": 0, "owned_by": "capibara"}]
        for expert in self._door.fleet.active:
            row: dict[str, Any] = {"id": expert.name, "object": "model", "created": 0, "owned_by": "capibara"}
            rows.append(row | ({"scripted": True} if expert.scripted else {}))
        return web.json_response({"object": "list", "data": rows})

    async def _stream(
        self, request: web.Request, opened: Opened, ending: Ending, chunks: "Chunks", encode: sse.Encode
    ) -> web.StreamResponse:
        edge, feed = self._door.edge, opened.feed
        async with aclosing(feed), sse.opened(request, opened.headers, edge.heartbeat_seconds, edge.max_buffer_bytes) as stream:

            def tell(problem: CapibaraError) -> bytes:
                return chunks.error(problem.status, problem.title, str(problem))

            chunks.on_reset = stream.stop  # of this reader only: others may go on reading the turn
            await relay(stream, feed, encode, ending, seconds=opened.seconds_left(), tell=tell)
        return stream.response

    async def _model(self, turn: str) -> str:
        """Who answers *turn*, as its stored beginning says; ``auto`` if that is not there."""
        model = "auto"
        with suppress(TimeoutError, TurnGone, TurnUnknown, StopAsyncIteration):
            async with aclosing(await self._door.turns.follow(turn)) as feed, asyncio.timeout(_LOOK_SECONDS):
                for batch in await anext(aiter(feed)):
                    for line in batch.lines:
                        if event_of(line) == "routed":
                            model = cast(Routed, parse(line)).model_id
        return model

    async def _whole(self, opened: Opened, ending: Ending) -> web.Response:
        collected = await whole(opened.feed, ending, seconds=opened.seconds_left())
        headers = opened.headers
        if collected.failed:
            failed = collected.failed
            headers |= AGAIN if failed.retryable else {}
            return web.json_response(openai_error(failed.status, failed.title, failed.detail), status=failed.status, headers=headers)
        done = cast(Done, collected.done)
        if done.finish_reason == "cancelled":
            return web.json_response(openai_error(409, "cancelled", "the turn was cancelled"), status=409, headers=headers)
        if collected.routed:
            headers["X-Capibara-Route"] = collected.routed.route_name
        return web.json_response(_completion(opened.turn, collected, done), headers=headers)


class Chunks:
    """Output events become completion chunks; what the dialect cannot say ends the stream with an error.

    ``on_reset`` is called when words that were *said*, here or on an earlier connection, are taken back: nothing is written behind that
    error.
    """

    def __init__(self, turn: str, model: str, *, usage: bool, said: bool = False) -> None:
        self.on_reset: Callable[[], None] = _nothing
        self._head = {"id": PREFIX + turn, "object": "chat.completion.chunk", "created": int(created(turn)), "model": model}
        self._wants_usage = usage
        self._usage: Usage | None = None
        self._said = said
        self._over = False
        self._around: tuple[bytes, ...] = ()
        self._token = Token(turn=turn).line()[: -len(b'""}')]

    def encode(self, batch: Batch) -> bytes:
        """The chunks of one batch, of which the last has its id; words that are taken back have none, for nobody can go on behind them."""
        written = b"".join(self._line(line) for line in batch.lines if not self._over)
        if not written or self._over:
            return written
        before, gap, last = written[:-2].rpartition(b"\n\n")
        return b"%b%bid: %d\n%b\n\n" % (before, gap, batch.sequence, last)

    def end_again(self, batch: Batch) -> bytes:
        """The end, if *batch* has it, for who may have heard it before."""
        return self.encode(Batch(batch.sequence, batch.lines[-1:], final=True)) if batch.final else b""

    def _line(self, line: bytes) -> bytes:
        if not self._said or not line.startswith(self._token) or b',"reasoning":' in line:
            return self._event(parse(line))
        # Nearly every line of every answer: the words, as JSON already, go into a chunk that was written before.
        self._around = self._around or tuple(self._delta({"content": _WORDS}).rsplit(orjson.dumps(_WORDS), 1))
        return self._around[0] + line[len(self._token) : -1] + self._around[1]

    def error(self, status: int, title: str, detail: str) -> bytes:
        """An error frame; no ``[DONE]`` follows, so that nobody takes the stream for complete."""
        self._over = True
        return b"data: %s\n\n" % orjson.dumps(openai_error(status, title, detail))

    def _event(self, output: Output) -> bytes:  # noqa: PLR0911  one return for each kind of event
        match output:
            case Token(text=text, reasoning=reasoning):
                return self._delta(({"content": text} if text else {}) | ({"reasoning_content": reasoning} if reasoning else {}))
            case ToolCalled():
                return self._delta({"tool_calls": [_fragment(output)]})
            case Routed(model_id=model):
                self._head["model"] = model
                self._around = ()
            case Usage():
                self._usage = output
            case Reset() if self._said:
                self.on_reset()
                return self.error(502, "answer reset", _RESET)
            case Failed(status=status, title=title, detail=detail):
                return self.error(status, title, detail)
            case Done(finish_reason="cancelled"):
                return self.error(409, "cancelled", "the turn was cancelled")
            case Done(finish_reason=reason):
                return self._end(reason)
        return b""

    def _delta(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        if not self._said:
            self._said = True
            delta = {"role": "assistant", "content": "", **delta}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: %s\n\n" % orjson.dumps({**self._head, "choices": choices, **more})

    def _end(self, reason: str) -> bytes:
        end = self._delta({}, reason)
        if self._wants_usage:
            end += self._chunk([], usage=_usage(self._usage))
        return end + b"data: [DONE]\n\n"


def _nothing() -> None:
    """Nobody wants to hear of it."""


def _fragment(call: ToolCalled) -> dict[str, Any]:
    function = {"arguments": call.arguments} | ({"name": call.name} if call.name else {})
    head = {"id": call.id, "type": "function"} if call.id else {}
    return {"index": call.index, **head, "function": function}


def _usage(usage: Usage | None) -> dict[str, int]:
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(turn: str, collected: Collected, done: Done) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": collected.text, "refusal": None}
    if collected.reasoning:
        message["reasoning_content"] = collected.reasoning
    if collected.tool_calls:
        message["tool_calls"] = [call.model_dump() for call in collected.tool_calls]
        message["content"] = collected.text or None
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
    return {
        "id": PREFIX + turn,
        "object": "chat.completion",
        "created": int(created(turn)),
        "model": done.model_id,
        "choices": [choice],
        "usage": _usage(collected.usage),
    }
