"""A load generator for anything that speaks OpenAI's chat dialect: ``python -m tests.bench.load --url http://127.0.0.1:5001``.

Each client is one kept-alive connection that asks one request after the other. Every answer is checked token by token
(``wire.Transcript``); figures are printed as one JSON object for each part of the load. With ``--hold`` it prints ``warm`` once it has
warmed up, and begins each part when a line arrives on stdin. With ``--quiet`` it prints ``quiet`` when every client has its first token.
"""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop

from .wire import Ask, Transcript

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked")
_NS = 1e9


@dataclass(frozen=True)
class Plan:
    """What is to be asked: *requests* by each of *clients*, whose starts are spread evenly over *spread_ms*, in each of *parts*.

    A request of the warm-up is like the others, or has *warm_tokens* tokens without a gap.
    """

    url: str
    clients: int = 1
    requests: int = 1
    tokens: int = 16
    gap_ms: float = 0
    stream: bool = True
    spread_ms: float = 0
    in_step: bool = False
    warmup: int = 1
    warm_tokens: int = 0
    parts: int = 1
    quiet: bool = False
    timeout: float = 120
    model: str = "auto"
    key: str = ""


@dataclass
class Told:
    """One finished request, in ns of CLOCK_MONOTONIC; *first* is when the first text arrived."""

    transcript: Transcript
    began: int
    first: int | None = None
    ended: int = 0


@dataclass(frozen=True)
class Report:
    """Figures of a load; times in milliseconds, as ``p50``, ``p95``, ``p99`` and ``max``."""

    requests: int
    failed: int
    tokens: int
    seconds: float
    first_token_ms: dict[str, float]
    token_delay_ms: dict[str, float]
    request_ms: dict[str, float]
    errors: list[str] = field(default_factory=list)


def percentiles(values_ns: Sequence[int]) -> dict[str, float]:
    """Percentiles (nearest rank) of durations in ns, as ms; empty without values."""
    ordered = sorted(values_ns)
    if not ordered:
        return {}
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: ordered[max(-int(-len(ordered) * rank // 1), 1) - 1] / 1e6 for name, rank in ranks.items()}


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; hands on the body of a response in whatever pieces it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: Any = None
        self._parse: Callable[[], bool] = self._idle
        self._left = 0
        self._body: Callable[[bytes], None] = lambda _: None
        self._over: asyncio.Future[int] | None = None
        self._status = 0

    @property
    def open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._transport = None
        if self._parse == self._to_the_end:
            self._finish()
        elif self._over is not None and not self._over.done():
            self._over.set_exception(ConnectionError("the connection was closed in the middle of an answer"))

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._buffer += data
        while self._parse():
            pass

    async def ask(self, request: bytes, body: Callable[[bytes], None]) -> int:
        """Send *request*, give the response's body to *body*; returns the status, raises ``ConnectionError``."""
        self._body, self._parse = body, self._head
        self._over = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._over

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> bool:
        self._parse = self._idle
        if self._over is not None and not self._over.done():
            self._over.set_result(self._status)
        return False

    def _idle(self) -> bool:
        return False

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        self._status = int(head.split(b" ", 2)[1])
        if _CHUNKED.search(head):
            self._parse = self._size
        elif match := _LENGTH.search(head):
            self._left, self._parse = int(match[1]), self._counted
        else:
            self._parse = self._to_the_end
        return True

    def _size(self) -> bool:
        if (line := self._line()) is None:
            return False
        self._left = int(line.partition(b";")[0], 16)
        self._parse = self._chunk if self._left else self._trailer
        return True

    def _chunk(self) -> bool:
        if len(self._buffer) < self._left + 2:
            return False
        self._body(bytes(self._buffer[: self._left]))
        del self._buffer[: self._left + 2]
        self._parse = self._size
        return True

    def _trailer(self) -> bool:
        line = self._line()
        return self._finish() if line == b"" else line is not None

    def _counted(self) -> bool:
        if len(self._buffer) < self._left:
            return False
        self._body(bytes(self._buffer[: self._left]))
        del self._buffer[: self._left]
        return self._finish()

    def _to_the_end(self) -> bool:
        if self._buffer:
            self._body(bytes(self._buffer))
            self._buffer.clear()
        return False


class Listener:
    """Reads the body of one answer into its transcript."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self._rest = b""

    def streamed(self, data: bytes) -> None:
        """Take a piece of an SSE stream."""
        at = time.monotonic_ns()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._data(line[5:].strip(), at)

    def whole(self, data: bytes) -> None:
        """Take a piece of a JSON response."""
        self._rest += data

    def end(self, status: int) -> None:
        """The response is over."""
        transcript = self.told.transcript
        if status != 200:
            transcript.complain(f"HTTP {status}: {self._rest[:200]!r}")
        elif not transcript.ask.stream:
            self._frame(self._rest, time.monotonic_ns(), "message")

    def _data(self, data: bytes, at: int) -> None:
        transcript = self.told.transcript
        if transcript.done:
            transcript.complain("it went on after [DONE]")
        elif data == b"[DONE]":
            transcript.done = True
        else:
            self._frame(data, at, "delta")

    def _frame(self, data: bytes, at: int, part: str) -> None:
        transcript = self.told.transcript
        try:
            frame = orjson.loads(data)
        except orjson.JSONDecodeError:
            transcript.complain(f"not JSON: {data[:200]!r}")
            return
        if "error" in frame:
            transcript.complain(f"error: {frame['error']}")
        for choice in frame.get("choices", ()):
            if text := choice[part].get("content"):
                self.told.first = self.told.first or at
                transcript.feed(text, at)
            transcript.finish = choice.get("finish_reason") or transcript.finish
        if usage := frame.get("usage"):
            transcript.usage = usage["completion_tokens"]


class Client:
    """One connection's worth of requests."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan, self._number = plan, number
        self._connection = Connection()
        self._address = urlsplit(plan.url)
        #: What is being asked, or was last.
        self.told: Told | None = None

    async def run(self, count: int, kind: str) -> list[Told]:
        """Ask *count* times, one after the other."""
        return [await self._one(self._ask(f"{kind}-{self._number}-{n}")) for n in range(count)]

    def _ask(self, ident: str) -> Ask:
        plan = self._plan
        if plan.warm_tokens and ident.startswith("warm"):
            return Ask(ident, plan.warm_tokens, 0, plan.stream)
        return Ask(ident, plan.tokens, plan.gap_ms, plan.stream, in_step=plan.in_step)

    def close(self) -> None:
        """Drop the connection."""
        self._connection.close()

    async def _one(self, ask: Ask) -> Told:
        told = self.told = Told(Transcript(ask), time.monotonic_ns())
        listener = Listener(told)
        try:
            async with asyncio.timeout(self._plan.timeout):
                await self._connect()
                told.began = time.monotonic_ns()
                body = listener.streamed if ask.stream else listener.whole
                listener.end(await self._connection.ask(self._request(ask), body))
        except (OSError, TimeoutError) as error:
            told.transcript.complain(f"{type(error).__name__}: {error}")
            self._connection.close()
        told.ended = time.monotonic_ns()
        told.transcript.close()
        return told

    async def _connect(self) -> None:
        if not self._connection.open:
            host, port = self._address.hostname or "127.0.0.1", self._address.port or 80
            _, self._connection = await asyncio.get_running_loop().create_connection(Connection, host, port)

    def _request(self, ask: Ask) -> bytes:
        body = ask.body(self._plan.model)
        key = f"Authorization: Bearer {self._plan.key}\r\n" if self._plan.key else ""
        base = self._address.path.rstrip("/").removesuffix("/v1")
        head = (
            f"POST {base}/v1/chat/completions HTTP/1.1\r\nHost: {self._address.netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def run(plan: Plan, hold: Callable[[], None] = lambda: None) -> Report:
    """Put a load of one part on; see ``parts``."""
    return [report async for report in parts(plan, hold)][-1]


async def parts(plan: Plan, hold: Callable[[], None] = lambda: None) -> AsyncIterator[Report]:
    """Warm up; for each part call *hold* (it may block), put the load on, and check all of it.

    Wrong answers of the warm-up count with the first part.
    """
    clients = [Client(plan, number) for number in range(plan.clients)]
    told = await asyncio.gather(*(_later(client, plan, number, "warm") for number, client in enumerate(clients)))
    warm = [each for some in told for each in some]
    for part in range(plan.parts):
        hold()
        began = time.monotonic_ns()
        watching = asyncio.create_task(_say_quiet(clients)) if plan.quiet else None
        told = await asyncio.gather(*(_later(client, plan, number, f"load{part or ''}") for number, client in enumerate(clients)))
        ended = time.monotonic_ns()
        if watching:
            watching.cancel()
        yield _report([each for some in told for each in some], ended - began, warm)
        warm = []
    for client in clients:
        client.close()


async def _say_quiet(clients: Sequence[Client]) -> None:
    """Say when every one has begun to get its answer."""
    while not all(client.told and client.told.first and "load" in client.told.transcript.ask.ident for client in clients):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    print("quiet", flush=True)


async def _later(client: Client, plan: Plan, number: int, kind: str) -> list[Told]:
    await asyncio.sleep(plan.spread_ms / 1000 * number / plan.clients)
    return await client.run(plan.warmup if kind == "warm" else plan.requests, kind)


def _report(told: list[Told], took_ns: int, warm: list[Told]) -> Report:
    errors = [error for each in (*warm, *told) for error in each.transcript.errors]
    return Report(
        requests=len(told),
        failed=sum(1 for each in (*warm, *told) if each.transcript.errors),
        tokens=sum(len(each.transcript.delays_ns) for each in told),
        seconds=took_ns / _NS,
        first_token_ms=percentiles([each.first - each.began for each in told if each.first]),
        token_delay_ms=percentiles([delay for each in told for delay in each.transcript.delays_ns]),
        request_ms=percentiles([each.ended - each.began for each in told]),
        errors=errors[:20],
    )


def _holding() -> Callable[[], None]:
    said = iter(["warm\n"])

    def hold() -> None:
        print(next(said, ""), end="", flush=True)
        sys.stdin.readline()

    return hold


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = Plan("")
    parser.add_argument("--url", required=True)
    for name in ("clients", "requests", "tokens", "warmup", "warm-tokens", "parts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name.replace("-", "_")))
    for name in ("gap-ms", "spread-ms", "timeout"):
        parser.add_argument(f"--{name}", type=float, default=getattr(defaults, name.replace("-", "_")))
    for name in ("model", "key"):
        parser.add_argument(f"--{name}", default=getattr(defaults, name))
    parser.add_argument("--in-step", action="store_true", help="all streams get their tokens at the same moments")
    parser.add_argument("--whole", dest="stream", action="store_false", help="not streamed")
    parser.add_argument("--quiet", action="store_true", help="tell when every client has its first token")
    parser.add_argument("--hold", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Run as a program; 1 when any answer was wrong."""
    arguments = vars(_arguments())
    hold = _holding() if arguments.pop("hold") else lambda: None
    return uvloop.run(_tell(Plan(**arguments), hold))


async def _tell(plan: Plan, hold: Callable[[], None]) -> int:
    failed = 0
    async for report in parts(plan, hold):
        print(orjson.dumps(asdict(report)).decode(), flush=True)
        failed += report.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
