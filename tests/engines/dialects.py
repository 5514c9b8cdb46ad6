"""Fake engines that are faithful to the wire: each speaks one dialect with its quirks, remembers what it was asked, and can fail."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from capibara_flow.domain.fleet import Expert

TEXT = ("Los", " capibaras", " son", " 🦫", "\n\nñandú.")
CALL = {"id": "call_7", "name": "weather", "arguments": {"city": "Bogotá"}}


def sse(data: dict[str, Any] | str) -> bytes:
    """One event of an SSE stream."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()


class FakeEngine(ABC):
    """A server on a free port of 127.0.0.1 that answers ``tokens``; its *fault* says how an answer goes wrong after two of them.

    Faults: ``broken`` (the connection breaks), ``cut`` (the stream ends cleanly, too early), ``error`` (the dialect's error
    frame), ``proxy`` (a proxy's bare line, then a clean end), ``silent`` (nothing more comes), ``mute`` (not even headers),
    ``headers`` (headers only), ``chatter`` (headers, then keep-alives for ever), ``bytes`` (each byte in a packet of its
    own), ``held`` (the body does not end before ``release`` is set). It *hangs_up* on so many requests without a word.
    """

    name: str
    path: str
    ready_path = "/health"

    def __init__(self) -> None:
        self.tokens: tuple[str, ...] = TEXT
        self.reasoning: tuple[str, ...] = ()
        self.calls: tuple[dict[str, Any], ...] = ()
        self.reason = "stop"
        self.fault = ""
        self.refuses: tuple[int, Any] | None = None
        self.hangs_up = 0
        self.ready = 200
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.aborts = 0
        self.asked, self.aborted, self.release = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.connections: set[Any] = set()
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> "FakeEngine":
        app = web.Application(client_max_size=2**26)
        app.router.add_post(self.path, self._handle)
        app.router.add_get(self.ready_path, self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner
        await self._runner.cleanup()

    def expert(self, **changes: Any) -> Expert:
        """An expert behind this engine."""
        timeouts = changes.pop("timeouts", {})
        return Expert.model_validate({"name": "fake", "dialect": self.name, "urls": (self.url,), "timeouts": timeouts, **changes})

    @abstractmethod
    def opening(self) -> Iterator[bytes]:
        """Frames before the first token."""

    @abstractmethod
    def token(self, text: str, *, last: bool) -> bytes:
        """One token."""

    @abstractmethod
    def closing(self) -> Iterator[bytes]:
        """Frames after the last token of a complete answer."""

    @abstractmethod
    def error(self) -> bytes:
        """How an error in the middle of a stream is reported."""

    def thoughts(self) -> Iterator[bytes]:
        """Reasoning, where the dialect has a place for it."""
        yield from ()

    def tool_calls(self) -> Iterator[bytes]:
        """Tool calls, where the dialect has them."""
        yield from ()

    def new(self, body: dict[str, Any]) -> tuple[str, ...]:
        """The tokens that answer *body*: all of them, or those behind the prefix where the dialect continues."""
        del body
        return self.tokens

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "Loading model"}} if self.ready != 200 else {"status": "ok"}, status=self.ready)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.asked.set()
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport)
        if self.hangs_up:
            self.hangs_up -= 1
            assert request.transport
            request.transport.close()
            return web.Response()
        if self.refuses:
            status, words = self.refuses
            return web.json_response(words, status=status)
        try:
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.aborts += 1
            self.aborted.set()
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.fault == "mute":
            await asyncio.Event().wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.fault in ("headers", "chatter"):
            await self._wait_for_ever(response)
        said = self.new(body)
        for frame in self._before(said[: 2 if self.fault in _AFTER_TWO else None], last=self.fault not in _AFTER_TWO):
            await self._write(response, frame)
        if self.fault in _AFTER_TWO:
            await self._fail(request, response)
        else:
            for frame in self.closing():
                await self._write(response, frame)
        if self.fault == "held":
            await self.release.wait()
        return response

    def _before(self, said: tuple[str, ...], *, last: bool) -> Iterator[bytes]:
        yield from self.opening()
        yield from self.thoughts()
        for index, text in enumerate(said, 1):
            yield self.token(text, last=last and index == len(said) and not self.calls)
        yield from self.tool_calls()

    async def _write(self, response: web.StreamResponse, frame: bytes) -> None:
        for piece in [frame[i : i + 1] for i in range(len(frame))] if self.fault == "bytes" else [frame]:
            await response.write(piece)

    async def _fail(self, request: web.Request, response: web.StreamResponse) -> None:
        match self.fault:
            case "broken":
                assert request.transport
                request.transport.close()
            case "error":
                await response.write(self.error())
            case "proxy":
                await response.write(b"proxy error: Failed to read connection\n")
            case "silent":
                await asyncio.Event().wait()

    async def _wait_for_ever(self, response: web.StreamResponse) -> None:
        while True:
            if self.fault == "chatter":
                await response.write(b":\n\n")
            await asyncio.sleep(0.01)


_AFTER_TWO = ("broken", "cut", "error", "proxy", "silent")


class LlamaServer(FakeEngine):
    """llama-server ``/v1``: null as the first content, the reason on an empty delta of its own, an error without ``[DONE]``."""

    name, path = "llama_server", "/v1/chat/completions"
    thinking = "reasoning_content"

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choices = [{"finish_reason": reason, "index": 0, "delta": delta}]
        return sse({"choices": choices, "created": 1, "id": "chatcmpl-x", "model": "m", "object": "chat.completion.chunk"})

    def opening(self) -> Iterator[bytes]:
        yield b":\n\n"
        yield self.chunk({"role": "assistant", "content": None})

    def thoughts(self) -> Iterator[bytes]:
        yield from (self.chunk({self.thinking: thought}) for thought in self.reasoning)

    def token(self, text: str, *, last: bool) -> bytes:
        del last
        return self.chunk({"content": text})

    def tool_calls(self) -> Iterator[bytes]:
        for index, call in enumerate(self.calls):
            text = json.dumps(call["arguments"], ensure_ascii=False)
            head = {"index": index, "id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": ""}}
            yield self.chunk({"tool_calls": [head]})
            for part in (text[:5], text[5:]):
                yield self.chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})

    def closing(self) -> Iterator[bytes]:
        yield self.chunk({}, self.reason)
        yield from self.usage()
        yield sse("[DONE]")

    def usage(self) -> Iterator[bytes]:
        if (self.requests[-1].get("stream_options") or {}).get("include_usage"):
            counts = {"completion_tokens": len(self.tokens), "prompt_tokens": 11, "total_tokens": 11 + len(self.tokens)}
            yield sse({"choices": [], "object": "chat.completion.chunk", "usage": counts, "timings": {"prompt_n": 11}})

    def error(self) -> bytes:
        return sse({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}})

    def new(self, body: dict[str, Any]) -> tuple[str, ...]:
        last = body["messages"][-1]
        if last["role"] == "assistant" and body.get("continue_final_message") and body.get("add_generation_prompt") is False:
            return _behind(last["content"], self.tokens)
        return self.tokens


class Vllm(LlamaServer):
    """vLLM ``/v1``: an empty text first, the reason on the last text, usage null before it, ``[DONE]`` even after an error."""

    name = "vllm"
    thinking = "reasoning"

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "token_ids": None}]
        return sse({"id": "chatcmpl-x", "object": "chat.completion.chunk", "model": "m", "choices": choices, "usage": None})

    def opening(self) -> Iterator[bytes]:
        yield self.chunk({"role": "assistant", "content": ""})

    def token(self, text: str, *, last: bool) -> bytes:
        return self.chunk({"content": text}, self.reason if last else None)

    def closing(self) -> Iterator[bytes]:
        if self.calls or not self.tokens:
            yield self.chunk({"content": ""}, self.reason)
        yield from self.usage()
        yield sse("[DONE]")

    def error(self) -> bytes:
        return sse({"error": {"message": "Compute error.", "type": "InternalServerError", "code": 500}}) + sse("[DONE]")


class LlamaCompletion(FakeEngine):
    """llama-server ``/completion``: ``stop: true`` is the end, there is no ``[DONE]``; the prompt's open end is continued."""

    name, path = "llama_completion", "/completion"

    def opening(self) -> Iterator[bytes]:
        yield b":\n\n"

    def token(self, text: str, *, last: bool) -> bytes:
        del last
        return sse(
            {"index": 0, "content": text, "tokens": [1], "stop": False, "id_slot": -1, "tokens_predicted": 1, "tokens_evaluated": 11}
        )

    def closing(self) -> Iterator[bytes]:
        ending = {"stop_type": "limit" if self.reason == "length" else "eos", "stopping_word": "", "truncated": False}
        counts = {"tokens_predicted": len(self.tokens), "tokens_evaluated": 11, "tokens_cached": 16}
        yield sse({"index": 0, "content": "", "tokens": [], "id_slot": 2, "stop": True, "model": "m", **counts, **ending})

    def error(self) -> bytes:
        return sse({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}})

    def new(self, body: dict[str, Any]) -> tuple[str, ...]:
        opened = body["prompt"].rpartition("<|im_start|>assistant\n")[2]
        return _behind(opened, self.tokens)


class Ollama(FakeEngine):
    """Ollama ``/api/chat``: lines of JSON, whole tool calls, thinking in a field of its own; errors are a line of their own."""

    name, path, ready_path = "ollama", "/api/chat", "/api/version"

    def line(self, **fields: Any) -> bytes:
        return (json.dumps({"model": "m", "created_at": "2026-11-21T00:00:00Z", **fields}, ensure_ascii=False) + "\n").encode()

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def thoughts(self) -> Iterator[bytes]:
        for thought in self.reasoning:
            yield self.line(message={"role": "assistant", "content": "", "thinking": thought}, done=False)

    def token(self, text: str, *, last: bool) -> bytes:
        del last
        return self.line(message={"role": "assistant", "content": text}, done=False)

    def tool_calls(self) -> Iterator[bytes]:
        for call in self.calls:
            function = {"name": call["name"], "arguments": call["arguments"]}
            yield self.line(message={"role": "assistant", "content": "", "tool_calls": [{"function": function}]}, done=False)

    def closing(self) -> Iterator[bytes]:
        # Ollama says "stop" after tool calls, too.
        reason = "stop" if self.reason == "tool_calls" else self.reason
        counts = {"total_duration": 1, "prompt_eval_count": 11, "eval_count": len(self.tokens)}
        yield self.line(message={"role": "assistant", "content": ""}, done=True, done_reason=reason, **counts)

    def error(self) -> bytes:
        return b'{"error":"Compute error."}\n'


def _behind(prefix: str, tokens: tuple[str, ...]) -> tuple[str, ...]:
    rest = "".join(tokens).removeprefix(prefix)
    return (rest,) if prefix and rest != "".join(tokens) else tokens


DIALECTS = (LlamaServer, Vllm, LlamaCompletion, Ollama)
