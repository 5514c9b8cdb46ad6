"""Looking at turns through the door: whose they are decides, and nothing of a stranger is told."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession

from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.turns import turn_id
from capibara_flow.edge.turns import Wanted, ago, find
from capibara_flow.errors import BadRequest, TurnUnknown
from capibara_flow.settings import AuthSettings, Key
from tests.domain.kept import BEGAN, Kept, passed_on, plain
from tests.edge.serving import client
from tests.fakes import FakeTurns

KEYS = AuthSettings(keys=tuple(Key(key=f"sk-{name}-0001", principal=name, tenant=name) for name in ("acme", "umbrella")))


def key(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{tenant}-0001"}


def own(number: int, tenant: str = "acme") -> Kept:
    """A turn of *tenant* that is yet to be told."""
    kept = Kept(turn=turn_id(milliseconds=int(BEGAN * 1000), entropy=number.to_bytes(10, "big"), tenant=tenant), tenant=tenant)
    return kept.wait(number)


def keeping(*turns: Kept) -> FakeTurns:
    fake = FakeTurns()
    fake.entries = [entry for kept in turns for entry in kept.entries]
    return fake


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    """A door with four turns of acme's behind it, and one of a stranger."""
    turns = [plain(own(1)), passed_on(own(2)), plain(own(3), expert="two"), own(4).asked().routed(), plain(own(5, "umbrella"))]
    async with client(keeping(*turns), auth=KEYS) as session:
        yield session


async def listed(session: ClientSession, tenant: str = "acme", **query: str) -> list[str]:
    async with session.get("/api/turns", params=query, headers=key(tenant)) as response:
        assert response.status == 200
        return [each["turn"] for each in (await response.json())["turns"]]


async def test_a_tenant_sees_its_own_turns_the_newest_first(session: ClientSession) -> None:
    assert await listed(session) == [own(number).turn for number in (4, 3, 2, 1)]
    assert await listed(session, "umbrella") == [own(5, "umbrella").turn]


async def test_turns_are_chosen_by_expert_and_outcome_and_so_many(session: ClientSession) -> None:
    assert await listed(session, expert="two") == [own(number).turn for number in (3, 2)]
    assert await listed(session, outcome="running") == [own(4).turn]
    assert await listed(session, expert="two", outcome="stop", limit="1") == [own(3).turn]
    assert await listed(session, since="1s") == []


async def test_more_turns_than_are_wanted_is_told(session: ClientSession) -> None:
    for limit, more in ((3, True), (4, False)):
        async with session.get("/api/turns", params={"limit": str(limit)}, headers=key("acme")) as response:
            assert (await response.json())["more"] is more


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-nobody"}])
async def test_who_brings_no_key_lists_nothing(session: ClientSession, headers: dict[str, str]) -> None:
    async with session.get("/api/turns", headers=headers) as response:
        assert response.status == 401
        assert (await response.json(content_type=None))["title"] == "unauthorized"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=many", "limit=٣", "since=yesterday", "since=-1h", "since="])
async def test_a_query_that_makes_no_sense_is_refused(session: ClientSession, query: str) -> None:
    async with session.get(f"/api/turns?{query}", headers=key("acme")) as response:
        assert response.status == 400
        assert query.split("=", maxsplit=1)[0] in (await response.json(content_type=None))["detail"]


async def test_a_turn_is_told_as_json(session: ClientSession) -> None:
    async with session.get(f"/api/turns/{own(2).turn}", headers=key("acme")) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        told = await response.json()
    assert (told["outcome"], told["totals"]["passed_on"], told["question"]) == ("stop", 1, "count to five")
    assert [stage["name"] for stage in told["stages"] if stage["kind"] == "attempt"] == ["one", "two"]


@pytest.mark.parametrize(
    ("query", "headers", "kind", "holds"),
    [
        ("?format=svg", {}, "image/svg+xml", "<svg"),
        ("?format=html", {}, "text/html", "Stages"),
        ("", {"Accept": "text/html,*/*;q=0.8", "Accept-Language": "de, es-CO;q=0.9"}, "text/html", "Etapas"),
        ("", {"Accept": "image/svg+xml"}, "image/svg+xml", "<svg"),
        ("?format=json", {"Accept": "text/html"}, "application/json", '"stages"'),
        ("", {"Accept": "*/*"}, "application/json", '"stages"'),
    ],
)
async def test_a_turn_is_told_in_the_form_that_is_wanted(
    session: ClientSession, query: str, headers: dict[str, str], kind: str, holds: str
) -> None:
    async with session.get(f"/api/turns/{own(1).turn}{query}", headers=key("acme") | headers) as response:
        assert (response.status, response.content_type) == (200, kind)
        assert holds in await response.text()
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["Cache-Control"] == "no-store"


async def test_an_unknown_form_is_refused(session: ClientSession) -> None:
    async with session.get(f"/api/turns/{own(1).turn}?format=pdf", headers=key("acme")) as response:
        assert response.status == 400


@pytest.mark.parametrize("turn", [own(1).turn, own(9, "umbrella").turn, "nonsense", "*"])
async def test_a_stranger_s_turn_and_one_that_is_not_there_look_the_same(session: ClientSession, turn: str) -> None:
    async with session.get(f"/api/turns/{turn}", headers=key("umbrella")) as response:
        assert (response.status, response.content_type) == (404, "application/problem+json")
        assert own(1).turn not in await response.text() or turn == own(1).turn


async def test_what_the_headers_say_counts_beside_the_id() -> None:
    kept = plain(Kept(turn=own(6, "umbrella").turn, tenant="acme"))
    async with client(keeping(kept), auth=KEYS) as session:
        assert await listed(session, "umbrella") == []
        async with session.get(f"/api/turns/{kept.turn}", headers=key("umbrella")) as response:
            assert response.status == 404


async def test_looking_ends_when_enough_has_been_read_or_passed_over() -> None:
    turns = [plain(own(number)) for number in range(40)]
    read: list[str] = []

    async def record(turn: str) -> Record:
        read.append(turn)
        if turn == own(38).turn:
            raise TurnUnknown("it has aged out")
        return next(kept.record for kept in turns if kept.turn == turn)

    def newest() -> AsyncIterator[Entry]:
        return keeping(*turns).newest()

    nobody = Wanted(expert="nobody")
    assert await find(newest(), record, nobody, most_read=16, most_seen=100) == ([], True)
    assert len(read) == 16
    assert await find(newest(), record, Wanted(tenant="umbrella"), most_read=16, most_seen=10) == ([], True)
    found, more = await find(newest(), record, Wanted(limit=100), most_read=100, most_seen=100)
    assert ([each.turn for each in found], more) == ([own(number).turn for number in range(39, -1, -1) if number != 38], False)


def test_how_long_ago_is_read_with_its_unit() -> None:
    assert [ago(text, 1000.0) for text in ("10", "10s", "2m", "1.5s")] == [990, 990, 880, 998.5]
    assert ago("1h", 1000.0) == 1000 - 3600
    assert ago("2d", 0.0) == -172_800
    for wrong in ("", "h", "1w", "1h30m", "１h", "nan", "1e3"):
        with pytest.raises(BadRequest, match="90s, 15m, 1h or 2d"):
            ago(wrong, 0.0)
