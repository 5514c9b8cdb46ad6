"""``POST /api/router/test``: who would answer, and why; what cannot be served is refused as a turn would be."""

from typing import Any

import pytest

from capibara_flow.errors import BrokerUnavailable
from tests.edge.serving import client
from tests.fakes import FakeTurns


async def asked(turns: FakeTurns, body: Any) -> tuple[int, dict[str, Any]]:
    async with client(turns) as session, session.post("/api/router/test", json=body) as response:
        return response.status, await response.json(content_type=None)


async def test_it_tells_the_decision_and_opens_no_turn() -> None:
    turns = FakeTurns()
    status, decision = await asked(turns, {"query": "¿y en Java?"})
    assert status == 200
    assert set(decision) == {"model_id", "route_name", "complexity", "confidence", "reasoning"}
    assert [request.question for request in turns.previewed] == ["¿y en Java?"]
    assert turns.opened == []


async def test_a_conversation_is_looked_at_as_a_whole() -> None:
    turns = FakeTurns()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert (await asked(turns, {"messages": messages, "model": "auto"}))[0] == 200
    assert len(turns.previewed[0].messages) == 3


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "give either 'query' or 'messages'"),
        ({"query": "a", "messages": [{"role": "user", "content": "a"}]}, "give either"),
        ({"query": 7}, "query"),
        ({"messages": []}, "messages"),
        ({"query": "a", "temperature": 1}, "temperature"),
    ],
)
async def test_what_cannot_be_read_is_refused(body: Any, word: str) -> None:
    status, problem = await asked(FakeTurns(), body)
    assert (status, word in problem["detail"]) == (400, True)


async def test_an_unknown_expert_is_told_as_for_a_turn() -> None:
    status, problem = await asked(FakeTurns(), {"query": "a", "model": "nobody"})
    assert (status, "no expert is called 'nobody'" in problem["detail"]) == (404, True)


async def test_without_a_router_it_says_so() -> None:
    status, problem = await asked(FakeTurns(refusal=BrokerUnavailable("nobody is there who can route")), {"query": "a"})
    assert (status, problem["detail"]) == (503, "nobody is there who can route")
