"""A storm of clients that come back at once: ``python -m tests.bench.storm '{"url": "http://127.0.0.1:5001", "clients": 500}'``.

Each client reads an answer; all lose their connection at the same moment, stay away for a while, and go on where they were with
``Last-Event-ID``, all at once. Every token is checked. It says ``warm`` when all of them read, ``away`` before they come back, ``served``
when each has a token that it did not have; it waits for a line on stdin after the first two. ``first_token_ms`` of its report is the time
from the storm to that token, ``seconds`` until the last one has it.
"""

import asyncio
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import orjson
import uvloop

from .load import Connection, Listener, Report, Told, percentiles
from .wire import Ask, Transcript

_TURN = re.compile(rb'"id":"chatcmpl-([^"]+)"')


@dataclass(frozen=True)
class Plan:
    """*clients* read *tokens* tokens, *gap_ms* apart; they begin over *spread_ms* and are away for *away_ms*."""

    url: str
    clients: int = 500
    tokens: int = 10
    gap_ms: float = 2000
    spread_ms: float = 2000
    away_ms: float = 2500
    timeout: float = 60
    key: str = ""


class Reader(Listener):
    """Reads an answer over two connections; knows at any time what it would say in ``Last-Event-ID``, and what it had by then."""

    def __init__(self, told: Told) -> None:
        super().__init__(told)
        self.turn = self.last = b""
        self.had = 0
        self.served: int | None = None
        self._next = b""
        self._returned = False

    def streamed(self, data: bytes) -> None:
        """Take a piece of an SSE stream. An event is had once its blank line has come."""
        at = time.monotonic_ns()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._heard(line[5:].strip(), at)
            elif line.startswith(b"id:"):
                self._next = line[3:].strip()
            elif not line and self._next:
                self.last, self.had, self._next = self._next, self.told.transcript.count, b""

    def _heard(self, data: bytes, at: int) -> None:
        if not self.turn and (found := _TURN.search(data)):
            self.turn = found[1]
        before = self.told.transcript.count
        self._data(data, at)
        if self._returned and self.served is None and self.told.transcript.count > before:
            self.served = at

    def return_(self) -> None:
        """From now on it hears what comes behind ``last``."""
        self._returned, self._rest, self._next = True, b"", b""
        self.told.transcript.back_to(self.had)


class Client:
    """One answer's reader, and its connections."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan = plan
        self._address = urlsplit(plan.url)
        self._ask = Ask(f"storm-{number}", plan.tokens, plan.gap_ms)
        self._connection = Connection()
        self.reader = Reader(Told(Transcript(self._ask), time.monotonic_ns()))

    @property
    def told(self) -> Told:
        """What it was told."""
        return self.reader.told

    async def begin(self, wait: float) -> None:
        """Ask after *wait* seconds, and read until the connection is lost."""
        await asyncio.sleep(wait)
        body = self._ask.body("auto")
        head = f"POST {self._path} HTTP/1.1\r\n{self._common}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self._exchange(head.encode() + body)

    def lose(self) -> None:
        """Lose the connection."""
        self._connection.close()

    async def go_on(self) -> None:
        """Come back, and read to the end."""
        self.reader.return_()
        path = f"{self._path}/{self.reader.turn.decode()}/events?include_usage=true"
        head = f"GET {path} HTTP/1.1\r\n{self._common}Last-Event-ID: {self.reader.last.decode()}\r\n\r\n"
        try:
            self.reader.end(await self._exchange(head.encode()))
        except (OSError, TimeoutError) as error:
            self.told.transcript.complain(f"{type(error).__name__}: {error}")
        self.told.ended = time.monotonic_ns()
        self.told.transcript.close()
        self._connection.close()

    @property
    def _path(self) -> str:
        return f"{self._address.path.rstrip('/')}/v1/chat/completions"

    @property
    def _common(self) -> str:
        return f"Host: {self._address.netloc}\r\n" + (f"Authorization: Bearer {self._plan.key}\r\n" if self._plan.key else "")

    async def _exchange(self, request: bytes) -> int:
        host, port = self._address.hostname or "127.0.0.1", self._address.port or 80
        async with asyncio.timeout(self._plan.timeout):
            _, self._connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
            return await self._connection.ask(request, self.reader.streamed)


async def run(plan: Plan, say: bool = True) -> Report:
    """The whole course; with *say* it tells and waits as the module says."""
    clients = [Client(plan, number) for number in range(plan.clients)]
    waits = [plan.spread_ms / 1000 * number / plan.clients for number in range(plan.clients)]
    reading = [asyncio.create_task(client.begin(wait)) for client, wait in zip(clients, waits, strict=True)]
    async with asyncio.timeout(plan.timeout):
        await _until(lambda: all(bool(client.reader.last) or task.done() for client, task in zip(clients, reading, strict=True)))
    _tell("warm", wait=say, say=say)
    for client in clients:
        client.lose()
    for client, error in zip(clients, await asyncio.gather(*reading, return_exceptions=True), strict=True):
        if not isinstance(error, ConnectionError):
            client.told.transcript.complain(f"it ended before the storm: {error!r}")
    await asyncio.sleep(plan.away_ms / 1000)
    _tell("away", wait=say, say=say)
    began = time.monotonic_ns()
    returning = [asyncio.create_task(client.go_on()) for client in clients]
    await _until(lambda: all(bool(client.reader.served) or task.done() for client, task in zip(clients, returning, strict=True)))
    _tell("served", wait=False, say=say)
    await asyncio.gather(*returning)
    return _report(clients, began)


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  nobody tells, it must be looked
        await asyncio.sleep(0.01)


def _tell(what: str, *, wait: bool, say: bool) -> None:
    if say:
        print(what, flush=True)
    if wait:
        sys.stdin.readline()


def _report(clients: list[Client], began: int) -> Report:
    served = [client.reader.served - began for client in clients if client.reader.served]
    errors = [error for client in clients for error in client.told.transcript.errors]
    return Report(
        requests=len(clients),
        failed=sum(1 for client in clients if client.told.transcript.errors),
        tokens=sum(len(client.told.transcript.delays_ns) for client in clients),
        seconds=max(served, default=0) / 1e9,
        first_token_ms=percentiles(served),
        token_delay_ms={},
        request_ms=percentiles([client.told.ended - began for client in clients]),
        errors=errors[:20],
    )


if __name__ == "__main__":
    print(orjson.dumps(asdict(uvloop.run(run(Plan(**orjson.loads(sys.argv[1])))))).decode(), flush=True)
