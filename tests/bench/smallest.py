"""The smallest durable system: what a turn takes at least in Python with this broker. ``python -m tests.bench.smallest up ENGINE READY``.

An edge and two workers do what makes a turn durable, and nothing else: two queues, a lease, a fenced output of which one batch at a time is
on its way, a log, files. They read no more of a message than they must, know no fault, no second expert, no tenant and no way to stop or to
come back. They also store less than Capibara: lines without the turn's id, all that comes in one read of the engine's socket as one batch
(Capibara sends the first line at once, and the rest behind it), facts that may come twice, no keys of readers, no heartbeats (work comes
again after ten minutes, not after seconds). So it shows about how low a Python program with this broker gets, not how low one could.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import orjson
import uvloop

from capibara_flow.runtime.embedded import PASSWORD_VARIABLE, EmbeddedBroker

from .wire import chunk

#: Called with subject, reply subject, headers and body of a message.
Hear = Callable[[bytes, bytes, bytes, bytes], None]

_ROOT = Path(__file__).resolve().parents[2]
_PERMITS = 1024
_STOPPING = {signal.SIGTERM, signal.SIGINT}
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_FRAME = re.compile(rb"data: (.+?)\n\n")
_SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
_TOKEN, _DONE = b'{"event":"token","text":', b'{"event":"done","tokens":'


class Nats(asyncio.Protocol):
    """One connection of *user* to the broker; what is sent in one pass of the loop leaves in one write."""

    def __init__(self, user: str) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inbox = f"_INBOX_{user}.{secrets.token_hex(8)}"
        self._user = user
        self._ears: dict[bytes, Hear] = {}
        self._stored: dict[bytes, Callable[[int], None]] = {}
        self._number = self._asked = 0
        self._out: list[bytes] = []
        self._rest = b""
        self._transport: Any = None

    @classmethod
    async def connect(cls, user: str, url: str) -> Self:
        """A connection that is ready."""
        address = urlsplit(url)
        _, self = await asyncio.get_running_loop().create_connection(lambda: cls(user), address.hostname, address.port)
        await self.ready
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport
        password = os.environ[f"{PASSWORD_VARIABLE}{self._user.upper()}"]
        login = {"user": self._user, "pass": password, "verbose": False, "pedantic": False, "headers": True, "no_responders": True}
        self.send(b"CONNECT %b\r\nPING\r\n" % orjson.dumps(login))
        self.listen(f"{self.inbox}.*", self._acknowledged)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        data, at = self._rest + data, 0
        while (end := data.find(b"\r\n", at)) >= 0:
            verb, *words = data[at:end].split(b" ")
            if verb not in {b"MSG", b"HMSG"}:
                self._control(verb, data[at:end])
                at = end + 2
                continue
            head, size = int(words[-2]) if verb == b"HMSG" else 0, int(words[-1])
            start, stop = end + 2, end + 2 + size
            if len(data) < stop + 2:
                break
            reply = words[2] if len(words) == (5 if head else 4) else b""
            if ear := self._ears.get(words[1]):
                ear(words[0], reply, data[start : start + head], data[start + head : stop])
            at = stop + 2
        self._rest = data[at:]

    def _control(self, verb: bytes, line: bytes) -> None:
        if verb == b"PING":
            self.send(b"PONG\r\n")
        elif verb == b"PONG" and not self.ready.done():
            self.ready.set_result(None)
        elif verb == b"-ERR":
            raise ConnectionError(line.decode())

    def send(self, command: bytes) -> None:
        """Let *command* leave at the end of this pass."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._leave)
        self._out.append(command)

    def _leave(self) -> None:
        self._transport.write(b"".join(self._out))
        self._out.clear()

    def listen(self, subject: str, ear: Hear) -> bytes:
        """Give what comes to *subject* to *ear*; a name for ``leave``."""
        self._number += 1
        name = b"%d" % self._number
        self._ears[name] = ear
        self.send(b"SUB %b %b\r\n" % (subject.encode(), name))
        return name

    def leave(self, name: bytes) -> None:
        """End what ``listen`` began."""
        del self._ears[name]
        self.send(b"UNSUB %b\r\n" % name)

    def say(self, subject: bytes, body: bytes, reply: bytes = b"", headers: bytes = b"") -> None:
        """Publish."""
        if headers:
            headers = b"NATS/1.0\r\n%b\r\n" % headers
            self.send(b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject, reply, len(headers), len(headers) + len(body), headers, body))
        else:
            self.send(b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(body), body))

    def store(self, subject: bytes, body: bytes, headers: bytes, stored: Callable[[int], None]) -> None:
        """Publish into a stream; *stored* is called with the sequence."""
        self._asked += 1
        name = b"%d" % self._asked
        self._stored[name] = stored
        self.say(subject, body, b"%b.%b" % (self.inbox.encode(), name), headers)

    def _acknowledged(self, subject: bytes, reply: bytes, headers: bytes, body: bytes) -> None:
        answer = orjson.loads(body)
        if "error" in answer:
            raise ConnectionError(body.decode())
        self._stored.pop(subject.rpartition(b".")[2])(answer["seq"])

    def pull(self, stream: str, durable: str, take: Hear) -> None:
        """Give what waits for *durable* to *take*, as many as may come."""
        inbox, asked = f"{self.inbox}.pull.{durable}", 0

        def ask() -> None:
            nonlocal asked
            asked += _PERMITS
            body = orjson.dumps({"batch": _PERMITS, "expires": 3600 * 10**9})
            self.say(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}".encode(), body, inbox.encode())

        def hear(subject: bytes, reply: bytes, headers: bytes, body: bytes) -> None:
            nonlocal asked
            if not reply:  # nothing came for so long that the broker forgot what it was asked for
                asked = 0
                return ask()
            asked -= 1
            if asked < _PERMITS // 2:
                ask()
            return take(subject, reply, headers, body)

        self.listen(inbox, hear)
        ask()


# --- edge -------------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """A client's connection: one request after the other."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats
        self._buffer = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        head, found, rest = (self._buffer + data).partition(b"\r\n\r\n")
        length = int(match[1]) if (match := _LENGTH.search(head)) else 0
        if not found or len(rest) < length:
            self._buffer += data
            return
        self._buffer = b""
        (Stream if orjson.loads(rest)["stream"] else Whole)(self, self._nats, rest).ask()

    def write(self, data: bytes) -> None:
        """Send *data* as it is."""
        if not self._transport.is_closing():
            self._transport.write(data)


class Whole:
    """A turn whose answer is given in one piece."""

    def __init__(self, client: Client, nats: Nats, body: bytes) -> None:
        self.turn = secrets.token_hex(16)
        self.client, self._nats, self._body = client, nats, body
        self._words: list[str] = []
        self._name = b""

    def ask(self) -> None:
        """Send it on its way."""
        self._name = self._nats.listen(f"cf.live.{self.turn}.main", self._hear)
        subject = f"cf.work.{self.turn}.router"
        self._nats.store(subject.encode(), self._body, b"Nats-Msg-Id: %b\r\n" % subject.encode(), self.accepted)

    def accepted(self, sequence: int) -> None:
        """The queue has it."""

    def _hear(self, subject: bytes, reply: bytes, headers: bytes, body: bytes) -> None:
        start = headers.index(b"Nats-Sequence: ") + 15
        lines = body.split(b"\n")
        tokens = [line[len(_TOKEN) : -1] for line in lines if line.startswith(_TOKEN)]
        self.tell(headers[start : headers.index(b"\r\n", start)], tokens)
        if lines[-1].startswith(_DONE):
            self._nats.leave(self._name)
            self.end(int(lines[-1][len(_DONE) : -1]))

    def tell(self, ident: bytes, tokens: Sequence[bytes]) -> None:
        """Take *tokens*, which are JSON strings, of the message *ident*."""
        self._words += map(orjson.loads, tokens)

    def end(self, tokens: int) -> None:
        """All *tokens* were said."""
        message = {"role": "assistant", "content": "".join(self._words)}
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        body = orjson.dumps({"id": self.turn, "object": "chat.completion", "choices": choices, "usage": _usage(tokens)})
        self.client.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class Stream(Whole):
    """A turn whose answer is streamed."""

    def __init__(self, client: Client, nats: Nats, body: bytes) -> None:
        super().__init__(client, nats, body)
        self._head = b'{"id":"%b","object":"chat.completion.chunk","model":"mock","choices":' % self.turn.encode()

    def accepted(self, sequence: int) -> None:
        """Begin."""
        self.client.write(_SSE)

    def tell(self, ident: bytes, tokens: Sequence[bytes]) -> None:
        """One write for all."""
        choice = b'data: %b[{"index":0,"delta":{"content":%%b},"finish_reason":null}]}\n\n' % self._head
        self.client.write(chunk(b"id: %b\n%b" % (ident, b"".join([choice % token for token in tokens]))))

    def end(self, tokens: int) -> None:
        """Reason, usage, end."""
        frames = (b'[{"index":0,"delta":{},"finish_reason":"length"}]}', b'[],"usage":%b}' % orjson.dumps(_usage(tokens)))
        told = b"".join([b"data: %b%b\n\n" % (self._head, frame) for frame in frames])
        self.client.write(chunk(told + b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}


# --- workers ----------------------------------------------------------------------------------------------------------


class Router:
    """Sends every turn to the one expert."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats

    def take(self, subject: bytes, reply: bytes, headers: bytes, body: bytes) -> None:
        """Say so, to client, queue and log; the work is settled when the first two are stored."""
        turn, left = subject.split(b".")[2], 2
        orjson.loads(body)["messages"]  # a router has to read what it decides on

        def stored(sequence: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                self._nats.say(reply, b"+ACK")

        self._nats.store(b"cf.out.%b.data.main" % turn, b'{"event":"routed","model":"mock"}', _fence(turn, 0), stored)
        following = b"cf.work.%b.call.mock.0" % turn
        self._nats.store(following, body, b"Nats-Msg-Id: %b\r\n" % following, stored)
        self._nats.say(b"cf.log.%b.router" % turn, b'{"model":"mock"}')


class Caller:
    """Asks the engine."""

    def __init__(self, nats: Nats, engine: str) -> None:
        self.nats = nats
        self._address = urlsplit(engine)
        self.idle: list[Upstream] = []

    def take(self, subject: bytes, reply: bytes, headers: bytes, body: bytes) -> None:
        """Take the lease, then ask."""
        asked = orjson.loads(body) | {"model": "mock", "stream": True, "stream_options": {"include_usage": True}}
        answer = Answer(self, subject.split(b".")[2], reply, orjson.dumps(asked))
        self.nats.store(b"cf.out.%b.lease.main" % answer.turn, b"smallest", b"Nats-Expected-Last-Subject-Sequence: 0\r\n", answer.leased)

    def ask(self, answer: "Answer") -> None:
        """Ask over a connection that is idle, or a new one."""
        if self.idle:
            self.idle.pop().ask(answer)
        else:
            answer.opening = asyncio.get_running_loop().create_task(self._connect(answer))

    async def _connect(self, answer: "Answer") -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self), self._address.hostname, self._address.port)
        upstream.ask(answer)


class Answer:
    """An answer on its way: one batch at a time, and what comes meanwhile leaves together."""

    def __init__(self, caller: Caller, turn: bytes, work: bytes, body: bytes) -> None:
        self.turn, self.body = turn, body
        self.opening: asyncio.Task[None] | None = None
        self._caller, self._work = caller, work
        self._fence = b""
        self._lines: list[bytes] = []
        self._away = self._over = False

    def leased(self, sequence: int) -> None:
        """It is ours."""
        self._fence = _fence(self.turn, sequence)
        self._caller.ask(self)

    def say(self, lines: list[bytes], over: bool) -> None:
        """Say *lines*; when it is *over* they are the last."""
        self._lines += lines
        self._over = over
        if self._lines and not self._away:
            self._leave()

    def _leave(self) -> None:
        self._away = True
        self._caller.nats.store(b"cf.out.%b.data.main" % self.turn, b"\n".join(self._lines), self._fence, self._stored)
        self._lines = []

    def _stored(self, sequence: int) -> None:
        self._away = False
        if self._lines:
            self._leave()
        elif self._over:
            self._caller.nats.say(b"cf.log.%b.caller" % self.turn, b'{"model":"mock"}')
            self._caller.nats.say(self._work, b"+ACK")


class Upstream(asyncio.Protocol):
    """A connection to the engine: one answer after the other."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._answer: Answer | None = None
        self._rest = b""
        self._tokens = 0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport

    def ask(self, answer: Answer) -> None:
        """Ask for *answer*."""
        self._answer, self._rest, self._tokens = answer, b"", 0
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(answer.body) + answer.body)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        data, at = self._rest + data, 0
        lines, over = [], False
        for match in _FRAME.finditer(data):
            at = match.end()
            if over := match[1] == b"[DONE]":
                lines.append(b"%b%d}" % (_DONE, self._tokens))
                break
            choices = orjson.loads(match[1])["choices"]
            if choices and (text := choices[0]["delta"].get("content")):
                self._tokens += 1
                lines.append(b"%b%b}" % (_TOKEN, orjson.dumps(text)))
        self._rest = data[at:]
        if self._answer is not None:
            self._answer.say(lines, over)
        if over:
            self._answer = None
            self._caller.idle.append(self)


def _fence(turn: bytes, sequence: int) -> bytes:
    return (
        b"Nats-Expected-Last-Subject-Sequence: %d\r\nNats-Expected-Last-Subject-Sequence-Subject: cf.out.%b.lease.main\r\n"
        % (sequence, turn)
    )  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


async def edge(broker: str, ready: Path) -> None:
    """Serve; *ready* tells where."""
    nats = await Nats.connect("edge", broker)
    server = await asyncio.get_running_loop().create_server(lambda: Client(nats), "127.0.0.1", 0)
    written = ready.with_suffix(".part")
    written.write_text(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}))
    written.rename(ready)
    await nats.lost
    server.close()


async def workers(broker: str, engine: str) -> None:
    """Router and caller, as `make up` has them in one process too."""
    routing, calling = await Nats.connect("router", broker), await Nats.connect("caller", broker)
    routing.pull("CF_WORK_ROUTER", "router", Router(routing).take)
    calling.pull("CF_WORK_CALL", "caller-mock", Caller(calling, engine).take)
    await asyncio.wait([routing.lost, calling.lost], return_when=asyncio.FIRST_COMPLETED)


def up(engine: str, ready: str) -> None:
    """Broker, streams, workers, edge, until SIGTERM."""
    home = Path(ready).parent
    fleet = home / "fleet.toml"
    fleet.write_text(f'[[experts]]\nname = "mock"\nurls = ["{engine}/v1"]\n')
    with ExitStack() as stack, EmbeddedBroker(home / "nats", config=_ROOT / "nats.conf") as broker:
        own = {"CAPIBARA_FLEET__FILE": str(fleet), "CAPIBARA_WORKER__ACK_WAIT_SECONDS": "600"}  # there are no heartbeats
        environment = os.environ | broker.environment() | own
        subprocess.run([sys.executable, "-m", "capibara_flow", "streams", "apply"], env=environment, check=True)
        children: list[subprocess.Popen[bytes]] = []
        for words in (["workers", broker.url, engine], ["edge", broker.url, ready]):
            children.append(subprocess.Popen([sys.executable, "-m", "tests.bench.smallest", *words], env=environment))
            stack.callback(children[-1].kill)
        while all(child.poll() is None for child in children) and not signal.sigtimedwait(_STOPPING, 1):
            pass


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "up":
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        up(*rest)
    else:
        uvloop.run(edge(rest[0], Path(rest[1])) if what == "edge" else workers(*rest))
