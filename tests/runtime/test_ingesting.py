"""Documents in and out of the stores, with a crash at every step: nothing is lost, and nothing is there twice."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from capibara_flow.domain.chunking import Sizes
from capibara_flow.domain.ingesting import document_id
from capibara_flow.domain.parsed import Parsed, plain_blocks
from capibara_flow.errors import DocumentRefused, EmbedderMismatch
from capibara_flow.runtime.ingesting import File, Ingester
from tests.fakes_knowledge import Crash, FakeDocuments, FakeEmbedder, FakeGraph, FakePassages, Faults
from topics.knowledge import Document, Scope

SCOPE = Scope("acme")
NOW = datetime(2024, 2, 3, tzinfo=UTC)
FIRST = File(b"# Capibaras\n\n" + b"La capibara de Frida Kahlo vive en Argentina. " * 40, "a.txt", title="Capibaras")
SECOND = File(b"Otra cosa sobre Nueva York y nada que ver. " * 25, "a.txt", title="Ciudades")
ID = document_id(SCOPE, "a.txt")


def weights(text: str, language: str) -> Mapping[int, float]:
    return {len(word): 1.0 for word in text.split()}


@dataclass
class Bench:
    """An ingester over fakes that share their faults."""

    faults: Faults = field(default_factory=Faults)
    embedder: FakeEmbedder = field(init=False)
    passages: FakePassages = field(init=False)
    graph: FakeGraph = field(init=False)
    documents: FakeDocuments = field(init=False)
    ingester: Ingester = field(init=False)

    def __post_init__(self) -> None:
        self.embedder, self.passages = FakeEmbedder(faults=self.faults), FakePassages(self.faults)
        self.graph, self.documents = FakeGraph(self.faults), FakeDocuments(self.faults)
        self.restart()

    def restart(self) -> None:
        """Another process, which knows nothing."""
        self.ingester = Ingester(self.parse, self.embedder, self.passages, self.graph, self.documents, weights, Sizes(20, 30, 10), batch=3)

    async def parse(self, data: bytes, name: str = "", media_type: str | None = None) -> Parsed:
        async with self.faults.around("parse"):
            if data == b"broken":
                raise DocumentRefused("broken")
            return Parsed(data.decode(), plain_blocks(data.decode()), language="es")

    def crash_at(self, step: int | None) -> None:
        self.faults.passed.clear()
        self.faults.crash_at = step

    def kept(self) -> tuple[object, ...]:
        """All that the stores keep, in a form that can be compared."""
        passages = {
            id: (each.passage, tuple(each.dense.tolist()), dict(each.sparse)) for id, each in self.passages.kept.get(SCOPE, {}).items()
        }
        return passages, {id: each for id, each in self.graph.kept.get(SCOPE, {}).items() if each}, dict(self.documents.kept)


async def clean(*files: File) -> tuple[object, ...]:
    bench = Bench()
    for file in files:
        await bench.ingester.take_in(SCOPE, file, NOW)
    return bench.kept()


async def steps_of(bench: Bench, deed: str) -> int:
    bench.crash_at(None)
    await do(bench, deed)
    return len(bench.faults.passed)


async def do(bench: Bench, deed: str) -> object:
    if deed == "remove":
        return await bench.ingester.remove(SCOPE, ID)
    return await bench.ingester.take_in(SCOPE, FIRST if deed == "first" else SECOND, NOW)


async def prepared(deed: str) -> Bench:
    bench = Bench()
    if deed != "first":
        await bench.ingester.take_in(SCOPE, FIRST, NOW)
    return bench


@pytest.mark.parametrize("deed", ["first", "second", "remove"])
async def test_a_crash_at_any_step_is_undone_by_doing_it_again(deed: str) -> None:
    after = await prepared(deed)
    steps = await steps_of(after, deed)
    for step in range(steps):
        bench = await prepared(deed)
        bench.crash_at(step)
        with pytest.raises(Crash):
            await do(bench, deed)
        bench.restart()
        bench.crash_at(None)
        await do(bench, deed)
        assert bench.kept() == after.kept(), f"after a crash at step {step}"
        assert await bench.ingester.check() == []


@pytest.mark.parametrize("deed", ["first", "second", "remove"])
async def test_a_crash_at_any_step_is_found_by_the_check_and_repaired(deed: str) -> None:
    before, after = (await prepared(deed)).kept(), await prepared(deed)
    nothing = ({}, {}, {})
    for step in range(await steps_of(after, deed)):
        bench = await prepared(deed)
        bench.crash_at(step)
        with pytest.raises(Crash):
            await do(bench, deed)
        bench.restart()
        bench.crash_at(None)
        for finding in await bench.ingester.check():
            assert finding.address == "a.txt"
            await bench.ingester.repair(finding)
        assert bench.kept() in (before, after.kept(), nothing), f"after a crash at step {step}"
        assert await bench.ingester.check() == []
        await do(bench, deed)
        assert bench.kept() == after.kept()


async def test_what_was_embedded_before_a_crash_is_not_embedded_again() -> None:
    bench = Bench()
    await bench.ingester.take_in(SCOPE, FIRST, NOW)
    whole = sum(bench.embedder.batches)
    again = Bench()
    again.crash_at(bench.faults.passed.index("graph.put: before"))
    with pytest.raises(Crash):
        await again.ingester.take_in(SCOPE, FIRST, NOW)
    again.crash_at(None)
    await again.ingester.take_in(SCOPE, FIRST, NOW)
    assert sum(again.embedder.batches) == whole
    assert max(again.embedder.batches) == 3


async def test_the_same_file_is_unchanged_and_the_same_content_elsewhere_stands_for_it() -> None:
    bench = Bench()
    first = await bench.ingester.take_in(SCOPE, FIRST, NOW)
    kept = bench.kept()
    assert first.how == "created"
    assert (await bench.ingester.take_in(SCOPE, FIRST, NOW)).how == "unchanged"
    copy = await bench.ingester.take_in(SCOPE, File(FIRST.data, "copy.txt"), NOW)
    assert (copy.how, copy.document.id) == ("same", ID)
    assert bench.kept() == kept
    elsewhere = await bench.ingester.take_in(Scope("other"), File(FIRST.data, "copy.txt"), NOW)
    assert elsewhere.how == "created"


async def test_a_document_that_becomes_a_copy_leaves() -> None:
    bench = Bench()
    await bench.ingester.take_in(SCOPE, FIRST, NOW)
    await bench.ingester.take_in(SCOPE, File(SECOND.data, "b.txt", title="Ciudades"), NOW)
    taken = await bench.ingester.take_in(SCOPE, SECOND, NOW)
    assert (taken.how, taken.document.address) == ("same", "b.txt")
    assert await bench.documents.find(SCOPE, ID) is None
    assert await bench.ingester.check() == []


async def test_new_content_replaces_the_old_completely() -> None:
    bench = Bench()
    await bench.ingester.take_in(SCOPE, FIRST, NOW)
    assert (await bench.ingester.take_in(SCOPE, SECOND, NOW)).how == "replaced"
    assert bench.kept() == await clean(SECOND)


async def test_what_is_refused_changes_nothing() -> None:
    bench = Bench()
    await bench.ingester.take_in(SCOPE, FIRST, NOW)
    kept = bench.kept()
    for file in (File(b"broken", "a.txt"), File(b" \n ", "a.txt"), File(b"text")):
        with pytest.raises(DocumentRefused):
            await bench.ingester.take_in(SCOPE, file, NOW)
    bench.embedder.model = "another"
    with pytest.raises(EmbedderMismatch):
        await bench.ingester.take_in(SCOPE, SECOND, NOW)
    assert bench.kept() == kept


async def test_two_copies_at_once_become_one_document() -> None:
    bench = Bench()
    files = (File(FIRST.data, f"{number}.txt") for number in range(4))
    taken = await asyncio.gather(*(bench.ingester.take_in(SCOPE, file, NOW) for file in files))
    assert sorted(each.how for each in taken) == ["created", "same", "same", "same"]
    assert bench.ingester._locks == {}


async def test_what_is_being_worked_on_is_no_finding() -> None:
    bench = Bench(Faults(pause=0.001))
    working = asyncio.create_task(bench.ingester.take_in(SCOPE, FIRST, NOW))
    while not working.done():
        assert await bench.ingester.check([SCOPE]) == []
    await working


async def test_stores_that_lost_or_kept_too_much_are_mended() -> None:
    bench = Bench()
    await bench.ingester.take_in(SCOPE, FIRST, NOW)
    kept = bench.kept()
    one = next(iter(bench.passages.kept[SCOPE].values()))
    bench.passages.kept[SCOPE]["stray"] = type(one)(type(one.passage)("stray", ID, 99, "x", 0, 1), one.dense, one.sparse)
    await mended(bench, "rewrite")
    assert bench.kept() == kept
    bench.graph.kept[SCOPE].clear()
    await mended(bench, "relink")
    assert bench.kept() == kept
    bench.passages.kept[SCOPE].popitem()
    await mended(bench, "remove")
    assert bench.kept() == ({}, {}, {})
    assert (await bench.ingester.take_in(SCOPE, FIRST, NOW)).how == "created"


async def mended(bench: Bench, repair: str) -> None:
    (finding,) = await bench.ingester.check()
    assert finding.repair == repair
    await bench.ingester.repair(finding)
    assert await bench.ingester.check() == []


async def test_progress_is_told_to_the_end_and_dates_come_from_where_they_are_known() -> None:
    told: list[tuple[str, int, int]] = []
    bench = Bench()
    taken = await bench.ingester.take_in(SCOPE, FIRST, NOW, lambda *step: told.append(step))
    count = taken.document.passages
    assert told[0] == ("read", 1, 1)
    assert told[-2:] == [("passages", count, count), ("graph", 1, 1)]
    assert taken.document == Document(ID, SCOPE, "Capibaras", "a.txt", taken.document.digest, "es", NOW, passages=count)
    dated = File(SECOND.data, "b.txt", updated=datetime(2020, 1, 1))
    assert (await bench.ingester.take_in(SCOPE, dated, NOW)).document.updated == datetime(2020, 1, 1, tzinfo=UTC)
