"""Documents from the command line and from Python, through a real door and broker, to stand-ins for the engines."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from aiohttp import ClientSession, web
from typer.testing import CliRunner, Result

from capibara_flow import wiring
from capibara_flow.cli import state
from capibara_flow.cli.app import app
from capibara_flow.cli.rag import find, findings_told, stores
from capibara_flow.client import RAGClient, RAGError
from capibara_flow.domain.ingesting import Finding
from capibara_flow.errors import CannotStart
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import AuthSettings, EdgeSettings, Key, KnowledgeSettings, Settings
from tests.conftest import Installation, installed, settings_for
from tests.edge.client import events, names
from tests.edge.knowing import form
from tests.knowledge import Library, knowing
from tests.waiting import until
from tests.webserver import serving
from topics.grounding import Checked, Disagreement
from topics.knowledge import Scope

ANN, BOB = "sk-ann-0001", "sk-bob-0001"
KEYS = AuthSettings(keys=(Key(key=ANN, principal="ann", tenant="acme"), Key(key=BOB, principal="bob", tenant="umbrella")))
MEBIBYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def logging_elsewhere(own_logging: None) -> None:
    """What workers in this process log is no output of the command under test."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path) -> Settings:
    edge = EdgeSettings(document_bytes=2 * MEBIBYTE, heartbeat_seconds=0.5)
    return settings_for(broker, fleet_file, auth=KEYS, edge=edge)


@pytest.fixture
async def installation(settings: Settings, engine: str) -> AsyncIterator[Installation]:
    async with installed(settings, engine, "router", "caller", "undertaker") as running:
        yield running


@pytest.fixture
async def library(installation: Installation) -> AsyncIterator[Library]:
    async with knowing(installation.settings) as library:
        yield library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "leave.md").write_text("# Leave\nthere are thirty days")
    (root / "deep" / "días.txt").write_text("una capibara nada")
    (root / "deep" / "deeper" / "c.md").write_text("thirty days of rain")
    (root / ".git" / "config").write_text("hidden")
    (root / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (root / "broken.pdf").write_bytes(b"%PDF\0")
    return root


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(words))


async def test_a_folder_comes_in_once_and_is_found_listed_and_removed(door: str, library: Library, folder: Path) -> None:
    at = ("--url", door, "--key", ANN)
    first = await run("ingest", str(folder), *at, "--json")
    assert first.exit_code == 1, first.output
    told = json.loads(first.stdout)
    assert (told["created"], told["passages"]) == (3, 3)
    assert [Path(each).name for each in told["refused"]] == ["broken.pdf"]
    assert {Path(path).name: why for path, why in told["skipped"].items()} == {"config": "hidden", "photo.jpg": "looks binary"}
    assert "refused" in first.stderr
    assert "neither text nor a document" in first.stderr
    assert {(file.name, file.owner, scope.tenant) for scope, file in library.uploads} >= {("deep/días.txt", "ann", "acme")}

    (folder / "broken.pdf").unlink()
    (folder / "leave.md").write_text("there are forty days")
    again = await run("ingest", str(folder), *at)
    assert (again.exit_code, again.stdout) == (0, "1 replaced, 2 unchanged; 1 new passages\n")

    found = await run("search", "forty days", *at, "--json")
    best, second = json.loads(found.stdout)
    assert (best["n"], best["text"], best["url"]) == (1, "there are forty days", str(folder / "leave.md"))
    shown = await run("search", "forty days", *at)
    assert "[1] 2.000  leave.md" in shown.stdout
    assert "[2] 1.000" in shown.stdout
    library.related = False
    told = await run("search", "forty days", *at)
    assert told.stdout == f"nothing related: a chat would not use these\n{shown.stdout}"
    library.related = True

    listed = json.loads((await run("rag", "list", *at, "--json")).stdout)
    assert {each["title"] for each in listed} == {"leave.md", "deep/días.txt", "deep/deeper/c.md"}
    assert "3 in all" in (await run("rag", "list", *at)).stdout
    removed = await run("rag", "remove", second["document"], *at)
    assert (removed.exit_code, removed.stdout) == (0, f"{second['document']}: removed\n")
    assert (await run("rag", "remove", second["document"], *at)).exit_code == 1
    assert "document unknown" in (await run("rag", "remove", second["document"], *at)).stderr


async def test_nobody_sees_what_is_somebody_else_s(door: str, library: Library, folder: Path) -> None:
    with RAGClient(door, key=ANN) as ann, RAGClient(door, key=BOB) as bob:
        taken = await asyncio.to_thread(ann.ingest, folder / "leave.md", collection="laws")
        assert taken.how == "created"
        for client, collection in ((bob, "laws"), (ann, "default")):
            assert await asyncio.to_thread(client.documents, collection=collection) == []
            assert await asyncio.to_thread(client.search_semantic, "thirty", collection=collection) == []
            with pytest.raises(RAGError) as refused:
                await asyncio.to_thread(client.delete, taken.document, collection=collection)
            assert refused.value.status == 404
        assert [each.id for each in await asyncio.to_thread(ann.documents, collection="laws")] == [taken.document]
        assert (Scope("acme", "laws"), taken.document) in library.kept


async def test_nothing_of_a_document_stays_at_the_broker(door: str, library: Library, installation: Installation, tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_bytes(b"word " * 100_000)
    with RAGClient(door, key=ANN) as client:
        sent: list[int] = []
        await asyncio.to_thread(client.ingest, large, progress=sent.append)
        assert sum(sent) == 500_000 == len(library.uploads[0][1].data)
        large.write_bytes(b"x" * (3 * MEBIBYTE))
        with pytest.raises(RAGError, match="2097152 bytes at most") as refused:
            await asyncio.to_thread(client.ingest, large)
    assert refused.value.status == 413
    headers = {"Authorization": f"Bearer {ANN}"}
    async with (
        ClientSession(door, headers=headers) as session,
        session.post("/api/rag/documents", data=form(("huge", b"x" * (3 * MEBIBYTE)))) as response,
    ):
        assert response.status == 413
    assert len(library.uploads) == 1
    async with asyncio.timeout(20):
        while await _kept(installation.settings, "CF_DOC"):  # noqa: ASYNC110  it can only be asked for
            await asyncio.sleep(0.1)


async def _kept(settings: Settings, stream: str) -> int:
    return next(row["messages"] for row in await wiring.show_streams(settings) if row["name"] == stream)


async def test_a_document_waits_for_an_ingester_and_can_be_followed_or_stopped_meanwhile(door: str, installation: Installation) -> None:
    headers = {"Authorization": f"Bearer {ANN}"}
    async with ClientSession(door, headers=headers) as session:
        async with session.post("/api/rag/documents", data=form(("a.md", b"hello"), ("b.md", b"hello"))) as response:
            assert response.status == 202
            first, second = (await response.json())["documents"]
        follow = asyncio.create_task(_events(session, first["events"]))
        async with session.delete(f"/api/chat/{second['turn']}") as response:
            assert response.status == 202
        await until(lambda: not follow.done())
        async with knowing(installation.settings) as library, asyncio.timeout(30):
            assert await follow == ["ingested", "done"]
            assert (await _events(session, second["events"]))[-1] in {"done", "error"}
        assert [file.name for _, file in library.uploads] == ["a.md"]


async def _events(session: ClientSession, path: str) -> list[str]:
    async with session.get(path) as response:
        assert response.status == 200, await response.text()
        return names(events(await response.text()))


async def test_without_a_retriever_the_words_say_so(door: str) -> None:
    result = await run("search", "x", "--url", door, "--key", ANN)
    assert result.exit_code == 1
    assert "start a retriever" in result.stderr


async def test_who_has_no_right_key_is_told_once(door: str, folder: Path) -> None:
    result = await run("ingest", str(folder), "--url", door, "--key", "sk-wrong")
    assert result.exit_code == 1
    assert result.stderr.count("API key is not known") == 1


async def test_many_sources_come_the_same_in_toon_and_in_json(door: str, library: Library, tmp_path: Path) -> None:
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text(f'rain, {n}: "a" \n - b | ñ')
    clients = [RAGClient(door, enable_toon=toon, key=ANN) for toon in (True, False)]
    for n in range(8):
        await asyncio.to_thread(clients[0].ingest, tmp_path / f"{n}.txt", title=f"T: {n}", address=f"https://h/{n}")
    toon, plain = [await asyncio.to_thread(each.search_semantic, "rain,", 7) for each in clients]
    assert toon == plain
    assert [each.n for each in toon] == list(range(1, 8))
    assert len(await asyncio.to_thread(clients[0].documents)) == 8


# --- without a broker -------------------------------------------------------------------------------------------------------


def test_where_nobody_answers_it_is_told_once(folder: Path) -> None:
    result = CliRunner().invoke(app, ["ingest", str(folder), "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert result.stderr.count("nothing answers at http://127.0.0.1:9") == 1


@pytest.mark.parametrize("url", ["", "localhost:5001", "ftp://h", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RAGError, match="is no address"):
        RAGClient(url)


def test_what_is_found_in_folders(folder: Path) -> None:
    found = find([folder], recursive=False, include=())
    assert set(found.files.values()) == {"leave.md", "broken.pdf"}
    found = find([folder, folder / "leave.md", folder / "nowhere"], recursive=True, include=["*.md"])
    assert set(found.files.values()) == {"leave.md", "deep/deeper/c.md"}
    assert found.refused == {folder / "nowhere": "does not exist"}
    named = find([folder / "photo.jpg", folder / ".git"], recursive=True, include=())
    assert set(named.files.values()) == {"photo.jpg", "config"}


def test_links_lead_into_no_ring_and_pipes_are_no_files(folder: Path) -> None:
    (folder / "ring").symlink_to(folder)
    (folder / "gone.md").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    found = find([folder], recursive=True, include=())
    assert len(found.files) == 4
    assert found.skipped[folder / "pipe"] == found.skipped[folder / "gone.md"] == "no plain file"


TOLD = {
    "n": 1,
    "title": "A",
    "url": "u",
    "date": "",
    "score": 0.5,
    "parts": {},
    "offsets": [0, 1],
    "text": "a",
    "document": "d",
    "newer": 1,
}


def test_a_newer_server_is_understood_and_a_strange_one_is_told() -> None:
    newer = web.json_response({"sources": [TOLD | {"newer": 1}], "more": 1})
    answers = iter([newer, web.Response(text="<html>"), web.json_response({"sources": [{}]})])
    with serving({"POST /api/rag/search": lambda _: next(answers)}) as url, RAGClient(url) as client:
        found = client.search("q")
        assert ([each.title for each in found.sources], found.related) == (["A"], True)
        for _ in range(2):
            with pytest.raises(RAGError, match="no list of sources"):
                client.search_semantic("q")
        with pytest.raises(RAGError, match="404"):
            client.documents()


def test_words_of_strangers_do_nothing_to_a_terminal() -> None:
    hostile = TOLD | {"title": "\x1b]0;x\x07 [red]", "text": "\x1b[2J\x9b2J\u202e", "url": "javascript:\x1b"}
    with serving({"POST /api/rag/search": lambda _: web.json_response({"sources": [hostile]})}) as url:
        for more in ([], ["--json"]):
            result = CliRunner().invoke(app, ["search", "q", "--url", url, *more])
            assert result.exit_code == 0
            assert not set(result.stdout) & set("\x1b\x07\x9b\u202e")


def test_a_stream_that_breaks_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    ingested = {"turn": "T", "document": "d", "how": "created", "title": "t", "passages": 2}
    calls: list[str | None] = []

    async def opened(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Capibara-Turn": "T"})
        await response.prepare(request)
        await response.write(f"event: turn\ndata: {{}}\n\nid: 7-1\nevent: ingested\ndata: {json.dumps(ingested)}\n\nevent: do".encode())
        assert request.transport
        request.transport.close()
        return response

    def resumed(request: web.Request) -> web.Response:
        calls.append(request.headers.get("Last-Event-ID"))
        if len(calls) < 3:
            return web.Response(status=503)
        return web.Response(text="id: 7\nevent: done\ndata: {}\n\n", content_type="text/event-stream")

    file = tmp_path / "a.md"
    file.write_text("a")
    with serving({"POST /api/rag/documents": opened, "/api/chat/T/events": resumed}) as url:
        taken = RAGClient(url).ingest(file)
    assert (taken.how, taken.passages, taken.turn) == ("created", 2, "T")
    assert calls == ["7-1"] * 3
    assert replace(taken, how="x") != taken


@pytest.mark.parametrize("command", ["ingest", "search", "rag", "rag list", "rag remove", "rag check", "rag reembed"])
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output or command == "rag"


def test_stores_that_come_along_are_left_alone_while_up_runs(tmp_path: Path) -> None:
    plain, folder = Settings(), tmp_path / "knowledge"
    assert stores(plain, tmp_path) == plain.knowledge
    folder.mkdir()
    assert stores(plain, tmp_path).folder == folder
    (tmp_path / state.FILE).write_text(json.dumps({"pid": os.getpid(), "environment": {}}))
    with pytest.raises(CannotStart, match="stop it first"):
        stores(plain, tmp_path)
    elsewhere = Settings(knowledge=KnowledgeSettings(folder=tmp_path / "elsewhere"))
    assert stores(elsewhere, tmp_path) == elsewhere.knowledge


def test_what_is_found_is_told_with_what_mends_it() -> None:
    finding = Disagreement(
        tenant="acme", collection="laws", document="ab12", address="https://h/a", why="the graph\x1b lacks it", repair="relink"
    )
    told = findings_told(Checked(findings=(finding,)), repaired=False)
    assert told == "acme/laws ab12 https://h/a: the graph\ufffd lacks it (--repair would relink it)"
    assert "its links were made again" in findings_told(Checked(findings=(finding,)), repaired=True)
    assert findings_told(Checked(findings=(finding,), more=7), repaired=True).endswith("\nand 7 more")
    assert findings_told(Checked(), repaired=False) == "all stores agree"


def reaching(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands find the broker of *settings* as they find a running `up`, whose stores are in *folder*."""
    monkeypatch.setenv("CAPIBARA_NATS__URL", settings.nats.url)
    for role, password in settings.nats.passwords.items():
        monkeypatch.setenv(f"CAPIBARA_NATS__PASSWORDS__{role.upper()}", password.get_secret_value())
    monkeypatch.setenv("CAPIBARA_STATE", str(folder))
    folder.mkdir()
    (folder / state.FILE).write_text(json.dumps({"pid": os.getpid(), "environment": {}}))


async def test_a_running_ingester_is_asked_whether_the_stores_agree(
    library: Library, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaching(settings, tmp_path / "state", monkeypatch)
    assert (await run("rag", "check")).stdout == "all stores agree\n"
    library.findings = [Finding(Scope("acme", "laws"), "ab12", "trim", "a change of it was not finished", "a.md")]
    found = await run("rag", "check")
    assert (found.exit_code, found.stdout) == (1, "acme/laws ab12 a.md: a change of it was not finished (--repair would trim it)\n")
    assert json.loads((await run("rag", "check", "--json")).stdout)[0]["document"] == "ab12"
    mended = await run("rag", "check", "--repair")
    assert (mended.exit_code, mended.stdout) == (0, "acme/laws ab12 a.md: a change of it was not finished (the rest was taken out)\n")
    assert (await run("rag", "check")).exit_code == 0


async def test_where_no_ingester_runs_the_stores_are_opened_unless_they_are_in_use(
    installation: Installation, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    reaching(settings, folder, monkeypatch)
    alone = await run("rag", "check")
    assert alone.exit_code == 1
    assert "no place for documents" in alone.stderr
    (folder / "knowledge").mkdir()
    busy = await run("rag", "check")
    assert busy.exit_code == 1
    assert "stop it first" in busy.stderr


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_whoever_reads_no_further_is_no_error(more: tuple[str, ...]) -> None:
    facts = {"title": "A", "address": "a.md", "language": "es", "digest": "d", "updated": 0.0, "passages": 1}
    documents = [{**facts, "id": f"{number:064}"} for number in range(1000)]
    answer = {"documents": documents, "next": None}
    with serving({"GET /api/rag/documents": lambda _: web.json_response(answer)}) as url:
        reading, writing = os.pipe()
        os.close(reading)
        command = (sys.executable, "-m", "capibara_flow", "rag", "list", "--url", url, *more)
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode != 0
