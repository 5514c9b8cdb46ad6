"""The search over its three finders, with stores that remember."""

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from capibara_flow.domain.bm25 import passage_weights, searchable
from capibara_flow.domain.entities import mentions
from capibara_flow.domain.ranking import Weights
from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.errors import StoreUnavailable
from capibara_flow.ports import Vectors
from capibara_flow.runtime.searching import Searcher, backdrop
from tests.fakes_knowledge import FakeEmbedder, FakeGraph, FakePassages, Faults
from tests.waiting import until
from topics.knowledge import Passage, Scope

OURS, THEIRS = Scope("ours"), Scope("theirs")
LIBRARY = {
    "The Straw Hat": "The Straw Hat is a film of 1974. Its music is by Isaac Schwartz and it stars Andrei Mironov.",
    "Isaac Schwartz": "Isaac Schwartz was born in 1923 in Romny.",
    "Andrei Mironov": "Andrei Mironov was an actor from Moscow.",
    "Hats": "A hat made of straw keeps the sun away. Where was the first hat of straw born? Nobody can say.",
    "El río Tajo": "El Tajo es el río más largo de la península. Nace en la sierra de Albarracín y desemboca en Lisboa.",
}


class Shelf:
    """A searcher over the fakes, which can be filled."""

    def __init__(self, **weights: float) -> None:
        self.faults = Faults()
        self.embedder, self.passages, self.graph = FakeEmbedder(dimension=64), FakePassages(self.faults), FakeGraph()
        self.searcher = Searcher(self.embedder, self.passages, self.graph, weights=Weights(**weights), clock=lambda: 1_800_000_000.0)

    async def fill(self, library: dict[str, str], scope: Scope = OURS, **more: object) -> None:
        for title, text in library.items():
            passage = Passage(title, f"d-{title}", 0, text, 0, len(text), title=title, **more)
            words = searchable(passage)
            await self.passages.put(scope, [passage], await self.embedder.embed([words]), [passage_weights(words)])
            await self.graph.put(scope, passage.document, mentions([passage], title))

    async def found(self, question: str, limit: int = 3, scope: Scope = OURS, **more: object) -> list[str]:
        return [source.passage.id for source in await self.searcher.search(scope, question, limit, **more)]


async def test_finds_over_two_hops_what_the_question_does_not_name():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    found = await shelf.searcher.search(OURS, "Where was the composer of film The Straw Hat born?", 4)
    assert found[0].passage.id == "The Straw Hat"
    assert "Isaac Schwartz" in [source.passage.id for source in found]
    assert [source.n for source in found] == [1, 2, 3, 4]
    by_id = {source.passage.id: source.parts for source in found}
    assert by_id["Isaac Schwartz"]["graph"] > 0
    assert set(found[0].parts) == {"vector", "graph", "recency", "dense", "lexical"}


async def test_without_the_graph_the_second_hop_is_not_found():
    shelf = Shelf()
    await shelf.fill({**LIBRARY, **{f"Composer {n}": f"This composer of film number {n} was born there." for n in range(6)}})
    question = "Where was the composer of film The Straw Hat born?"
    assert "Isaac Schwartz" not in await shelf.found(question, finders=frozenset({"dense", "lexical"}))
    assert "Isaac Schwartz" in await shelf.found(question)


async def test_works_without_a_graph_at_all():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    searcher = Searcher(shelf.embedder, shelf.passages, clock=lambda: 0.0)
    assert (await searcher.search(OURS, "¿Dónde nace el rio Tajo?", 1))[0].passage.id == "El río Tajo"


@pytest.mark.parametrize("finder", ["dense", "lexical", "graph"])
async def test_each_finder_finds_alone(finder):
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    assert (await shelf.found("Who was Isaac Schwartz", 1, finders=frozenset({finder})))[0] == "Isaac Schwartz"


async def test_looks_in_one_scope_only():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    await shelf.fill({"Romny": "Romny is a town of Isaac Schwartz."}, THEIRS)
    assert await shelf.found("Isaac Schwartz of Romny", 9, THEIRS) == ["Romny"]
    assert "Romny" not in await shelf.found("Isaac Schwartz of Romny", 9)
    assert await shelf.found("Isaac Schwartz", 9, Scope("nobody")) == []


async def test_says_the_same_once():
    shelf = Shelf()
    await shelf.fill({"One": LIBRARY["Hats"], "Two": LIBRARY["Hats"], "Three": "Something else about hats."})
    assert len(await shelf.found("a hat made of straw", 9)) == 2


async def test_the_newer_one_comes_first_where_all_else_is_equal():
    shelf = Shelf()
    await shelf.fill({"Old": "Prices of straw in the north"}, updated=1_500_000_000.0)
    await shelf.fill({"New": "Prices of straw in the south"}, updated=1_799_000_000.0)
    assert await shelf.found("prices of straw") == ["New", "Old"]


@pytest.mark.parametrize("question", ["", "?", "the of and", "😀", "a" * 5000, "\0", '"; drop', "¿¿¿"])
async def test_any_question_may_be_asked(question):
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    assert len(await shelf.found(question, 2)) <= 2


async def test_a_passage_that_goes_meanwhile_is_left_out():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    shelf.graph.kept[OURS]["d-gone"] = mentions([Passage("gone", "d-gone", 0, "", 0, 0)], "Isaac Schwartz")
    assert "gone" not in await shelf.found("Who is Isaac Schwartz", 9)


async def test_a_store_that_is_away_is_told():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    shelf.faults.error, shelf.faults.crash_at = StoreUnavailable("away"), len(shelf.faults.passed)
    with pytest.raises(StoreUnavailable):
        await shelf.found("hats")


@dataclass
class Slow(FakeEmbedder):
    """An embedder that waits until it is told to *go* on, and then fails if it is told *why*."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    why: Exception | None = None

    async def embed(self, texts: Sequence[str], kind: Kind = "query") -> Vectors:
        await self.go.wait()
        if self.why:
            raise self.why
        return await super().embed(texts, kind)


async def test_words_and_names_are_looked_for_while_the_question_is_embedded():
    shelf, slow = Shelf(), Slow(dimension=64)
    await shelf.fill(LIBRARY)
    before = len(shelf.faults.passed)
    looking = asyncio.create_task(Searcher(slow, shelf.passages, shelf.graph).search(OURS, "Who is Isaac Schwartz", 2))
    await until(
        lambda: "passages.matching: behind" in shelf.faults.passed[before:] and "graph.mentioning: behind" in shelf.graph.faults.passed
    )
    assert "passages.nearest: before" not in shelf.faults.passed[before:]
    slow.go.set()
    assert (await looking)[0].passage.id == "Isaac Schwartz"


async def test_an_embedder_that_fails_is_told():
    shelf, slow = Shelf(), Slow(dimension=64)
    await shelf.fill(LIBRARY)
    slow.why = StoreUnavailable("no model")
    slow.go.set()
    with pytest.raises(StoreUnavailable, match="no model"):
        await Searcher(slow, shelf.passages, shelf.graph).search(OURS, "hats")


@pytest.mark.parametrize("deed", ["passages.spread: before", "passages.matching: before", "passages.fetch: before"])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("why", [None, StoreUnavailable("no model")])
async def test_nothing_goes_on_behind_a_search_that_failed(deed: str, embedded: bool, why: Exception | None):
    shelf, slow, told = Shelf(), Slow(dimension=64), list[dict[str, object]]()
    await shelf.fill(LIBRARY)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    slow.why, before, searcher = why, asyncio.all_tasks(), Searcher(slow, shelf.passages, shelf.graph)
    if embedded or deed == "passages.fetch: before":  # which waits for the embedder
        slow.go.set()
    faults, shelf.graph.faults.pause = shelf.faults, 0.01  # what looks for names is still at it
    faults.error = StoreUnavailable("away")
    faults.watches = lambda: setattr(faults, "crash_at", len(faults.passed) - 1 if faults.passed[-1] == deed else None)
    with pytest.raises(StoreUnavailable):
        await searcher.search(OURS, "Who is Isaac Schwartz")
    assert asyncio.all_tasks() == before
    gc.collect()
    assert told == []


async def test_vectors_may_be_of_any_dimension():
    shelf = Shelf()
    shelf.embedder.dimension = 3
    await shelf.fill(LIBRARY)
    assert np.isfinite([source.score for source in await shelf.searcher.search(OURS, "hat", 5)]).all()


async def test_sources_tell_how_relevant_they_are_where_there_is_a_backdrop():
    shelf = Shelf()
    await shelf.fill(LIBRARY)
    against = await backdrop(shelf.embedder)
    searcher = Searcher(shelf.embedder, shelf.passages, shelf.graph, backdrop=against)
    exact = LIBRARY["El río Tajo"]
    assert (await searcher.search(OURS, exact, 1))[0].parts["relevance"] > 0.8
    measures = [each.parts["relevance"] for each in await searcher.search(OURS, "¿Cuánto suman siete y catorce?")]
    assert max(measures) < 0.4
    without = await searcher.search(OURS, exact, 1, finders=frozenset({"lexical", "graph"}))
    assert "relevance" not in without[0].parts
    again = await Searcher(shelf.embedder, shelf.passages, shelf.graph).search(OURS, exact, 3)
    assert [each.passage.id for each in again] == [each.passage.id for each in await searcher.search(OURS, exact, 3)]
