"""Usage through the door: only the asker's own, for a span that makes sense, and words of whoever cannot tell it."""

from collections.abc import AsyncIterator
from datetime import date

import pytest
from aiohttp import ClientSession

from capibara_flow.edge.usage import moment, span
from capibara_flow.errors import BadRequest
from capibara_flow.settings import AuthSettings, Key
from tests.edge.serving import client
from tests.fakes import FakeTurns
from topics.message import Refusal
from topics.usage import ReadUsage, UsageDay, UsageListing

KEYS = AuthSettings(keys=tuple(Key(key=f"sk-{name}-0001", principal=name, tenant=name) for name in ("acme", "umbrella")))
DAYS = tuple(
    UsageDay(day=date(2026, 11, day), tenant="acme", expert="one", answers=2, prompt_tokens=3, completion_tokens=5) for day in (1, 2)
)
NOW = 1_793_000_000.0


@pytest.fixture
def turns() -> FakeTurns:
    """Turns with an accountant beside them."""
    fake = FakeTurns()
    fake.replies[ReadUsage] = UsageListing(days=DAYS, waiting=1)
    return fake


@pytest.fixture
async def session(turns: FakeTurns) -> AsyncIterator[ClientSession]:
    async with client(turns, auth=KEYS) as session:
        yield session


def key(tenant: str = "acme") -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{tenant}-0001"}


async def test_a_tenant_reads_its_own_usage_and_nobody_else_s(session: ClientSession, turns: FakeTurns):
    async with session.get("/api/usage?tenant=umbrella&since=2d", headers=key()) as response:
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        told = await response.json()
    assert told["days"][0] == {
        "day": "2026-11-01",
        "tenant": "acme",
        "expert": "one",
        "answers": 2,
        "prompt_tokens": 3,
        "completion_tokens": 5,
    }
    assert (told["total"], told["waiting"], told["more"]) == ({"answers": 4, "prompt_tokens": 6, "completion_tokens": 10}, 1, False)
    [asked] = turns.requests
    assert isinstance(asked, ReadUsage)
    assert asked.tenant == "acme"
    assert round(asked.until - asked.since) == 2 * 86400


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-nobody"}])
async def test_who_brings_no_key_reads_nothing(session: ClientSession, turns: FakeTurns, headers: dict[str, str]):
    async with session.get("/api/usage", headers=headers) as response:
        assert (response.status, response.content_type) == (401, "application/problem+json")
    assert turns.requests == []


@pytest.mark.parametrize("query", ["since=yesterday", "since=", "until=2026-13-01", "since=1d&until=2d", "until=2026-02-30", "since=٣d"])
async def test_a_span_that_makes_no_sense_is_refused(session: ClientSession, turns: FakeTurns, query: str):
    async with session.get(f"/api/usage?{query}", headers=key()) as response:
        assert response.status == 400
        assert query.split("=", maxsplit=1)[0] in (await response.json(content_type=None))["detail"]
    assert turns.requests == []


async def test_who_cannot_tell_it_says_why(session: ClientSession, turns: FakeTurns):
    turns.replies[ReadUsage] = UsageListing(refused=Refusal(title="store unavailable", detail="it is away", status=503, retryable=True))
    async with session.get("/api/usage", headers=key()) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert (await response.json(content_type=None))["detail"] == "it is away"
    del turns.replies[ReadUsage]
    async with session.get("/api/usage", headers=key()) as response:
        assert response.status == 503
        assert "capibara worker accountant" in (await response.json(content_type=None))["detail"]


def test_a_span_is_days_or_so_long_ago():
    assert span({}, NOW) == (NOW - 7 * 86400, NOW)
    assert span({"since": "1970-01-02", "until": "1970-01-03"}, NOW) == (86400.0, 172800.0)
    assert span({"since": "2h", "until": "1h"}, NOW) == (NOW - 7200, NOW - 3600)
    assert moment("since", "999999999d", NOW) == 0.0
    with pytest.raises(BadRequest, match=r"until: 'x{40}' is neither"):
        moment("until", "x" * 1000, NOW)
