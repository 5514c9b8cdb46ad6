"""``ports.PassageStore``: one suite for the fake, Milvus Lite (real, embedded), and a Milvus server where Docker answers."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from capibara_flow.engines.milvus import MilvusPassages
from capibara_flow.errors import CannotStart, DocumentRefused, EmbedderMismatch, StoreUnavailable
from capibara_flow.ports import PassageStore, Spread
from tests.fakes_knowledge import FakePassages
from topics.knowledge import Hit, Passage, Scope

OURS, THEIRS, OTHER = Scope("ours"), Scope("theirs"), Scope("ours", "other")
NASTY = ['quo"te', "back\\slash", "it's", 'x"] or 1 == 1 or key in ["', "new\nline\r", "ñ😀", "\\", '\\"', "%", " "]


@pytest.fixture(scope="module")
def milvus_server() -> Iterator[str]:
    """The address of a Milvus server in a container; skips, saying why, where there is no Docker."""
    from docker.errors import DockerException
    from testcontainers.milvus import MilvusContainer

    try:
        container = MilvusContainer("milvusdb/milvus:v2.6.4").start()
    except DockerException as error:
        pytest.skip(f"no Docker: {error}")
    yield container.get_connection_url()
    container.stop()


@pytest.fixture(params=["fake", "lite", pytest.param("server", marks=[pytest.mark.docker, pytest.mark.timeout(600)])])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[PassageStore]:
    if request.param == "fake":
        made: PassageStore = FakePassages()
    elif request.param == "lite":
        made = MilvusPassages(str(tmp_path / "passages.db"))
    else:
        made = MilvusPassages(request.getfixturevalue("milvus_server"), collection=f"t{abs(hash(request.node.name))}", timeout=60)
    await made.prepare("model", 4)
    yield made
    await made.aclose()


def passage(id: str, document: str = "d", text: str = "", **more: object) -> Passage:
    return Passage(id, document, 0, text or f"text of {id}", 0, 10, **more)


def axis(index: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[index]


async def put(store: PassageStore, scope: Scope, *ids: str, document: str = "d", terms: dict[int, float] | None = None) -> None:
    rows = np.stack([axis(index % 4) for index in range(len(ids))])
    await store.put(scope, [passage(id, document) for id in ids], rows, [terms or {1: 0.5}] * len(ids))


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage for hit in hits]


async def test_finds_what_is_near(store):
    await put(store, OURS, "a", "b", "c")
    found = await store.nearest(OURS, np.array([0.6, 0.8, 0, 0], np.float32), 2)
    assert ids(found) == ["b", "a"]
    assert [hit.score for hit in found] == pytest.approx([0.8, 0.6], abs=1e-5)


async def test_finds_by_terms(store):
    await store.put(
        OURS, [passage(id) for id in "abc"], np.eye(4, dtype=np.float32)[:3], [{1: 0.5}, {1: 0.25, 4294967294 - 1: 1.0}, {3: 1.0}]
    )
    found = await store.matching(OURS, {1: 2.0, 4294967293: 1.0, 77: 5.0}, 10)
    assert [(hit.passage, hit.score) for hit in found] == [("b", pytest.approx(1.5)), ("a", pytest.approx(1.0))]
    assert ids(await store.matching(OURS, {1: 2.0}, 1)) == ["a"]
    assert await store.matching(OURS, {}, 10) == []
    assert await store.matching(OURS, {99: 1.0}, 10) == []


async def test_a_passage_without_words_is_found_by_meaning_only(store):
    await store.put(OURS, [passage("a")], axis(0)[None], [{}])
    assert ids(await store.nearest(OURS, axis(0), 5)) == ["a"]
    assert await store.matching(OURS, {1: 1.0}, 5) == []
    assert await store.spread(OURS, [1]) == Spread(1, {})


async def test_tells_how_terms_spread(store):
    await store.put(OURS, [passage(id) for id in "abc"], np.eye(4, dtype=np.float32)[:3], [{1: 0.5, 2: 0.5}, {1: 0.5}, {3: 1.0}])
    assert await store.spread(OURS, [1, 2, 9]) == Spread(3, {1: 2, 2: 1})
    await store.put(OURS, [passage("a")], axis(0)[None], [{2: 0.5, 9: 0.5}])
    assert await store.spread(OURS, [1, 2, 9]) == Spread(3, {1: 1, 2: 1, 9: 1})
    await store.put(OURS, [passage("e", "e")], axis(0)[None], [{9: 0.5}])
    await store.delete(OURS, "d")
    assert await store.spread(OURS, [1, 2, 9]) == Spread(1, {9: 1})
    assert await store.spread(THEIRS, [1]) == Spread()


async def test_scopes_do_not_see_each_other(store):
    await put(store, OURS, "a", document="same")
    await put(store, THEIRS, "a", "b", document="same", terms={2: 1.0})
    await put(store, OTHER, "c")
    assert ids(await store.nearest(OURS, axis(0), 10)) == ["a"]
    assert ids(await store.matching(OURS, {1: 1.0, 2: 1.0}, 10)) == ["a"]
    assert set(await store.fetch(OURS, ["a", "b", "c"])) == {"a"}
    await store.delete(OURS, "same")
    assert await store.documents(OURS) == {}
    assert await store.documents(THEIRS) == {"same": 2}
    assert await store.documents(OTHER) == {"d": 1}


async def test_gives_back_what_was_put(store):
    whole = Passage("p", "d", 3, 'Ünïcode "quotes" \\ and\nlines 😀', 17, 42, ("One", "Two"), "Title", "https://x/y?z", "es", 1700000000.25)
    await store.put(OURS, [whole], axis(0)[None], [{1: 1.0}])
    assert await store.fetch(OURS, ["p", "not there", "p"]) == {"p": whole}
    assert await store.fetch(OURS, []) == {}


async def test_the_same_id_replaces(store):
    await put(store, OURS, "a")
    await store.put(OURS, [passage("a", text="new")], axis(3)[None], [{5: 1.0}])
    assert (await store.fetch(OURS, ["a"]))["a"].text == "new"
    assert await store.documents(OURS) == {"d": 1}
    assert ids(await store.matching(OURS, {1: 1.0}, 5)) == []
    assert (await store.nearest(OURS, axis(3), 5))[0].score == pytest.approx(1.0, abs=1e-5)


async def test_deletes_a_document_and_no_other(store):
    await put(store, OURS, "a", "b", document="one")
    await put(store, OURS, "c", document="two")
    await store.delete(OURS, "one")
    await store.delete(OURS, "never there")
    assert await store.documents(OURS) == {"two": 1}
    assert ids(await store.nearest(OURS, axis(0), 10)) == ["c"]
    assert ids(await store.matching(OURS, {1: 1.0}, 10)) == ["c"]


@pytest.mark.parametrize("searched", [True, False])
async def test_deletes_what_is_not_kept_of_a_document(store, searched):
    edition = [f"new{number}" for number in range(1200)]
    for start in range(0, len(edition), 400):
        await put(store, OURS, *edition[start : start + 400], document="one")
    await put(store, OURS, "old1", "old2", document="one")
    await put(store, OURS, "c", document="two")
    await put(store, THEIRS, "old1", document="one")
    if searched:  # what is counted is kept in step; what is not is not looked for there
        assert len(await store.matching(OURS, {1: 1.0}, 5000)) == 1203
    await store.delete(OURS, "one", [*edition, "never there"])
    assert await store.documents(OURS) == {"one": 1200, "two": 1}
    assert await store.fetch(OURS, ["old1", "old2"]) == {}
    assert set(ids(await store.matching(OURS, {1: 1.0}, 5000))) == {*edition, "c"} == set(ids(await store.nearest(OURS, axis(0), 5000)))
    assert (await store.spread(OURS, [1])).containing == {1: 1201}
    assert await store.documents(THEIRS) == {"one": 1}
    await store.delete(OURS, "one", ["new7"])
    assert await store.documents(OURS) == {"one": 1, "two": 1}
    await store.delete(OURS, "one")
    assert await store.documents(OURS) == {"two": 1}


async def test_names_cannot_break_out_of_a_filter(store):
    for index, name in enumerate(NASTY):
        await put(store, Scope(name, "c"), f"{name}-{index}", document=name)
    await put(store, OURS, *NASTY, document="kept")
    for index, name in enumerate(NASTY):
        scope = Scope(name, "c")
        assert set(await store.fetch(scope, [f"{name}-{index}", *NASTY])) == {f"{name}-{index}"}
        assert await store.documents(scope) == {name: 1}
        await store.delete(scope, name)
        assert await store.documents(scope) == {}
    assert set(await store.fetch(OURS, NASTY)) == set(NASTY)
    assert await store.documents(OURS) == {"kept": len(NASTY)}
    assert {"kept"} == set(await store.documents(OURS))


async def test_keeps_many(store):
    many = [f"p{index}" for index in range(1203)]
    await put(store, OURS, *many)
    assert await store.documents(OURS) == {"d": 1203}
    assert len(await store.fetch(OURS, many)) == 1203
    assert len(await store.nearest(OURS, axis(0), 2000)) == 1203
    assert (await store.spread(OURS, [1])).containing == {1: 1203}


async def test_vectors_of_another_model_are_refused(store):
    await store.prepare("model", 4)
    for model, dimension in (("other", 4), ("model", 8)):
        with pytest.raises(EmbedderMismatch):
            await store.prepare(model, dimension)


# --- Milvus Lite alone ---------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "passages.db")


async def test_lite_finds_all_again_after_a_restart(path):
    before = MilvusPassages(path)
    await before.prepare("model", 4)
    await put(before, OURS, "a", "b")
    await before.aclose()
    after = MilvusPassages(path)
    await after.prepare("model", 4)
    assert await after.spread(OURS, [1]) == Spread(2, {1: 2})
    assert ids(await after.nearest(OURS, axis(1), 1)) == ["b"]
    with pytest.raises(EmbedderMismatch, match="capibara rag reembed"):
        await after.prepare("other", 4)
    await after.aclose()


async def test_lite_makes_vectors_anew(path):
    store = MilvusPassages(path)
    await store.prepare("model", 4)
    await put(store, OURS, "a", "b", "c")
    await put(store, THEIRS, "a")
    told: list[int] = []

    async def embed(passages):
        return np.stack([np.array([float(each.id == "b"), 1], np.float32) for each in passages])

    assert await store.reembed("better", 2, embed, told.append) == 4 == sum(told)
    await store.prepare("better", 2)
    assert ids(await store.nearest(OURS, np.array([1, 0], np.float32), 1)) == ["b"]
    assert len(await store.matching(OURS, {1: 1.0}, 9)) == 3
    assert await store.documents(THEIRS) == {"d": 1}
    await store.aclose()


async def test_lite_stays_as_it_was_when_making_vectors_anew_fails(path):
    store = MilvusPassages(path)
    await store.prepare("model", 4)
    await put(store, OURS, "a")

    async def broken(passages):
        raise OSError("the model fell over")

    with pytest.raises(OSError, match="fell over"):
        await store.reembed("better", 2, broken)
    await store.prepare("model", 4)
    assert ids(await store.nearest(OURS, axis(0), 1)) == ["a"]
    await store.aclose()


async def test_lite_serves_one_process(path):
    store = MilvusPassages(path)
    await store.prepare("model", 4)
    second = (
        "import asyncio, sys; from capibara_flow.engines.milvus import MilvusPassages\n"
        "asyncio.run(MilvusPassages(sys.argv[1]).prepare('model', 4))"
    )
    told = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", second, path], capture_output=True, text=True, check=False)
    assert told.returncode != 0
    assert "StoreInUse" in told.stderr
    assert "in use by another process" in told.stderr
    await store.aclose()


async def test_lite_wants_a_path_that_says_so(tmp_path):
    with pytest.raises(CannotStart, match=r"\.db"):
        await MilvusPassages(str(tmp_path / "folder")).prepare("model", 4)


async def test_a_passage_that_is_too_long_is_refused_as_such(path):
    store = MilvusPassages(path)
    await store.prepare("model", 4)
    with pytest.raises(DocumentRefused, match="cut it smaller"):
        await store.put(OURS, [passage("a", text="ñ" * 40_000)], axis(0)[None], [{1: 1.0}])
    await store.aclose()


async def test_the_event_loop_goes_on_while_milvus_works(path):
    store, turns = MilvusPassages(path), 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await store.prepare("model", 4)
    await put(store, OURS, *map(str, range(500)))
    counting.cancel()
    with suppress(asyncio.CancelledError):
        await counting
    assert turns > 50
    await store.aclose()


# --- a server, over the network ------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Milvus Lite's engine behind a port of its own, as a server; and what takes it away."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, kept, port = start_server_in_thread(data_dir=str(tmp_path / "served"), host="127.0.0.1", port=0)

    def stop() -> None:
        server.stop(grace=0).wait()

    yield f"http://127.0.0.1:{port}", stop
    stop()
    kept.close()


async def test_a_server_that_goes_away_is_unavailable(served):
    url, stop = served
    store = MilvusPassages(url, timeout=1)
    await store.prepare("model", 4)
    await put(store, OURS, "a")
    stop()
    for deed in (store.fetch(OURS, ["a"]), store.nearest(OURS, axis(0), 1), store.delete(OURS, "d"), store.documents(OURS)):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            await deed
    await store.aclose()


async def test_a_server_that_is_not_there_is_unavailable():
    store = MilvusPassages("http://127.0.0.1:1", timeout=0.5)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await store.prepare("model", 4)
    await store.aclose()


async def test_what_others_write_to_a_server_is_counted_soon(served):
    url, now = served[0], [1000.0]
    reader, writer = (MilvusPassages(url, clock=lambda: now[0]) for _ in range(2))
    await reader.prepare("model", 4)
    await put(writer, OURS, "a", "b")
    assert await reader.spread(OURS, [1]) == Spread(2, {1: 2})
    await put(writer, OURS, "c", document="e")
    assert await reader.spread(OURS, [1]) == Spread(2, {1: 2})
    now[0] += 31
    assert await reader.spread(OURS, [1]) == Spread(3, {1: 3})
    await writer.delete(OURS, "d")
    now[0] += 31
    assert await reader.spread(OURS, [1]) == Spread(1, {1: 1})
    await reader.aclose()
    await writer.aclose()
