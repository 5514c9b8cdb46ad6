"""What each hop of a token takes at least in Python on this machine: ``python -m tests.bench floor``.

A hop's floor is its smallest program: a protocol of uvloop that reads and does nothing, orjson on one frame, a command that is written to a
socket. *alone* is a token that comes by itself, as at a common pace: each one wakes a process, and pays for its system calls.
*together* are as many as ``_TOGETHER`` in one read and one write. The broker's is the real one's, with fence, file storage and one reader.
"""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import uvloop

from capibara_flow import wiring
from capibara_flow.runtime.client import TokenClient, flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.lease import Lease
from capibara_flow.settings import FleetSettings, NatsSettings, Settings

from .scenarios import CPU, Course, Figure, Measured, Value
from .system import CAPIBARA, ROOT, System, cpu_seconds

ALONE, TOGETHER = "alone", "together"
_TOGETHER = 16
_GAP = 0.0004  # seconds: 2,500 tokens a second, as in `paced`
_STREAMS = 50
#: Which hops are whose; an acknowledgement is one more read.
_PARTS = {"workers": ("read", "parse", "publish", "ack"), "broker": ("broker",), "edge": ("deliver", "write")}

FRAME = (
    b'data: {"id":"chatcmpl-load-12-0","object":"chat.completion.chunk","created":1795000000,"model":"mock","choices":[{"index":0,'
    b'"delta":{"content":"12:123456789012345 "},"logprobs":null,"finish_reason":null}]}\n\n'
)
LINE = b'{"turn":"01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F","event":"token","text":"12:123456789012345 "}'
_FENCE = (
    b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: 123\r\n"
    b"Nats-Expected-Last-Subject-Sequence-Subject: cf.out.01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F.lease.main\r\n\r\n"
)
_SENT = b"HPUB cf.out.01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F.data.main _INBOX_caller.abc.1 %d %d\r\n%b%b\r\n" % (
    len(_FENCE), len(_FENCE) + len(LINE), _FENCE, LINE,
)  # fmt: skip
_LIVE = (
    b"NATS/1.0\r\nNats-Stream: CF_OUT\r\nNats-Subject: cf.out.01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F.data.main\r\n"
    b"Nats-Sequence: 1234567\r\nNats-Last-Sequence: 1234517\r\n\r\n"
)
_GOT = b"HMSG cf.live.01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F.main 12 %d %d\r\n%b%b\r\n" % (len(_LIVE), len(_LIVE) + len(LINE), _LIVE, LINE)
_HMSG = re.compile(rb"HMSG (\S+) (\d+) (\d+) (\d+)\r\n")


@dataclass(frozen=True)
class Floor(Course):
    """The floors of all hops, and their sums."""

    tokens: int = 10_000

    def quick(self) -> "Floor":
        """With a tenth of the tokens."""
        return replace(self, tokens=self.tokens // 10)

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """CPU (us) a token of each hop, alone and together."""
        command = [sys.executable, "-m", "tests.bench.floor", str(self.tokens)]
        said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True).stdout
        return Measured(list(summed(orjson.loads(said))))


def summed(hops: Mapping[str, float]) -> list[Value]:
    """*hops* (``HOP/alone`` and ``HOP/together``, us) with the sum of each process, and of all."""
    values: list[Value] = [(name, "us", cost) for name, cost in hops.items()]
    for how in (ALONE, TOGETHER):
        sums = {part: sum(hops[f"{hop}/{how}"] for hop in its) for part, its in _PARTS.items()}
        values += [(f"sum_{part}/{how}", "us", cost) for part, cost in sums.items()]
        values.append((f"sum/{how}", "us", sum(sums.values())))
    return values


def nearness(values: Mapping[Figure, float]) -> dict[Figure, float]:
    """How many times its floor each part of Capibara takes a token, when both were measured: the paced load against tokens alone."""
    found = {}
    for part in (*_PARTS, ""):
        floor = values.get(Figure("floor", "floor", f"sum{part and f'_{part}'}/{ALONE}", "us"))
        ours = values.get(Figure("paced", CAPIBARA, f"{CPU}{part and f'/{part}'}", "us"))
        if floor and ours:
            found[Figure("floor", CAPIBARA, f"times_floor{part and f'/{part}'}", "ratio")] = ours / floor
    return found


# --- measuring, in a process of its own -------------------------------------------------------------------------


async def measured(tokens: int) -> dict[str, float]:
    """All hops, in us a token."""
    hops: dict[str, float] = {}
    for how, block in ((ALONE, 1), (TOGETHER, _TOGETHER)):
        read = await _reading(tokens, block, FRAME, lambda _: None)
        wrote = await _reading(tokens, block, FRAME, _sending(_SENT))
        got = await _reading(tokens, block, _GOT, lambda _: None)
        passed = await _reading(tokens, block, _GOT, _sending(FRAME))
        hops |= {f"read/{how}": read, f"publish/{how}": max(wrote - read, 0.0), f"ack/{how}": read}
        hops |= {f"parse/{how}": _timed(_parse), f"deliver/{how}": got + _timed(_understand), f"write/{how}": max(passed - got, 0.0)}
        hops[f"broker/{how}"] = await _broker(tokens, block)
    return hops


def _timed(call: Callable[[], object], times: int = 20_000) -> float:
    call()
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) * 1e6 / times


def _parse() -> str:
    """One frame of an engine: its words."""
    head, _, _ = FRAME.rpartition(b"\n\n")
    words: str = orjson.loads(head[6:])["choices"][0]["delta"]["content"]
    return words


def _understand() -> bytes:
    """One message of the broker: a chunk for the client."""
    found = _HMSG.match(_GOT)
    assert found
    begin = found.end() + int(found[3])
    line = _GOT[begin : found.end() + int(found[4])]
    start = _LIVE.rindex(b"Nats-Sequence: ") + 15
    return b"id: %d\n%b%b}\n\n" % (int(_LIVE[start : _LIVE.index(b"\r\n", start)]), FRAME[:120], line[60:])


class _Reader(asyncio.Protocol):
    """Counts bytes, and hands on how many whole frames have come."""

    def __init__(self, size: int, wanted: int, take: Callable[[int], None]) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._size, self._left, self._rest, self._take = size, size * wanted, 0, take

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        frames, self._rest = divmod(self._rest + len(data), self._size)
        self._take(frames)
        self._left -= len(data)
        if self._left <= 0 and not self.over.done():
            self.over.set_result(None)


def _sending(command: bytes) -> Callable[[int], Any]:
    """Writes *command* to the loop's drain for each frame that has come."""

    def send(frames: int) -> None:
        _DRAIN[0].write(command * frames)

    return send


_DRAIN: list[asyncio.WriteTransport] = []


async def _reading(tokens: int, block: int, frame: bytes, take: Callable[[int], None]) -> float:
    """CPU (us) of this process a token of *tokens*, which come from another process in blocks of *block* and are given to *take*."""
    loop = asyncio.get_running_loop()
    readers: list[_Reader] = []

    def reader() -> _Reader:
        readers.append(_Reader(len(frame), tokens, take))
        return readers[-1]

    server = await loop.create_server(reader, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    child = await _child("drip", str(port), str(tokens), str(block), str(_GAP), frame.hex())
    await _until(lambda: bool(readers))
    began = time.process_time()
    await readers[0].over
    took = time.process_time() - began
    await child.wait()
    server.close()
    return took * 1e6 / tokens


async def _child(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.drip", *words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  it is counted from outside
        await asyncio.sleep(0.001)


async def _broker(tokens: int, block: int) -> float:
    """CPU (us) of a real broker a token: fenced, stored in a file, acknowledged, and passed on to one reader; *block* at a time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, _embedded(Path(home)) as broker:
        settings = _settings(broker, Path(home, "fleet.toml"))
        await wiring.apply_streams(settings)
        async with AsyncExitStack() as stack:
            caller = await stack.enter_async_context(wiring.connected(settings, "caller"))
            door = await stack.enter_async_context(wiring.connected(settings, "edge"))
            streams = _Streams(caller, door)
            await streams.open()
            before = cpu_seconds(broker.pid or 0)
            await _reading(tokens, block, FRAME, streams.say)
            async with asyncio.timeout(30):
                await _until(lambda: streams.heard >= tokens and streams.acknowledged >= tokens)
            return (cpu_seconds(broker.pid or 0) - before) * 1e6 / tokens


class _Streams:
    """Answers under way, whose tokens *caller* says in turn, and *door* hears."""

    def __init__(self, caller: TokenClient, door: TokenClient) -> None:
        self.heard = self.acknowledged = 0
        self._caller, self._door = caller, door
        self._inbox = caller.new_inbox()
        self._said = 0
        self._fences: list[tuple[str, bytes]] = []

    async def open(self) -> None:
        """Take the leases, and listen."""
        await self._caller.listen(self._inbox, self._acknowledge)
        for turn in (f"floor{number}" for number in range(_STREAMS)):
            await self._door.listen(f"cf.live.{turn}.main", self._hear)
            lease = Lease(self._caller, f"cf.out.{turn}.lease.main", turn)
            await lease.take()
            self._fences.append((f"cf.out.{turn}.data.main", lease.condition))
        await flushed(self._door)

    def say(self, count: int) -> None:
        """Say *count* tokens, each in another answer."""
        for _ in range(count):
            subject, fence = self._fences[self._said % _STREAMS]
            self._said += 1
            self._caller.send(subject, LINE, reply=self._inbox, headers=fence)

    def _hear(self, *_: bytes) -> None:
        self.heard += 1

    def _acknowledge(self, *_: bytes) -> None:
        self.acknowledged += 1


def _embedded(home: Path) -> EmbeddedBroker:
    return EmbeddedBroker(home / "nats", config=ROOT / "nats.conf")


def _settings(broker: EmbeddedBroker, fleet: Path) -> Settings:
    fleet.write_text('[[experts]]\nname = "mock"\nurls = ["http://127.0.0.1:9/v1"]\n')
    return Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords), fleet=FleetSettings(file=fleet))


async def _measure(tokens: int) -> None:
    loop = asyncio.get_running_loop()
    drain = await _child("drain")
    assert drain.stdout is not None
    port = int(await drain.stdout.readline())
    transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
    _DRAIN.append(transport)
    print(json.dumps(await measured(tokens)))
    transport.close()
    await drain.wait()


if __name__ == "__main__":
    uvloop.run(_measure(int(sys.argv[1])))
