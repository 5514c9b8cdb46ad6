"""One suite for every list of documents: the fake, PostgreSQL of our own, PostgreSQL with TimescaleDB in a container."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capibara_flow.engines.postgres.documents import PostgresDocuments
from capibara_flow.ports import Documents
from tests.engines.postgres_servers import connected, fresh, timescale
from tests.fakes_knowledge import FakeDocuments
from tests.runtime.container import missing
from topics.knowledge import Document, Scope

HERE, THERE = Scope("ana"), Scope("berta")
WHEN = datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=UTC)
KINDS = ("fake", "embedded", pytest.param("timescale", marks=[pytest.mark.docker, pytest.mark.timeout(900)]))


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server, one for all tests; of the fake there is none."""
    if request.param == "timescale" and (reason := missing()):
        pytest.skip(f"no Docker engine answers, so the suite ran without TimescaleDB: {reason}")
    if request.param == "timescale":
        with timescale() as url:
            yield url
    else:
        yield "" if request.param == "fake" else request.getfixturevalue("postgres").url


@pytest.fixture
async def documents(server: str) -> AsyncIterator[Documents]:
    if not server:
        yield FakeDocuments()
        return
    async with fresh(server) as url, connected(url) as database:
        yield PostgresDocuments(database)


def document(id: str = "1", scope: Scope = HERE, **fields: Any) -> Document:
    usual = {"title": "Title", "address": "/a/b.md", "digest": "d" * 64, "language": "es", "updated": WHEN}
    return Document(id=id, scope=scope, **usual | fields)


async def test_a_document_can_be_found_from_when_it_is_ready_to_when_it_leaves(documents: Documents):
    one = document(passages=3, owner="ana")
    assert await documents.begin(document()) is None
    assert await documents.find(HERE, "1") is None
    assert await documents.same(HERE, one.digest) is None
    assert await documents.unfinished() == [document()]
    await documents.ready(one)
    assert await documents.find(HERE, "1") == await documents.same(HERE, one.digest) == one
    assert (await documents.listed(HERE, 5), await documents.unfinished()) == ([one], [])
    assert await documents.leaving(HERE, "1") == one
    assert (await documents.find(HERE, "1"), await documents.listed(HERE, 5), await documents.unfinished()) == (None, [], [one])
    await documents.gone(HERE, "1")
    assert (await documents.unfinished(), await documents.scopes(), await documents.leaving(HERE, "1")) == ([], [], None)


async def test_who_begins_again_learns_what_was_ready_before_once(documents: Documents):
    old, new = document(digest="old"), document(digest="new", title="Otra")
    await documents.ready(old)
    assert await documents.begin(new) == old
    assert await documents.begin(new) is None
    assert await documents.same(HERE, "old") is None
    await documents.ready(new)
    assert await documents.find(HERE, "1") == new


async def test_every_deed_may_be_done_twice(documents: Documents):
    one = document()
    for _ in range(2):
        await documents.ready(one)
    assert await documents.listed(HERE, 5) == [one]
    for _ in range(2):
        assert await documents.leaving(HERE, "1") == one
    for _ in range(2):
        await documents.gone(HERE, "1")
    assert await documents.listed(HERE, 5) == []


async def test_no_scope_knows_what_another_one_keeps(documents: Documents):
    scopes = [HERE, THERE, Scope("ana", "other"), Scope("an", "adefault"), Scope("t" * 5000, "c" * 5000)]
    for scope in scopes:
        await documents.ready(document(scope=scope, title=scope.tenant, digest=scope.collection))
    for scope in scopes:
        assert [each.scope for each in await documents.listed(scope, 10)] == [scope]
        assert (await documents.find(scope, "1") or document()).title == scope.tenant
    assert set(await documents.scopes()) == set(scopes)
    await documents.leaving(THERE, "1")
    await documents.gone(THERE, "1")
    assert await documents.find(HERE, "1") is not None
    assert await documents.find(THERE, "1") is None
    assert await documents.same(Scope("ana", "none"), "default") is None


async def test_a_list_comes_in_pages_by_id(documents: Documents):
    ids = ["10", "9", "B", "a", "é", "ñandú", "😀"]
    for id in ids:
        await documents.ready(document(id))
    await documents.begin(document("5"))
    seen: list[str] = []
    while page := await documents.listed(HERE, 2, seen[-1] if seen else ""):
        seen += [each.id for each in page]
    assert seen == sorted(ids)


async def test_names_of_any_length_and_any_characters_stay_what_they_are(documents: Documents):
    words = "'; DROP TABLE capibara.documents; -- $1 %s \\ \" ñ 北京 😀\n" * 200
    one = document(
        "'id'", Scope("o'brien", 'c"x'), title=words, address=words, owner=words, digest=words[:60], updated=WHEN.replace(year=1970)
    )
    await documents.ready(one)
    assert await documents.find(one.scope, "'id'") == await documents.same(one.scope, words[:60]) == one


async def test_of_two_that_begin_at_once_only_one_is_told_what_was_there(documents: Documents):
    for _ in range(10):
        await documents.ready(document(digest="old"))
        told = await asyncio.gather(*(documents.begin(document(digest=f"new{n}")) for n in range(5)))
        assert [each.digest for each in told if each] == ["old"]


#: A deed by name, on one of few documents.
_DEEDS = st.tuples(
    st.sampled_from(["begin", "ready", "leaving", "gone"]),
    st.sampled_from([HERE, THERE, Scope("ana", "other")]),
    st.sampled_from(["1", "2"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
)


async def _do(documents: Documents, deed: tuple[str, Scope, str, str]) -> Document | None:
    name, scope, id, words = deed
    if name in {"leaving", "gone"}:
        return await getattr(documents, name)(scope, id)
    updated = WHEN + timedelta(microseconds=len(words))
    return await getattr(documents, name)(document(id, scope, title=words, digest=words, updated=updated, passages=len(words)))


async def _told(documents: Documents) -> list[Any]:
    scopes = sorted(await documents.scopes(), key=repr)
    lists = [await documents.listed(scope, 10) for scope in scopes]
    same = [await documents.same(scope, each.digest) for scope, some in zip(scopes, lists, strict=True) for each in some]
    return [scopes, lists, same, sorted(await documents.unfinished(), key=repr)]


async def test_a_list_answers_like_the_fake_whatever_was_done(documents: Documents):
    loop = asyncio.get_running_loop()

    async def same(deeds: list[tuple[str, Scope, str, str]]) -> None:
        fake = FakeDocuments()
        for scope in await documents.scopes():
            for id in ("1", "2"):
                await documents.gone(scope, id)
        for deed in deeds:
            assert await _do(documents, deed) == await _do(fake, deed)
        assert await _told(documents) == await _told(fake)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(deeds=st.lists(_DEEDS, max_size=12))
    def check(deeds: list[tuple[str, Scope, str, str]]) -> None:
        asyncio.run_coroutine_threadsafe(same(deeds), loop).result(60)

    await asyncio.to_thread(check)
