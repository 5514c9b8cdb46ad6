"""Documents in and out of the stores, with a crash at every step: nothing is lost, and nothing is there twice."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from capibara_flow.domain.chunking import Sizes
from capibara_flow.domain.ingesting import document_id, passage_ids
from capibara_flow.domain.parsed import Parsed, plain_blocks
from capibara_flow.errors import DocumentRefused, EmbedderMismatch
from capibara_flow.runtime.ingesting import File, Ingester
from tests.fakes_knowledge import Crash, FakeDocuments, FakeEmbedder, FakeGraph, FakePassages, Faults
from topics.knowledge import Document, Mention, Scope

SCOPE = Scope("acme")
NOW = datetime(2024, 2, 3, tzinfo=UTC)
FIRST = File(b"# Capibaras\n\n" + b"La capibara de Frida Kahlo vive en Argentina. " * 24, "a.txt", title="Capibaras")
SECOND = File(b"Otra cosa sobre Nueva York y nada que ver. " * 13, "a.txt", title="Ciudades")
RENAMED = File(FIRST.data, "a.txt", title="Otro nombre")
FILES = {"first": FIRST, "second": SECOND, "renamed": RENAMED}
DEEDS = (*FILES, "remove")
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
        graph = {id: each for id, each in self.graph.kept.get(SCOPE, {}).items() if each}
        return passages, graph, dict(self.documents.kept), dict(self.documents.others)

    def seen(self) -> tuple[object, ...]:
        """All that a search may see: passages and mentions of what is ready."""
        ready = [each for state, each in self.documents.kept.values() if state == "ready"]
        ids = {id for each in ready for id in passage_ids(each)}
        passages = {id: each.passage for id, each in self.passages.kept.get(SCOPE, {}).items() if id in ids}
        graph = {id: each for id, each in self.graph.kept.get(SCOPE, {}).items() if each and each[0].passage in ids}
        return passages, graph, ready


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
    return await bench.ingester.take_in(SCOPE, FILES[deed], NOW)


async def prepared(deed: str) -> Bench:
    bench = Bench()
    if deed != "first":
        await bench.ingester.take_in(SCOPE, FIRST, NOW)
    return bench


@pytest.mark.parametrize("deed", DEEDS)
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


@pytest.mark.parametrize("deed", DEEDS)
async def test_a_crash_at_any_step_is_found_by_the_check_and_repaired(deed: str) -> None:
    before, after = (await prepared(deed)).kept(), await prepared(deed)
    nothing = ({}, {}, {}, {})
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


@pytest.mark.parametrize("deed", DEEDS)
async def test_a_search_sees_what_was_or_what_is_at_every_step(deed: str) -> None:
    bench, seen = await prepared(deed), []
    bench.faults.watches = lambda: seen.append(bench.seen())
    before = bench.seen()
    await do(bench, deed)
    after = bench.seen()
    assert before != after
    turned = seen.index(after)
    assert seen == [before] * turned + [after] * (len(seen) - turned)
    for passages, _, ready in (before, after):
        assert set(passages) == {id for each in ready for id in passage_ids(each)}


async def done(*deeds: str) -> Bench:
    """Stores in which *deeds* were done, one after the other, and nothing went wrong; ours alone."""
    if deeds not in _DONE:
        bench = await done(*deeds[:-1]) if deeds else Bench()
        if deeds:
            await do(bench, deeds[-1])
        _DONE[deeds] = bench
    return copied(_DONE[deeds])


_DONE: dict[tuple[str, ...], Bench] = {}


def copied(bench: Bench) -> Bench:
    """Another one whose stores hold the same."""
    other = Bench()
    other.passages.space = bench.passages.space
    other.passages.kept = {scope: dict(kept) for scope, kept in bench.passages.kept.items()}
    other.graph.kept = {scope: dict(kept) for scope, kept in bench.graph.kept.items()}
    mine, its = other.documents, bench.documents
    mine.kept, mine.others, mine.came, mine.revisions = dict(its.kept), dict(its.others), dict(its.came), Counter(its.revisions)
    return other


async def broken_off(bench: Bench, deed: str, step: int) -> bool:
    """Do *deed*, and break it off at *step*; whether it came to that."""
    bench.crash_at(step)
    with suppress(Crash):
        await do(bench, deed)
        return False
    bench.restart()
    bench.crash_at(None)
    return True


@pytest.mark.parametrize("before", [(), ("first",), ("second", "first"), ("first", "remove")], ids="-".join)
async def test_whatever_was_broken_off_where_the_next_deed_ends_as_if_nothing_had(before: tuple[str, ...]) -> None:
    """Each deed, broken off at each step, behind each history, before each other deed."""
    for torn in DEEDS:
        visible = ((await done(*before)).seen(), (await done(*before, torn)).seen())
        step = 0
        while await broken_off(bench := await done(*before), torn, step):
            assert bench.seen() in visible, f"{torn} until {step}"
            for last in DEEDS:
                again, after = copied(bench), await done(*before, torn, last)
                seen = {repr(each) for each in (bench.seen(), after.seen())}
                again.faults.watches = lambda again=again, seen=seen: seen.add(repr(again.seen()))
                await do(again, last)
                assert again.kept() == after.kept(), f"{torn} until {step}, {last}"
                assert len(seen) <= 2, f"{torn} until {step}, {last}"
            step += 1


async def test_of_two_that_are_broken_off_one_after_the_other_nothing_stays() -> None:
    after, step = (await done("first", "second")).kept(), 0
    while await broken_off(torn := await done("first"), "renamed", step):
        second = 0
        while await broken_off(again := copied(torn), "second", second):
            await do(again, "second")
            assert again.kept() == after, f"renamed until {step}, second until {second}"
            second += 1
        step += 1


async def test_what_a_release_before_there_were_editions_took_in_is_replaced_and_removed() -> None:
    for deed in ("renamed", "second", "remove"):
        bench = await earlier()
        assert await bench.ingester.check() == []
        await do(bench, deed)
        assert bench.kept() == (await done("first", deed)).kept()
    bench = await earlier()
    assert (await bench.ingester.take_in(SCOPE, FIRST, NOW)).how == "unchanged"


async def earlier() -> Bench:
    """Stores as an earlier release left them: neither list nor passages nor graph know of editions."""
    bench = await prepared("second")
    ((_, document),) = bench.documents.kept.values()
    old = replace(document, edition="")
    bench.documents.kept[SCOPE, ID] = ("ready", old)
    names = dict(zip(passage_ids(document), passage_ids(old), strict=True))
    bench.passages.kept[SCOPE] = {
        names[id]: replace(each, passage=replace(each.passage, id=names[id])) for id, each in bench.passages.kept[SCOPE].items()
    }
    ((_, mentions),) = bench.graph.kept[SCOPE].items()
    bench.graph.kept[SCOPE] = {ID: [replace(each, passage=names[each.passage]) for each in mentions]}
    return bench


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
    embedded = len(bench.embedder.batches)
    await mended(bench, "trim")
    assert bench.kept() == kept
    assert len(bench.embedder.batches) == embedded
    bench.graph.kept[SCOPE][f"{ID}.another"] = next(iter(bench.graph.kept[SCOPE].values()))
    await mended(bench, "trim")
    assert bench.kept() == kept
    bench.graph.kept[SCOPE].clear()
    await mended(bench, "relink")
    assert bench.kept() == kept
    bench.passages.kept[SCOPE].popitem()
    await mended(bench, "remove")
    assert bench.kept() == ({}, {}, {}, {})
    bench.graph.kept[SCOPE] = {f"{ID}.another": [Mention(f"{ID}.another.0", "frida", "Frida")]}
    ids = {each.document for each in await bench.ingester.check([SCOPE])}
    assert ids == {ID}
    for finding in await bench.ingester.check([SCOPE]):
        await bench.ingester.repair(finding)
    assert bench.kept() == ({}, {}, {}, {})
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
    assert taken.document == Document(
        ID, SCOPE, "Capibaras", "a.txt", taken.document.digest, "es", NOW, passages=count, edition=taken.document.edition
    )
    dated = File(SECOND.data, "b.txt", updated=datetime(2020, 1, 1))
    assert (await bench.ingester.take_in(SCOPE, dated, NOW)).document.updated == datetime(2020, 1, 1, tzinfo=UTC)
