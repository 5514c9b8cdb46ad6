"""Documents and search at the door, in front of fake turns."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import pytest
import toons
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.flat import flattened, source_of, unflattened
from capibara_flow.edge.uploads import file_name
from capibara_flow.errors import BrokerUnavailable
from capibara_flow.settings import AuthSettings, EdgeSettings, Key
from tests.edge.client import events, names
from tests.edge.knowing import DONE, FACTS, ID, form, ingested, source
from tests.edge.serving import client
from tests.fakes import FakeTurns
from tests.waiting import until
from topics.grounding import Found, IngestDocument, ListDocuments, Listing, Removed, RemoveDocument, SearchKnowledge
from topics.message import Refusal
from topics.output import Cited, Failed, SourcesFound, SourceShown, Token

DOCUMENTS, SEARCH = "/api/rag/documents", "/api/rag/search"
KEYS = AuthSettings(anonymous=False, keys=(Key(key="sk-ann-0001", principal="ann", tenant="acme"),))
ANN = {"Authorization": "Bearer sk-ann-0001"}
SMALL = EdgeSettings(document_bytes=1000)


def commands(turns: FakeTurns) -> list[IngestDocument]:
    return [command for command, _, _ in turns.opened if isinstance(command, IngestDocument)]


# --- documents come in --------------------------------------------------------------------------------------------------


async def test_a_form_s_files_are_each_a_turn_that_can_be_followed() -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session:
        files = form(("a.md", b"# A"), ("dir/b.txt", b"B" * 300_000))
        async with session.post(DOCUMENTS, data=files, params={"collection": "laws", "title": "T"}) as response:
            assert response.status == 202
            told = (await response.json())["documents"]
        assert [each["name"] for each in told] == ["a.md", "dir/b.txt"]
        assert told[0]["events"] == f"/api/chat/{told[0]['turn']}/events"
        async with session.get(told[1]["events"]) as response:
            assert names(events(await response.text())) == ["ingested", "done"]
    first, second = commands(turns)
    assert (first.collection, first.title, first.media_type, first.size) == ("laws", "T", "text/plain", 3)
    assert turns.deposits[second.turn] == b"B" * 300_000
    assert turns.recalled == {first.turn, second.turn}
    assert turns.attended == set()


async def test_a_document_has_a_deadline_of_its_own() -> None:
    turns = FakeTurns(*ingested())
    async with client(turns, EdgeSettings(turn_seconds=5, ingest_seconds=1000)) as session, session.post(DOCUMENTS, data=form(("a", b"a"))):
        ((_, identity, deadline),) = turns.opened
    async with client(turns, EdgeSettings(turn_seconds=5, ingest_seconds=9000)) as session, session.post(DOCUMENTS, data=form(("a", b"a"))):
        assert 7000 < turns.opened[1][2] - deadline < 9000
    assert identity.tenant == "anonymous"


@pytest.mark.parametrize(
    ("params", "headers", "name"),
    [
        ({"name": "a.pdf"}, {}, "a.pdf"),
        ({}, {"Content-Disposition": 'attachment; filename="b.pdf"'}, "b.pdf"),
        ({}, {"Content-Disposition": "attachment; filename*=UTF-8''a%C3%B1o.pdf"}, "año.pdf"),
        ({"address": "https://h/x/c%20d.pdf?y=1"}, {}, "c d.pdf"),
        ({"address": "https://h/"}, {}, "h"),
    ],
)
async def test_a_bare_body_is_a_document_with_a_name(params: dict[str, str], headers: dict[str, str], name: str) -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session:
        headers = {"Content-Type": "application/pdf", **headers}
        async with session.post(DOCUMENTS, data=b"%PDF", params=params, headers=headers) as response:
            assert response.status == 202
    (command,) = commands(turns)
    assert (command.name, command.media_type, command.address) == (name, "application/pdf", params.get("address", ""))


async def test_a_text_in_json_needs_no_name_and_is_the_same_document_again() -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session:
        for body in ({"text": "hola"}, {"text": "hola"}, {"text": "hola", "name": "a.md", "title": "A", "address": "https://h/a"}):
            async with session.post(DOCUMENTS, json=body) as response:
                assert response.status == 202
    first, again, named = commands(turns)
    assert first.name == again.name != ""
    assert (named.name, named.title, named.address, named.media_type) == ("a.md", "A", "https://h/a", "")
    assert turns.deposits[first.turn] == b"hola"


@pytest.mark.parametrize(("how", "status"), [("created", 201), ("replaced", 200), ("unchanged", 200), ("same", 200)])
async def test_who_waits_is_told_what_became_of_it(how: str, status: int) -> None:
    async with (
        client(FakeTurns(*ingested(how))) as session,
        session.post(DOCUMENTS, data=form(("a.md", b"# A")), params={"wait": "true"}) as response,
    ):
        assert response.status == status
        (told,) = (await response.json())["documents"]
    assert (told["document"], told["how"], told["passages"], told["title"]) == (ID, how, 3, "Leave")


async def test_who_waits_is_told_why_not() -> None:
    failed = Failed(turn="T", title="document refused", status=422, detail="it is no PDF")
    async with (
        client(FakeTurns((failed,))) as session,
        session.post(DOCUMENTS, data=form(("a.pdf", b"x"), ("b.pdf", b"y")), params={"wait": "1"}) as response,
    ):
        assert (response.status, response.content_type) == (422, "application/problem+json")
        told = await response.json()
    assert told["detail"] == "it is no PDF"
    assert [each["problem"]["status"] for each in told["documents"]] == [422, 422]


async def test_a_stopped_document_is_no_success() -> None:
    stopped = DONE.model_copy(update={"finish_reason": "cancelled"})
    async with (
        client(FakeTurns((stopped,))) as session,
        session.post(DOCUMENTS, data=form(("a", b"x")), params={"wait": "1"}) as response,
    ):
        assert response.status == 409


async def test_one_document_can_be_followed_as_it_is_taken_in() -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session:
        headers = {"Accept": "text/event-stream", "Content-Type": "text/markdown"}
        async with session.post(DOCUMENTS, data=b"# A", params={"name": "a.md"}, headers=headers) as response:
            stream = events(await response.text())
            assert response.headers["X-Capibara-Turn"] == stream[0].data["turn"] == commands(turns)[0].turn
        assert names(stream) == ["turn", "ingested", "done"]
        async with session.post(DOCUMENTS, data=form(("a", b"a"), ("b", b"b")), headers={"Accept": "text/event-stream"}) as response:
            assert response.status == 400
            assert "one document at a time" in await response.text()
        assert len(turns.opened) == 1


# --- and what is no document ---------------------------------------------------------------------------------------------


async def endless(chunk: bytes = b"x" * 1000) -> AsyncIterator[bytes]:
    while True:
        yield chunk
        await asyncio.sleep(0)


@pytest.mark.parametrize("told", ["length", "chunked", "form", "json"])
async def test_a_document_that_is_too_large_is_refused_and_nothing_stays_of_it(told: str) -> None:
    turns = FakeTurns(*ingested())
    ways: dict[str, dict[str, Any]] = {
        "length": {"data": b"x" * 2000, "params": {"name": "a"}},
        "chunked": {"data": endless(), "params": {"name": "a"}},
        "form": {"data": form(("a", b"x" * 2000))},
        "json": {"json": {"text": "x" * 2000, "name": "a"}},
    }
    async with client(turns, SMALL) as session, asyncio.timeout(30):
        async with session.post(DOCUMENTS, **ways[told]) as response:
            assert (response.status, response.content_type) == (413, "application/problem+json")
            assert "1000 bytes at most" in (await response.json())["detail"]
        if told in {"chunked", "form"}:
            await until(lambda: turns.erasures)
    assert turns.opened == []


class Passing(FakeTurns):
    """Turns that let a document pass, and keep nothing of it."""

    passed = 0

    async def deposit(self, turn: str, data: AsyncIterable[bytes], most: int) -> tuple[int, int]:
        async for chunk in data:
            self.passed += len(chunk)
        return self.passed, 1


@pytest.mark.parametrize("as_form", [True, False])
async def test_a_document_is_never_in_memory_as_a_whole(as_form: bool) -> None:
    async def blocks() -> AsyncIterator[bytes]:
        if as_form:
            yield FILE[: FILE.index(b"%b")] + b"\r\n"
        for _ in range(320):
            yield b"x" * 100_000
        if as_form:
            yield b"\r\n--B--\r\n"

    turns = Passing(*ingested())
    async with client(turns) as session:
        tracemalloc.start()
        headers = {"Content-Type": FORM if as_form else "text/plain"}
        async with session.post(DOCUMENTS, data=blocks(), params={"name": "a"}, headers=headers) as response:
            assert response.status == 202
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert turns.passed == 32_000_000
    assert peak < 8_000_000


async def test_what_came_before_a_bad_file_is_told_and_taken_in() -> None:
    turns = FakeTurns(*ingested())
    async with (
        client(turns, SMALL) as session,
        session.post(DOCUMENTS, data=form(("good", b"x"), ("bad", b"x" * 2000), ("never", b"x"))) as response,
    ):
        assert response.status == 413
        told = await response.json()
    assert "bad" in told["detail"]
    assert [each["name"] for each in told["documents"]] == ["good"] == [each.name for each in commands(turns)]


FORM = "multipart/form-data; boundary=B"
FILE = b'--B\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n%b\r\nhello\r\n--B--\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("multipart/form-data", b"x", "form cannot be read"),
        (f"multipart/form-data; boundary={'b' * 100}", b"x", "form cannot be read"),
        (FORM, b"", "cannot be read"),
        (FORM, b"--B--\r\n", "no file in the form"),
        (FORM, b"rubbish", "cannot be read"),
        (FORM, FILE[:60], "cannot be read"),
        (FORM, FILE.replace(b"--B--\r\n", b"") % b"", "cannot be read"),
        (FORM, FILE % b"Content-Encoding: gzip\r\n", "neither packed"),
        (FORM, FILE % b"Content-Transfer-Encoding: base64\r\n", "neither packed"),
        (FORM, FILE.replace(b'; filename="a"', b"") % b"", "is no file"),
        (FORM, FILE.replace(b'"a"', b'""') % b"", "no file was chosen"),
        (FORM, FILE % b"Content-Type: multipart/mixed; boundary=C\r\n", "form inside a form"),
        ("text/plain", b"hello", "needs a name"),
        ("application/json", b"[1]", "the body must be"),
        ("application/json", b'{"text": ""}', "text"),
        ("application/json", b'{"text": "a", "path": "/etc/passwd"}', "path"),
    ],
)
async def test_what_cannot_be_read_is_refused_with_its_reason(kind: str, body: bytes, words: str) -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session, session.post(DOCUMENTS, data=body, headers={"Content-Type": kind}) as response:
        assert (response.status, response.content_type) == (400, "application/problem+json"), await response.text()
        assert words in (await response.json())["detail"]
    assert turns.opened == []


async def test_an_empty_document_is_refused() -> None:
    async with client(FakeTurns(*ingested())) as session, session.post(DOCUMENTS, data=form(("a", b""))) as response:
        assert response.status == 422
        assert "a: the document is empty" in await response.text()


async def test_a_turn_that_is_not_accepted_leaves_nothing() -> None:
    turns = FakeTurns(*ingested(), refusal=BrokerUnavailable("the broker does not accept turns now"))
    async with client(turns) as session, session.post(DOCUMENTS, data=form(("a", b"x"))) as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        await until(lambda: turns.erasures)


@pytest.mark.parametrize("collection", ["", "a/b", "x" * 65, 'a"; drop', "a b", "a\n"])
async def test_a_collection_has_a_plain_name(collection: str) -> None:
    turns = FakeTurns(*ingested())
    async with client(turns) as session:
        calls = [
            session.post(DOCUMENTS, data=b"x", params={"name": "a", "collection": collection}),
            session.get(DOCUMENTS, params={"collection": collection}),
            session.get(f"{DOCUMENTS}/{ID}", params={"collection": collection}),
            session.delete(f"{DOCUMENTS}/{ID}", params={"collection": collection}),
            session.post(SEARCH, json={"query": "q", "collection": collection}),
            session.post("/api/chat", json={"message": "q", "collection": collection}),
        ]
        for call in calls:
            async with call as response:
                assert response.status == 400
                assert "collection" in await response.text()
    assert (turns.opened, turns.requests) == ([], [])


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("../../etc/passwd", "etc/passwd"),
        ("C:\\docs\\a.pdf", "C:/docs/a.pdf"),
        ("/abs/./a", "abs/a"),
        ("a\x00\x1b[31m\nb\u202e.md", "a [31m b .md"),
        ("..", ""),
        ("x" * 300 + ".pdf", "x" * 196 + ".pdf"),
    ],
)
def test_names_lead_nowhere(given_name: str, name: str) -> None:
    assert file_name(given_name) == name


@given(st.text(max_size=300))
def test_a_name_is_one_printable_line_without_ways_up(text: str) -> None:
    name = file_name(text)
    assert name.isprintable()
    assert len(name) <= 200
    assert not name.startswith("/")
    assert not {"", ".", ".."} & set(name.split("/")) or name == ""


# --- what is there ---------------------------------------------------------------------------------------------------------


async def test_documents_are_listed_shown_and_removed_for_the_asker_s_tenant_only() -> None:
    turns = FakeTurns()
    turns.replies = {ListDocuments: Listing(documents=(FACTS,)), RemoveDocument: Removed(removed=True)}
    async with client(turns, auth=KEYS) as session:
        async with session.get(DOCUMENTS, params={"limit": "1", "after": "aa", "collection": "laws"}, headers=ANN) as response:
            assert await response.json() == {"documents": [FACTS.model_dump()], "next": ID}
        async with session.get(f"{DOCUMENTS}/{ID}", headers=ANN) as response:
            assert (await response.json())["title"] == "Leave"
        async with session.delete(f"{DOCUMENTS}/{ID}", headers=ANN) as response:
            assert await response.json() == {"id": ID, "removed": True}
        for method, path in (("GET", DOCUMENTS), ("GET", f"{DOCUMENTS}/{ID}"), ("DELETE", f"{DOCUMENTS}/{ID}"), ("POST", DOCUMENTS)):
            async with session.request(method, path) as response:
                assert response.status == 401
    listed, shown, removed = turns.requests
    assert isinstance(listed, ListDocuments)
    assert (listed.limit, listed.after, listed.collection, listed.tenant) == (1, "aa", "laws", "acme")
    assert isinstance(shown, ListDocuments)
    assert (shown.document, shown.tenant) == (ID, "acme")
    assert isinstance(removed, RemoveDocument)
    assert (removed.document, removed.tenant) == (ID, "acme")


@pytest.mark.parametrize("document", [ID, "x", "A" * 64, "%2e%2e", "a" * 65, "'%20or%201=1"])
async def test_a_document_that_is_not_there_is_not_found(document: str) -> None:
    turns = FakeTurns()
    turns.replies = {ListDocuments: Listing(), RemoveDocument: Removed()}
    async with client(turns) as session:
        for method in ("GET", "DELETE"):
            async with session.request(method, f"{DOCUMENTS}/{document}") as response:
                assert (response.status, response.content_type) == (404, "application/problem+json")
    assert len(turns.requests) == (2 if document == ID else 0)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=-1", "limit=٣", "after=x", "after=%00"])
async def test_a_list_is_asked_for_in_numbers(query: str) -> None:
    async with client(FakeTurns()) as session, session.get(f"{DOCUMENTS}?{query}") as response:
        assert response.status == 400


async def test_sources_are_found() -> None:
    turns = FakeTurns()
    turns.replies = {SearchKnowledge: Found(sources=(source(1), source(2)), seconds=0.25, related=False)}
    async with client(turns) as session, session.post(SEARCH, json={"query": " leave? ", "limit": 2, "collection": "laws"}) as response:
        told = await response.json()
    assert told == {"sources": [SourceShown.of(source(n)).model_dump(mode="json") for n in (1, 2)], "seconds": 0.25, "related": False}
    assert told["sources"][0]["title"] == "Title, 1 › Head"
    (asked,) = turns.requests
    assert isinstance(asked, SearchKnowledge)
    assert (asked.query, asked.limit, asked.collection, asked.tenant) == ("leave?", 2, "laws", "anonymous")


async def test_many_sources_are_told_in_toon_to_who_takes_it() -> None:
    turns = FakeTurns()
    async with client(turns) as session:
        for count, accept, kind in ((6, "application/toon", "toon"), (5, "application/toon", "json"), (6, "application/json", "json")):
            turns.replies = {SearchKnowledge: Found(sources=tuple(map(source, range(1, count + 1))), seconds=0.1)}
            async with session.post(SEARCH, json={"query": "q"}, headers={"Accept": accept}) as response:
                assert response.content_type == f"application/{kind}"
                text = await response.text()
            rows = toons.loads(text)["sources"] if kind == "toon" else json.loads(text)["sources"]
            read = [unflattened(row) if kind == "toon" else source_of(row) for row in rows]
            assert read == [SourceShown.of(source(n)) for n in range(1, count + 1)]
            assert (toons if kind == "toon" else json).loads(text)["related"] is True
            assert kind == "json" or f"sources[{count}]{{" in text


@given(st.lists(st.builds(source, st.integers(1, 50), title=st.text(), text=st.text(), address=st.text()), max_size=8))
def test_flat_rows_lead_back_to_their_sources(sources: list[Any]) -> None:
    shown = [SourceShown.of(each) for each in sources]
    rows = flattened(shown)
    assert [unflattened(row | {"new": 1}) for row in rows] == shown
    assert [unflattened(row) for row in toons.loads(toons.dumps({"rows": rows}))["rows"]] == shown


@pytest.mark.parametrize("body", [{}, {"query": " "}, {"query": "q", "limit": 0}, {"query": "q", "limit": 101}, {"query": "q" * 20_001}])
async def test_a_search_that_cannot_be_is_refused(body: dict[str, Any]) -> None:
    turns = FakeTurns()
    async with client(turns) as session, session.post(SEARCH, json=body) as response:
        assert response.status == 400
    assert turns.requests == []


async def every_request(session: ClientSession) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for method, path, body in (
        ("GET", DOCUMENTS, None),
        ("GET", f"{DOCUMENTS}/{ID}", None),
        ("DELETE", f"{DOCUMENTS}/{ID}", None),
        ("POST", SEARCH, {"query": "q"}),
    ):
        async with session.request(method, path, json=body) as response:
            found.append((response.status, response.headers.get("Retry-After", ""), await response.json(content_type=None)))
    return found


async def test_where_nobody_knows_the_documents_it_is_told_who_would() -> None:
    async with client(FakeTurns()) as session:
        for status, again, told in await every_request(session):
            assert (status, again) == (503, "2")
            assert "start a retriever" in told["detail"]


async def test_a_refusal_is_told_with_its_own_status() -> None:
    refused = Refusal(title="embedder mismatch", detail="run `capibara rag reembed`", status=409)
    turns = FakeTurns()
    turns.replies = {
        ListDocuments: Listing(refused=refused),
        RemoveDocument: Removed(refused=refused),
        SearchKnowledge: Found(refused=refused),
    }
    async with client(turns) as session:
        for status, again, told in await every_request(session):
            assert (status, again, told["title"], told["detail"]) == (409, "", refused.title, refused.detail)


async def test_whether_a_turn_is_grounded_and_by_what_is_the_asker_s_choice() -> None:
    turns = FakeTurns((DONE,))
    async with client(turns) as session:
        for more in ({}, {"grounded": True, "collection": "laws"}, {"grounded": False}):
            async with session.post("/api/chat", json={"message": "hi", **more}) as response:
                assert response.status == 200
    asked = [command.request for command, _, _ in turns.opened if not isinstance(command, IngestDocument)]
    assert [(each.grounded, each.collection) for each in asked] == [(None, "default"), (True, "laws"), (False, "default")]


async def test_a_whole_answer_has_its_sources_and_citations() -> None:
    shown = SourceShown.of(source(1))
    said = ((SourcesFound(turn="T", sources=(shown,)),), (Token(turn="T", text="So [1]."),), (Cited(turn="T", cited=(1,)), DONE))
    async with client(FakeTurns(*said)) as session, session.post("/api/chat", json={"message": "hi", "stream": False}) as response:
        told = await response.json()
    assert told["sources"] == [shown.model_dump(mode="json")]
    assert told["citations"] == {"cited": [1], "unknown": []}
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    async with client(FakeTurns(*said)) as session, session.post("/v1/chat/completions", json=asked) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "So [1]."
