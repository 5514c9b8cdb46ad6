"""A very cheap engine that speaks OpenAI's dialect in vLLM's manner: ``python -m tests.bench.mock --port 0`` prints its address.

``POST /v1/chat/completions`` (pace and tokens: see ``wire``), ``GET /v1/models``, ``GET /health`` and ``GET /counts``. One process, no
task for a stream: one timer serves all of them, so that what is measured is the system in front of it.
"""

import argparse
import asyncio
import heapq
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import uvloop

from .wire import Ask, chunk, in_paragraphs, token

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_STATUS = {200: b"200 OK", 400: b"400 Bad Request", 404: b"404 Not Found"}
_SSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
)
#: Tokens written in one pass of the loop when a request wants no gap.
_AT_ONCE = 8


class Wheel:
    """One timer for everybody: what is due in the same millisecond is called in one go."""

    def __init__(self) -> None:
        self._slots: dict[int, list[Callable[[], None]]] = {}
        self._order: list[int] = []
        self._timer: asyncio.TimerHandle | None = None

    def at(self, due: float, call: Callable[[], None]) -> None:
        """Call *call* once at *due* (seconds of ``time.monotonic``), never more than a millisecond early."""
        slot = int(due * 1000)
        if (waiting := self._slots.get(slot)) is not None:
            waiting.append(call)
            return
        self._slots[slot] = [call]
        heapq.heappush(self._order, slot)
        if self._order[0] == slot:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # Whole milliseconds, rounded up: uvloop's timers know no less, and a shorter wait would spin.
        wait = max(math.ceil(self._order[0] - time.monotonic() * 1000), 1)
        self._timer = asyncio.get_running_loop().call_later(wait / 1000, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = int(time.monotonic() * 1000)
        while self._order and self._order[0] <= now:
            for call in self._slots.pop(heapq.heappop(self._order)):
                call()
        if self._order:
            self._arm()


@dataclass
class Counts:
    """What the engine has done so far: *aborted* answers lost their reader before the end."""

    requests: int = 0
    aborted: int = 0
    active: int = 0
    tokens: int = 0


@dataclass
class Engine:
    """What all connections share."""

    wheel: Wheel = field(default_factory=Wheel)
    counts: Counts = field(default_factory=Counts)

    def connection(self) -> "Connection":
        """A protocol for one more connection."""
        return Connection(self)


class Answer:
    """An answer under way to *connection*: writes itself token by token."""

    def __init__(self, ask: Ask, engine: Engine, connection: "Connection") -> None:
        self._ask, self._engine, self._connection = ask, engine, connection
        self._index = 0
        self._due = time.monotonic()
        if ask.in_step and ask.gap_ms:  # a token for everybody at each step of the engine
            gap = ask.gap_ms / 1000
            self._due -= self._due % gap
        common = f'"id":"chatcmpl-{ask.ident}","object":"chat.completion.chunk","created":{int(time.time())},"model":"mock"'
        self._head = f'data: {{{common},"choices":'
        engine.counts.requests += 1
        engine.counts.active += 1

    def start(self) -> None:
        """Say the first token at once."""
        self._connection.write(
            _SSE + self._frame('[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]')
        )
        self._step()

    def abort(self) -> None:
        """Nobody reads any more."""
        self._engine.counts.aborted += 1
        self._engine.counts.active -= 1
        self._index = self._ask.tokens

    def _step(self) -> None:
        if self._connection.answer is not self:
            return
        now = 1 if self._ask.gap_ms else min(_AT_ONCE, self._ask.tokens - self._index)
        self._connection.write(b"".join([self._say() for _ in range(now)]))
        if self._index >= self._ask.tokens:
            self._end()
            return
        self._due += self._ask.gap_ms / 1000
        if self._ask.gap_ms:
            self._engine.wheel.at(self._due, self._step)
        else:
            asyncio.get_running_loop().call_soon(self._step)

    def _say(self) -> bytes:
        text = token(self._index, self._ask.ident)
        if self._ask.paragraphs:
            text = in_paragraphs(text, self._index)
        self._index += 1
        self._engine.counts.tokens += 1
        reason = '"length"' if self._index == self._ask.tokens else "null"
        return self._frame(f'[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":{reason}}}]')

    def _frame(self, choices: str, rest: str = "") -> bytes:
        return chunk(f"{self._head}{choices}{rest}}}\n\n".encode())

    def _end(self) -> None:
        self._engine.counts.active -= 1
        usage = self._frame("[]", f',"usage":{orjson.dumps(_usage(self._ask)).decode()}') if self._ask.usage else b""
        self._connection.write(usage + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self._connection.ended()


class WholeAnswer(Answer):
    """The same, not streamed: it comes in one piece when its last token is due."""

    def start(self) -> None:
        """Wait until all tokens would have been said."""
        if wait := self._ask.gap_ms * (self._ask.tokens - 1):
            self._engine.wheel.at(self._due + wait / 1000, self._step)
        else:
            self._step()

    def _step(self) -> None:
        if self._connection.answer is not self:
            return
        ask, counts = self._ask, self._engine.counts
        content = "".join([token(index, ask.ident) for index in range(ask.tokens)])
        message = {"role": "assistant", "content": content}
        body = {
            "id": f"chatcmpl-{ask.ident}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "mock",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
            "usage": _usage(ask),
        }
        counts.tokens += ask.tokens
        counts.active -= 1
        self._connection.reply(200, body)
        self._connection.ended()


def _usage(ask: Ask) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": ask.tokens, "total_tokens": 8 + ask.tokens}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request after the other; bodies need a Content-Length."""

    def __init__(self, engine: Engine) -> None:
        self.answer: Answer | None = None
        self._engine = engine
        self._buffer = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        if self.answer is not None:
            answer, self.answer = self.answer, None
            answer.abort()

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._buffer += data
        if self.answer is None:
            self._serve()

    def write(self, data: bytes) -> None:
        """Send *data* as it is."""
        self._transport.write(data)

    def ended(self) -> None:
        """The answer is complete: take what else was asked."""
        self.answer = None
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._serve)

    def reply(self, status: int, body: object) -> None:
        """Send a JSON response."""
        data = orjson.dumps(body)
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (_STATUS[status], len(data))
        self._transport.write(head + data)

    def _serve(self) -> None:
        while self.answer is None:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            length = int(match[1]) if (match := _LENGTH.search(head)) else 0
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            method, path, *_ = head.split(b" ", 2)
            self._route(method + b" " + path.partition(b"?")[0], rest[:length])

    def _route(self, what: bytes, body: bytes) -> None:
        if what == b"POST /v1/chat/completions":
            self._chat(body)
        elif what == b"GET /health":
            self.reply(200, {"status": "ok"})
        elif what == b"GET /v1/models":
            self.reply(200, {"object": "list", "data": [{"id": "mock", "object": "model", "created": 0, "owned_by": "vllm"}]})
        elif what == b"GET /counts":
            self.reply(200, asdict(self._engine.counts))
        else:
            self.reply(404, {"error": {"message": "no such address", "type": "not_found", "code": 404}})

    def _chat(self, body: bytes) -> None:
        try:
            ask = Ask.read(body)
        except ValueError as error:
            self.reply(400, {"error": {"message": str(error), "type": "invalid_request_error", "code": 400}})
            return
        self.answer = (Answer if ask.stream else WholeAnswer)(ask, self._engine, self)
        self.answer.start()


async def serve(host: str = "127.0.0.1", port: int = 0) -> tuple[asyncio.Server, str]:
    """Start the engine; the address is a base URL without path."""
    server = await asyncio.get_running_loop().create_server(Engine().connection, host, port)
    return server, f"http://{host}:{server.sockets[0].getsockname()[1]}"


async def _main(port: int) -> None:
    server, url = await serve(port=port)
    print(url, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    uvloop.run(_main(parser.parse_args().port))
