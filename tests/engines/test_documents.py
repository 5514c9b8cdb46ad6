"""One suite for every list of documents: the fake, PostgreSQL of our own, PostgreSQL with TimescaleDB in a container."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capibara_flow.engines.postgres.documents import PostgresDocuments
from capibara_flow.ports import Documents, Edition, Standing
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
    await documents.begin(document())
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


async def test_one_that_is_replaced_stays_ready_until_the_other_one_is(documents: Documents):
    old, new = document(digest="old"), document(digest="new", title="Otra", edition="e2")
    await documents.ready(old)
    for _ in range(2):
        await documents.begin(new)
        assert (await documents.find(HERE, "1"), await documents.same(HERE, "old"), await documents.same(HERE, "new")) == (old, old, None)
        assert await documents.left(HERE, "1") == await documents.unfinished() == [new]
    for _ in range(2):  # who did not hear that it was done does it again
        await documents.ready(new)
        assert (await documents.find(HERE, "1"), await documents.same(HERE, "old")) == (new, None)
        assert await documents.left(HERE, "1") == await documents.unfinished() == [old]
    for _ in range(2):
        await documents.settled(HERE, "1")
        assert (await documents.find(HERE, "1"), await documents.left(HERE, "1"), await documents.unfinished()) == (new, [], [])


async def test_what_is_begun_takes_the_place_of_what_is_unfinished(documents: Documents):
    first, second, third = (document(digest=digest, edition=f"e{digest}") for digest in "123")
    await documents.begin(first)
    await documents.begin(second)
    assert await documents.left(HERE, "1") == [second]
    assert await documents.leaving(HERE, "1") == second
    await documents.ready(second)
    assert await documents.leaving(HERE, "1") == second
    assert await documents.left(HERE, "1") == [second]
    await documents.begin(third)
    assert await documents.left(HERE, "1") == [third]
    assert await documents.scopes() == [HERE]
    await documents.ready(third)
    assert (await documents.find(HERE, "1"), await documents.left(HERE, "1")) == (third, [])


async def test_how_things_stand_is_told_of_one_moment(documents: Documents):
    assert await documents.standing(HERE, ["1"]) == Standing(0, {})
    await documents.begin(document(edition="e1"))
    assert await documents.standing(HERE, ["1"]) == Standing(0, {})
    await documents.ready(document(edition="e1"))
    await documents.ready(document("2", edition="e2"))
    await documents.ready(document(scope=THERE))
    assert await documents.standing(HERE, ["1", "2", "3", "1"]) == Standing(2, {"1": Edition("e1", 1), "2": Edition("e2", 2)})
    assert await documents.standing(HERE, []) == Standing(2, {})
    await documents.begin(document(edition="e3"))
    await documents.leaving(HERE, "2")
    assert await documents.standing(HERE, ["1", "2"]) == Standing(2, {"1": Edition("e1", 1)})
    await documents.ready(document(edition="e3"))
    assert await documents.standing(HERE, ["1"]) == Standing(3, {"1": Edition("e3", 3)})
    assert await documents.standing(THERE, ["1"]) == Standing(1, {"1": Edition("", 1)})


async def test_revisions_of_a_scope_show_in_their_order(documents: Documents):
    seen = [0]

    async def look() -> None:
        while seen[-1] < 30:
            standing = await documents.standing(HERE, [str(number) for number in range(30)])
            assert {each.revision for each in standing.editions.values()} == set(range(1, standing.revision + 1))
            seen.append(standing.revision)

    looking = asyncio.create_task(look())
    await asyncio.gather(*(documents.ready(document(str(number))) for number in range(30)))
    await looking
    assert seen == sorted(seen)


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


#: A deed by name, on one of few documents.
_DEEDS = st.tuples(
    st.sampled_from(["begin", "ready", "settled", "leaving", "gone"]),
    st.sampled_from([HERE, THERE, Scope("ana", "other")]),
    st.sampled_from(["1", "2"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
)


async def _do(documents: Documents, deed: tuple[str, Scope, str, str]) -> Document | None:
    name, scope, id, words = deed
    if name in {"settled", "leaving", "gone"}:
        return await getattr(documents, name)(scope, id)
    updated = WHEN + timedelta(microseconds=len(words))
    return await getattr(documents, name)(
        document(id, scope, title=words, digest=words, updated=updated, passages=len(words), edition=words[:1])
    )


async def _told(documents: Documents) -> list[Any]:
    scopes = sorted(await documents.scopes(), key=repr)
    lists = [await documents.listed(scope, 10) for scope in scopes]
    same = [await documents.same(scope, each.digest) for scope, some in zip(scopes, lists, strict=True) for each in some]
    left = [await documents.left(scope, id) for scope in scopes for id in ("1", "2")]
    editions = [(await documents.standing(scope, ["1", "2"])).editions for scope in scopes]
    names = [{id: each.name for id, each in some.items()} for some in editions]
    return [scopes, lists, same, left, names, sorted(await documents.unfinished(), key=repr)]


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
