"""What the door keeps while an answer is streamed: not what was asked, which may weigh megabytes."""

import gc

import pytest
from aiohttp import web

from capibara_flow.edge.bodies import ChatBody, CompletionBody
from capibara_flow.settings import EdgeSettings
from tests.edge.serving import ROUTED, client
from tests.fakes import FakeTurns

LONG = "Why is the sky blue? " * 1000
ASKED = [
    ("/api/chat", {"messages": [{"role": "user", "content": LONG}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_what_was_asked_is_not_kept_while_it_is_answered(path: str, body: dict[str, object]) -> None:
    async with client(FakeTurns([ROUTED])) as session, session.post(path, json=body) as response:
        assert await response.content.readany()
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, ChatBody | CompletionBody | web.Request)]
    assert [type(each) for each in kept] == [web.Request]
    assert kept[0]._read_bytes is None


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_a_body_is_measured_as_it_comes(path: str, body: dict[str, object]) -> None:
    turns = FakeTurns()
    async with client(turns, EdgeSettings(max_body_bytes=10_000)) as session, session.post(path, json=body) as response:
        assert response.status == 413
        assert "larger than 10000 bytes" in await response.text()
    assert not turns.opened
