"""What the door keeps while an answer is streamed: not what was asked, which may weigh megabytes."""

import gc

import pytest
from aiohttp import web

from capibara_flow.edge.bodies import ChatBody, CompletionBody
from capibara_flow.settings import EdgeSettings
from tests.edge.serving import ROUTED, T, client
from tests.fakes import FakeTurns
from topics.output import Token

LONG = "Why is the sky blue? " * 1000
ASKED = [
    ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "stream": True}),
]


def asked() -> list[object]:
    """Every request, and every body of one, that is still in memory."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, ChatBody | CompletionBody | web.Request)]


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_what_was_asked_is_not_kept_while_it_is_answered(path: str, body: dict[str, object]) -> None:
    before = asked()  # what other tests left, held, lest a new one takes its place
    async with client(FakeTurns([ROUTED], [Token(turn=T, text="Because")])) as session, session.post(path, json=body) as response:
        assert await response.content.readany()
        kept = [each for each in asked() if not any(each is other for other in before)]
    assert [type(each) for each in kept] == [web.Request]
    assert kept[0]._read_bytes is None


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_a_body_is_measured_as_it_comes(path: str, body: dict[str, object]) -> None:
    turns = FakeTurns()
    async with client(turns, EdgeSettings(max_body_bytes=20_000)) as session, session.post(path, json=body) as response:
        assert response.status == 413
        assert "larger than 20000 bytes" in await response.text()
    assert not turns.opened
