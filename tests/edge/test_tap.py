"""The door in front of a feed that it taps: clients that do not read, and clients that leave."""

import asyncio
import gc
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiohttp import ClientPayloadError, ClientSession, web
from aiohttp.test_utils import TestServer
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from capibara_flow.domain.turns import turn_id
from capibara_flow.edge.sse import Stream, opened
from capibara_flow.ports import Batch
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.turns import Follower, NatsTurns
from capibara_flow.settings import EdgeSettings
from tests.edge.client import events
from tests.edge.serving import T, client, served
from tests.runtime.memory import MemoryClient
from tests.waiting import until
from topics.output import Done, Output, Reset, Token

NATIVE: tuple[str, dict[str, Any]] = ("/api/chat", {"message": "hello"})
OPENAI: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "stream": True})
DIALECTS = [pytest.param(*NATIVE, id="native"), pytest.param(*OPENAI, id="openai")]
DONE = Done(turn=T, finish_reason="stop", model_id="plain")


def follower_of(memory: MemoryClient) -> Follower:
    """Who listens to the live feed."""
    return cast(Follower, cast(Any, memory.ears[0].hear).__self__)


def spied(follower: Follower) -> list[bool]:
    """What becomes, from now on, of the batches that are offered to the tap."""
    take, taken = follower._take, []
    assert take

    def taking(batch: Batch) -> bool:
        taken.append(take(batch))
        return taken[-1]

    follower.tap(taking)
    return taken


def ended() -> float:
    """How many answers were written to their end."""
    return REGISTRY.get_sample_value("capibara_turns_total", {"outcome": "done"}) or 0.0


@dataclass
class Client:
    """An HTTP client that reads only when it is told to, and *memory*, from which the door reads what it is to write."""

    memory: MemoryClient
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    turns: NatsTurns
    said: list[str] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)

    @property
    def follower(self) -> Follower:
        """What reads for this client."""
        return follower_of(self.memory)

    def say(self, *outputs: Output) -> None:
        """Let the door hear *outputs*."""
        turn = self.memory.published[0].split(".")[2]
        self.said += [each.text for each in outputs if isinstance(each, Token)]
        self.memory.say(*(each.model_copy(update={"turn": turn}) for each in outputs))

    async def say_until_stuck(self, size: int = 20_000) -> None:
        """Talk, *size* characters at a time, until nothing more goes out."""
        while len(self.follower._pending) < 50:
            self.say(Token(turn=T, text=f"{len(self.said)} {'x' * size}\n"))
            await asyncio.sleep(0)

    async def read(self) -> str:
        """The body, to its end."""
        async with asyncio.timeout(40):
            return (await self.reader.read(-1)).decode()

    def reset(self) -> None:
        """Leave without a farewell: what is under way to us is an error to whoever sent it."""
        sock = cast(socket.socket, self.writer.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def asked(path: str, body: dict[str, Any], *, cancels: bool = True) -> AsyncIterator[Client]:
    """A client with little room that has asked, and got the headers of its answer."""
    memory = MemoryClient()
    turns = NatsTurns(cast(TokenClient, memory), ())
    async with served(turns, cancels=cancels) as address:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        sent = json.dumps(body).encode()
        # 1.0: the body comes as it is, and ends with the connection.
        writer.write(
            b"POST %s HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(sent)) + sent
        )
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        speaking = Client(memory, reader, writer, turns)
        await until(lambda: memory.ears and speaking.follower._waiting is not None)
        speaking.taken = spied(speaking.follower)
        try:
            yield speaking
        finally:
            writer.transport.abort()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nobody complains, not even when what is left is thrown away."""
    with capture_logs() as logs:
        yield
        gc.collect()
    assert caplog.get_records("call") + caplog.records == []
    assert logs == []


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks of a complete stream of OpenAI's dialect."""
    *lines, end = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    return [json.loads(line) for line in lines]


def words(path: str, text: str) -> list[str]:
    """The texts of a complete stream, token by token."""
    if path == NATIVE[0]:
        *found, done = events(text)
        assert done.name == "done"
        return [each.data["text"] for each in found if each.name == "token"]
    deltas = [choice["delta"] for chunk in chunks(text) for choice in chunk["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def some(count: int) -> Iterable[Token]:
    return (Token(turn=T, text=f"word {number}") for number in range(count))


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_what_arrives_goes_out_without_waking_a_reader(path: str, body: dict[str, Any]) -> None:
    before = ended()
    async with asked(path, body) as client:
        for each in (*some(40), DONE):
            client.say(each)
            await asyncio.sleep(0)
        assert words(path, await client.read()) == client.said
    assert client.taken == [True] * 41
    assert ended() == before + 1
    assert client.memory.asked == 0
    assert not client.memory.ears


@pytest.mark.parametrize(("path", "body"), DIALECTS)
@pytest.mark.parametrize("more", [100, 3000])  # fewer and more than a reader keeps
async def test_a_client_that_does_not_read_for_a_while_gets_everything_in_order(path: str, body: dict[str, Any], more: int) -> None:
    async with asked(path, body) as client:
        client.say(*some(10))
        await client.say_until_stuck()
        assert {True, False} == set(client.taken)
        client.say(*some(more))
        reading = asyncio.create_task(client.read())
        await until(lambda: client.follower._waiting is not None)  # it has caught up, and taps again
        before = len(client.taken)
        client.say(*some(10), DONE)
        assert words(path, await reading) == client.said
        assert client.taken[before:] == [True] * 11
    assert not client.memory.ears


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_who_waits_for_room_behind_a_write_that_waited_too_gets_everything(path: str, body: dict[str, Any]) -> None:
    async with asked(path, body) as client:
        await client.say_until_stuck(100_000)  # so large that each write waits where there is no room, the tapped one first
        client.say(DONE)
        assert words(path, await client.read()) == client.said


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_a_batch_larger_than_all_buffers_is_written_once(path: str, body: dict[str, Any]) -> None:
    async with asked(path, body) as client:
        client.say(Token(turn=T, text="first"), Token(turn=T, text="x" * 12_000_000))
        assert client.taken == [True, True]
        client.say(Token(turn=T, text="behind"), DONE)
        assert words(path, await client.read()) == client.said
        assert client.taken == [True, True, False]


@pytest.mark.parametrize(("path", "body"), DIALECTS)
@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_client_that_leaves_in_mid_answer_ends_the_stream_and_the_feed(
    quiet: None, path: str, body: dict[str, Any], cancels: bool, leave: str
) -> None:
    async with asked(path, body, cancels=cancels) as client:
        client.say(*some(3))
        assert client.taken == [True] * 3
        await client.reader.readuntil(b"word 2")
        client.writer.close() if leave == "close" else client.reset()

        def gone() -> bool:
            if client.memory.ears:
                client.say(*some(1))
            return not client.memory.ears

        await until(gone)
        assert client.turns.facts()["streams_open"] == 0


@pytest.mark.parametrize(("path", "body"), DIALECTS)
@pytest.mark.parametrize("cancels", [True, False])
async def test_a_client_that_leaves_while_we_wait_for_it_is_no_fault(quiet: None, path: str, body: dict[str, Any], cancels: bool) -> None:
    async with asked(path, body, cancels=cancels) as client:
        await client.say_until_stuck()
        client.reset()
        await until(lambda: not client.memory.ears)


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_client_that_leaves_while_nobody_waits_for_it_is_no_fault(quiet: None, cancels: bool) -> None:
    async with asked(*NATIVE, cancels=cancels) as client:
        client.say(Token(turn=T, text="x" * 12_000_000))
        assert client.taken == [True]
        client.reset()

        def gone() -> bool:
            if client.memory.ears:
                client.say(*some(1))
            return not client.memory.ears

        await until(gone)


@pytest.mark.parametrize("path", [NATIVE[0], OPENAI[0]])
async def test_a_whole_answer_is_collected_by_a_tap(path: str) -> None:
    memory = MemoryClient()
    async with client(NatsTurns(cast(TokenClient, memory), ())) as session:
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": False}
        asking = asyncio.create_task(session.post(path, json=body))
        await until(lambda: memory.ears)
        follower = follower_of(memory)
        await until(lambda: follower._waiting is not None)
        taken = spied(follower)
        turn = memory.published[0].split(".")[2]
        memory.deliver(memory.store([Token(turn=turn, text="Hello"), Token(turn=turn, text=" there")]))
        memory.say(Token(turn=turn, text="!"), DONE.model_copy(update={"turn": turn}))
        async with await asking as response:
            answer = await response.json()
    assert (answer["text"] if "text" in answer else answer["choices"][0]["message"]["content"]) == "Hello there!"
    assert taken == [True] * 3
    assert memory.asked == 0
    assert not memory.ears


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_a_batch_that_nobody_can_read_breaks_the_stream_off(path: str, body: dict[str, Any]) -> None:
    memory = MemoryClient()
    async with client(NatsTurns(cast(TokenClient, memory), ())) as session, session.post(path, json=body) as response:
        await until(lambda: memory.ears)
        memory.messages.append(b"no output")
        memory.deliver(0)
        with pytest.raises((ClientPayloadError, ConnectionResetError)):
            await response.text()
        await until(lambda: not memory.ears)


async def test_whoever_gave_up_waiting_for_a_client_does_not_harm_what_is_written_behind() -> None:
    streams: asyncio.Queue[Stream] = asyncio.Queue()
    over = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        async with opened(request, {}, 600, EdgeSettings().max_buffer_bytes) as stream:
            streams.put_nowait(stream)
            await over.wait()
        return stream.response

    app = web.Application()
    app.router.add_get("/", handle)
    large = b": " + b"x" * 12_000_000 + b"\n\n"
    async with TestServer(app, host="127.0.0.1") as server, ClientSession() as session, session.get(server.make_url("/")) as response:
        stream = await streams.get()
        waiting = asyncio.create_task(stream.write(large))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert stream._write_now(large)
        assert len(await response.content.readexactly(2 * len(large))) == 2 * len(large)
        over.set()


async def test_what_a_resuming_client_has_is_not_tapped_again() -> None:
    memory = MemoryClient()
    turn = turn_id(milliseconds=int(time.time() * 1000), entropy=b"0123456789", tenant="anonymous")
    said = [each.model_copy(update={"turn": turn}) for each in (*some(4), DONE)]
    had = [memory.store([each]) for each in said[:2]]
    async with (
        client(NatsTurns(cast(TokenClient, memory), ())) as session,
        session.get(f"/api/chat/{turn}/events", params={"after": memory.sequence(had[-1])}) as response,
    ):
        await until(lambda: len(memory.ears) == 1 and memory.asked == 2)
        follower = follower_of(memory)
        await until(lambda: follower._waiting is not None)
        for place in had:
            memory.deliver(place)
        memory.say(*said[2:])
        found = events(await response.text())
    assert [each.id for each in found] == [str(memory.sequence(place)) for place in (2, 3, 4)]
    assert memory.asked == 2


@pytest.mark.parametrize("after", [15, 99_999_999])
async def test_a_reader_whose_id_lies_behind_the_end_is_not_kept_waiting(after: int) -> None:
    memory = MemoryClient()
    turn = turn_id(milliseconds=int(time.time() * 1000), entropy=b"0123456789", tenant="anonymous")
    memory.store([Token(turn=turn, text="Hello")])
    memory.store([DONE.model_copy(update={"turn": turn})])
    async with (
        client(NatsTurns(cast(TokenClient, memory), ())) as session,
        asyncio.timeout(20),
        session.get(f"/api/chat/{turn}/events", params={"after": after}) as response,
    ):
        assert (response.status, await response.text()) == (200, "")
    assert memory.asked == 1


async def test_a_reader_whose_id_lies_in_the_future_learns_when_its_turn_ends() -> None:
    memory = MemoryClient()
    turn = turn_id(milliseconds=int(time.time() * 1000), entropy=b"0123456789", tenant="anonymous")
    memory.store([Token(turn=turn, text="Hello")])
    async with (
        client(NatsTurns(cast(TokenClient, memory), ())) as session,
        asyncio.timeout(20),
        session.get(f"/api/chat/{turn}/events", params={"after": 99_999_999}) as response,
    ):
        await until(lambda: len(memory.ears) == 1 and memory.asked and follower_of(memory)._waiting is not None)
        memory.say(*(each.model_copy(update={"turn": turn}) for each in (*some(4), DONE)))
        assert await response.text() == ""
    assert not memory.ears


async def test_words_taken_back_end_a_tapped_stream_of_openai_s_but_not_its_turn() -> None:
    async with asked(*OPENAI) as client:
        client.say(*some(3), Reset(turn=T, reason="again"), *some(3), DONE)
        *_, last = (await client.read()).strip().splitlines()
        assert '"code":"answer_reset"' in last
        await until(lambda: not client.memory.ears)
        assert not client.memory.published[1:]


@pytest.mark.parametrize("room", [4096, 1024 * 1024])
async def test_a_writer_waits_once_a_client_has_so_much_to_take(room: int) -> None:
    waiting: asyncio.Queue[int] = asyncio.Queue()

    async def handle(request: web.Request) -> web.StreamResponse:
        async with opened(request, {}, 600, room) as stream:
            while stream._roomy:
                assert stream._write_now(b": " + b"x" * 1000 + b"\n\n")
            assert request.transport
            waiting.put_nowait(request.transport.get_write_buffer_size())
            await stream.write(b"x")
        return stream.response

    app = web.Application()
    app.router.add_get("/", handle)
    async with TestServer(app, host="127.0.0.1") as server, ClientSession() as session, session.get(server.make_url("/")) as response:
        assert room <= await waiting.get() < room + 2000
        await response.read()
