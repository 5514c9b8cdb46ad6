"""A search while documents change: each is seen as it was or as it is, whole, whatever happens in which order."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from capibara_flow.domain.bm25 import passage_weights
from capibara_flow.domain.ingesting import document_id, passage_ids
from capibara_flow.errors import StoreUnavailable
from capibara_flow.ports import Edition, Standing
from capibara_flow.runtime.editions import Moved, View
from capibara_flow.runtime.ingesting import File
from capibara_flow.runtime.searching import Searcher
from tests.fakes_knowledge import Crash, Faults
from tests.runtime.test_ingesting import NOW, SCOPE, Bench
from topics.knowledge import Document, Passage

ID = document_id(SCOPE, "a.txt")


@dataclass
class Uneven(Faults):
    """Deeds that take their time, now more, now less, as *chance* has it."""

    chance: random.Random = field(default_factory=random.Random)

    async def _pass(self, name: str) -> None:
        for _ in range(self.chance.choice((0, 0, 1, 2, 5, 20))):
            await asyncio.sleep(0)
        await super()._pass(name)


def written(word: str, passages: int = 4, title: str = "Capibaras") -> File:
    """A file of as many *passages* that all speak of capybaras, and of *word*."""
    blocks = (
        f"{' '.join(f'{word}{block}{letter}' for letter in 'abcdefghijklmnopqrst')} capibaras acuáticas {word}."
        for block in range(passages)
    )
    return File("\n\n".join(blocks).encode(), "a.txt", title=title)


class Shelf(Bench):
    """Stores that somebody searches meanwhile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ingester.sparse, self.ingester.batch = passage_weights, 1
        self.searcher = Searcher(self.embedder, self.passages, self.graph, clock=lambda: 1.8e9, stand=self.documents.standing)

    async def take_in(self, file: File) -> Document:
        return (await self.ingester.take_in(SCOPE, file, NOW)).document

    async def found(self, question: str = "capibaras acuáticas", limit: int = 10) -> list[str]:
        return [each.passage.id for each in await self.searcher.search(SCOPE, question, limit)]


def uneven(seed: int) -> Shelf:
    return Shelf(Uneven(chance=random.Random(seed)))


async def searched_while(shelf: Shelf, deed: Callable[[], Awaitable[object]]) -> list[frozenset[str]]:
    """What searches find that go on, three at a time, until *deed* is done, and one after that."""
    working, found = asyncio.ensure_future(deed()), list[frozenset[str]]()

    async def look() -> None:
        while not working.done():
            found.append(frozenset(await shelf.found()))

    await asyncio.gather(*(look() for _ in range(3)), working)
    return [*found, frozenset(await shelf.found())]


@pytest.mark.parametrize("seed", range(40))
async def test_a_changed_document_is_found_as_it_was_or_as_it_is(seed: int) -> None:
    shelf = uneven(seed)
    old = await shelf.take_in(written("old"))
    kinds = {"other": written("new", 3), "renamed": written("old", title="Carpinchos"), "longer": written("old", 6)}
    file = kinds[random.Random(seed).choice(list(kinds))]
    seen = await searched_while(shelf, lambda: shelf.take_in(file))
    new = await shelf.documents.find(SCOPE, ID)
    assert new is not None
    whole = [frozenset(passage_ids(old)), frozenset(passage_ids(new))]
    assert set(seen) <= set(whole)
    assert seen[-1] == whole[1]


@pytest.mark.parametrize("seed", range(20))
async def test_a_new_document_is_found_whole_or_not_at_all(seed: int) -> None:
    shelf = uneven(seed)
    seen = await searched_while(shelf, lambda: shelf.take_in(written("new")))
    new = await shelf.documents.find(SCOPE, ID)
    assert new is not None
    assert set(seen) <= {frozenset(), frozenset(passage_ids(new))}


@pytest.mark.parametrize("seed", range(20))
async def test_of_a_document_that_changes_again_and_again_there_is_always_one(seed: int) -> None:
    shelf = uneven(seed)
    first = await shelf.take_in(written("old"))
    whole = {frozenset(passage_ids(first))}

    async def change() -> None:
        for number in range(5):
            whole.add(frozenset(passage_ids(await shelf.take_in(written(f"new{number}")))))

    assert set(await searched_while(shelf, change)) <= whole


async def test_a_removed_document_is_found_no_more_as_soon_as_that_is_noted() -> None:
    shelf = Shelf()
    await shelf.take_in(written("old"))
    shelf.crash_at(1)  # behind the first deed, which notes it
    with pytest.raises(Crash):
        await shelf.ingester.remove(SCOPE, ID)
    shelf.crash_at(None)
    assert len(shelf.passages.kept[SCOPE]) == 4
    assert await shelf.found() == []


async def test_what_is_half_taken_in_does_not_stand_before_what_is_ready() -> None:
    shelf = Shelf()
    await shelf.ingester.take_in(SCOPE, File(b"Un manual con unas palabras sobre capibaras.", "b.txt", title="Manual"), NOW)
    many = written("capibaras acuáticas", 700)
    shelf.crash_at(None)
    shelf.faults.error = StoreUnavailable("away")
    shelf.faults.watches = lambda: setattr(shelf.faults, "crash_at", _behind(shelf.faults.passed, "graph.put: before"))
    with pytest.raises(StoreUnavailable):
        await shelf.take_in(many)
    shelf.faults.watches, shelf.faults.crash_at = lambda: None, None
    assert len(shelf.passages.kept[SCOPE]) > 600
    assert [each.passage.title for each in await shelf.searcher.search(SCOPE, "capibaras acuáticas", 5)] == ["Manual"]


def _behind(passed: Sequence[str], name: str) -> int | None:
    return len(passed) - 1 if passed[-1] == name else None


async def test_a_library_that_changes_without_end_is_searched_all_the_same() -> None:
    shelf, revision = Shelf(), 0
    made = await shelf.take_in(written("old"))

    async def stand(scope: object, ids: Sequence[str]) -> Standing:
        nonlocal revision
        revision += 1
        return Standing(revision, {id: Edition(made.edition, revision) for id in ids})

    searcher = Searcher(shelf.embedder, shelf.passages, shelf.graph, stand=stand)
    shelf.embedder.batches.clear()
    assert len(await searcher.search(SCOPE, "capibaras acuáticas", 10)) == 4
    assert revision > 4  # it was begun again and again,
    assert shelf.embedder.batches == [1]  # but the question means the same each time


async def test_passages_of_earlier_releases_and_of_libraries_without_a_list_are_found() -> None:
    shelf = Shelf()
    one = Passage("0f" * 20, "d", 0, "capibaras", 0, 9)
    await shelf.passages.put(SCOPE, [one], np.ones((1, 32), np.float32), [passage_weights("capibaras")])
    assert await shelf.found("capibaras") == [one.id]
    stray = Passage(f"{ID}.e1.0", ID, 0, "otras capibaras", 0, 15)
    await shelf.passages.put(SCOPE, [stray], np.ones((1, 32), np.float32), [passage_weights("otras capibaras")])
    assert await shelf.found("capibaras") == [one.id]
    plain = Searcher(shelf.embedder, shelf.passages, shelf.graph)
    assert len(await plain.search(SCOPE, "capibaras", 10)) == 2


async def test_what_vanishes_of_a_document_that_stands_is_no_reason_to_look_again() -> None:
    asked: list[Sequence[str]] = []

    async def stand(scope: object, ids: Sequence[str]) -> Standing:
        asked.append(ids)
        return Standing(7, {"d": Edition("e1", 7 if len(asked) < 4 else 8)})

    view = View(SCOPE, stand)
    await view.begin()
    assert await view.ready(["d.e1.0", "d.e2.0", "x.e1.0", "old"]) == {"d.e1.0", "old"}
    await view.whole(["d.e1.0", "old"], ["d.e1.0"])
    await view.whole(["d.e1.0"], [])
    with pytest.raises(Moved):
        await view.whole(["d.e1.0"], [])
    assert asked == [(), ["d", "x"], ["d"], ["d"]]
