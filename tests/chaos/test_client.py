"""The client of the chaos runs, against doors that break off, lie still and come back."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from tests.chaos.client import Client, Story
from tests.chaos.plan import PREFILLER, Ask

ASK = Ask(1, 3, PREFILLER, 0)
Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """Plays a list of responses, whatever is asked, and remembers what that was."""

    def __init__(self) -> None:
        self.plays: list[Answering] = []
        self.asked: list[tuple[str, str, dict[str, str]]] = []

    async def take(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path, dict(request.headers)))
        return await self.plays.pop(0)(request)


def stream(*events: tuple[str, dict[str, object], str], breaks: bool = False) -> Answering:
    async def play(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Capibara-Turn": "T"})
        await response.prepare(request)
        for name, data, number in events:
            ident = f"id: {number}\n" if number else ""
            await response.write(f"{ident}event: {name}\ndata: {json.dumps(data)}\n\n".encode())
        if breaks:
            assert request.transport
            request.transport.abort()
        return response

    return play


def refuses(status: int) -> Answering:
    async def play(_: web.Request) -> web.StreamResponse:
        return web.json_response({"title": "no"}, status=status)

    return play


async def breaks(request: web.Request) -> web.StreamResponse:
    assert request.transport
    request.transport.abort()
    return web.Response()


def token(text: str, number: str = "") -> tuple[str, dict[str, object], str]:
    return "token", {"text": text}, number


DONE = ("done", {"finish_reason": "stop"}, "9")


@pytest.fixture
def door() -> Door:
    return Door()


async def live(door: Door, *plays: Answering, ask: Ask = ASK) -> Story:
    door.plays = list(plays)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", door.take)
    async with TestServer(app, host="127.0.0.1") as server, ClientSession() as session:
        return await Client(session, lambda: [str(server.make_url("")).rstrip("/")], 30).live(ask)


async def test_an_answer_comes_in_one_piece(door: Door) -> None:
    story = await live(door, stream(token("1 "), token("2 ", "5"), token("3 ", "6"), DONE))
    assert (story.text, story.end, story.failed, story.turn, len(story.arrivals)) == ("1 2 3 ", "stop", False, "T", 3)


async def test_a_broken_connection_goes_on_behind_the_last_event_that_has_an_id(door: Door) -> None:
    broken = stream(token("1 ", "5"), token("2 "), breaks=True)
    story = await live(door, broken, breaks, refuses(503), stream(token("2 "), token("3 ", "7"), DONE))
    assert (story.text, story.end) == ("1 2 3 ", "stop")
    assert [(method, path, headers.get("Last-Event-ID")) for method, path, headers in door.asked] == [
        ("POST", "/api/chat", None),
        *[("GET", "/api/chat/T/events", "5")] * 3,
    ]


async def test_whoever_does_not_know_the_turn_asks_again_under_the_same_key(door: Door) -> None:
    story = await live(door, breaks, refuses(503), stream(token("1 2 3 ", "5"), DONE))
    assert (story.text, story.end) == ("1 2 3 ", "stop")
    assert [method for method, _, _ in door.asked] == ["POST"] * 3
    assert len({headers["Idempotency-Key"] for _, _, headers in door.asked}) == 1


async def test_a_reset_takes_the_text_back(door: Door) -> None:
    story = await live(door, stream(token("1 ", "5"), ("reset", {"reason": "r"}, "6"), token("1 2 3 ", "7"), DONE))
    assert (story.text, story.resets) == ("1 2 3 ", 1)


@pytest.mark.parametrize("play", [refuses(404), stream(("error", {"title": "t", "detail": "d"}, "5"))])
async def test_a_refusal_and_an_error_are_ends(door: Door, play: Answering) -> None:
    story = await live(door, play)
    assert story.failed
    assert story.end


async def test_a_client_cancels_until_that_is_taken(door: Door) -> None:
    async def lasts(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Capibara-Turn": "T"})
        await response.prepare(request)
        while len(door.asked) < 3:
            await response.write(b'id: 1\nevent: token\ndata: {"text": ""}\n\n')
        await response.write(b'id: 2\nevent: done\ndata: {"finish_reason": "cancelled"}\n\n')
        return response

    story = await live(door, lasts, refuses(503), refuses(202), ask=Ask(1, 3, PREFILLER, 0, "cancel", 0))
    assert [method for method, _, _ in door.asked] == ["POST", "DELETE", "DELETE"]
    assert (story.end, story.stopped is not None) == ("cancelled", True)


async def test_a_client_leaves_in_the_middle_and_may_look_later(door: Door) -> None:
    async def hangs(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Capibara-Turn": "T"})
        await response.prepare(request)
        while True:
            await response.write(b": alive\n\n")

    story = await live(door, hangs, ask=Ask(1, 3, PREFILLER, 0, "leave", 0.2))
    assert (story.end, story.failed, story.stopped is not None) == ("", False, True)


async def test_an_end_that_comes_before_the_reply_to_cancelling_counts_as_obeyed(door: Door) -> None:
    asked, said = asyncio.Event(), asyncio.Event()

    async def ends(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Capibara-Turn": "T"})
        await response.prepare(request)
        await response.write(b'id: 1\nevent: token\ndata: {"text": ""}\n\n')
        await asked.wait()
        await response.write(b'id: 2\nevent: done\ndata: {"finish_reason": "cancelled"}\n\n')
        await response.write_eof()
        said.set()
        return response

    async def replies_late(_: web.Request) -> web.StreamResponse:
        asked.set()
        await said.wait()
        await asyncio.sleep(0.2)
        return web.json_response({}, status=202)

    story = await live(door, ends, replies_late, ask=Ask(1, 3, PREFILLER, 0, "cancel", 0))
    assert (story.end, story.stopped is not None) == ("cancelled", True)


async def test_an_end_that_nobody_had_asked_for_stays_one(door: Door) -> None:
    ended = stream(("done", {"finish_reason": "cancelled"}, "9"))
    story = await live(door, ended, refuses(202), ask=Ask(1, 3, PREFILLER, 0, "cancel", 0.5))
    assert (story.end, story.stopped) == ("cancelled", None)
    assert [method for method, _, _ in door.asked] == ["POST"]
