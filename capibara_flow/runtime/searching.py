"""Finding what a question can be grounded in: by meaning, by words, and over two hops of the graph of what passages mention."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from capibara_flow.domain import bm25, linking, ordinary, ranking, relevance
from capibara_flow.domain.linking import Path
from capibara_flow.domain.ranking import Found, Weights
from capibara_flow.domain.relevance import Backdrop
from capibara_flow.ports import Embedder, GraphStore, PassageStore, Spread, Vectors
from capibara_flow.runtime.editions import Moved, Stand, View
from capibara_flow.tasks import ended
from topics.knowledge import Passage, Scope, Source

#: All that finds passages: each can be left out, to see what it is good for.
FINDERS = frozenset({"dense", "lexical", "graph"})
#: How often is looked again when a document changed meanwhile; how much further where what is not ready stands in the way, and at most.
_AGAIN, _WIDER, _WIDEST = 4, 8, 512


@dataclass(frozen=True, slots=True)
class Reach:
    """How far is looked: *near* passages by meaning (the last one is what says nothing), *pool* by each finder are ranked.

    Of an entity that the question names at most *about* passages, of one behind these *beyond* are taken; at most *seeds* passages
    lead on, over at most *leading* entities that they mention. The *read* best are read, and ranked by their sentences as well.
    """

    near: int = 100
    pool: int = 30
    about: int = 20
    beyond: int = 3
    seeds: int = 8
    leading: int = 40
    read: int = 24


#: The documented defaults.
WEIGHTS, REACH = Weights(), Reach()


@dataclass(frozen=True, slots=True)
class Query:
    """What is wanted: the best *limit* sources of *scope* for *text*, by *finders*.

    Its vector, *meaning*, becomes known meanwhile (none where meaning does not count).
    """

    scope: Scope
    text: str
    limit: int
    finders: frozenset[str]
    meaning: "asyncio.Task[Vectors | None]"


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is looked for by words and names; its *language* (ISO 639-1) is empty where it cannot be told."""

    language: str
    words: Sequence[bm25.Word]
    spread: Spread
    terms: Mapping[int, float]


async def backdrop(embedder: Embedder) -> Backdrop:
    """What questions stand out against, by the vectors of *embedder*: made once for a model, in a second or two with a slow one."""
    return relevance.backdrop({language: await embedder.embed(texts, "passage") for language, texts in ordinary.TEXTS.items()})


class Searcher:
    """Searches *passages*, and *graph* where there is one; questions are embedded by *embedder*. Raises ``StoreUnavailable``.

    *stand* tells what is ready; without it all that is found counts. With a *backdrop* each source tells how relevant it is, see
    ``domain.relevance``.
    """

    def __init__(
        self,
        embedder: Embedder,
        passages: PassageStore,
        graph: GraphStore | None = None,
        *,
        weights: Weights = WEIGHTS,
        reach: Reach = REACH,
        clock: Callable[[], float] = time.time,
        stand: Stand | None = None,
        backdrop: Backdrop | None = None,
    ) -> None:
        self._embedder = embedder
        self._passages = passages
        self._graph = graph
        self._weights = weights
        self._reach = reach
        self._clock = clock
        self._stand = stand
        self._backdrop = backdrop

    async def search(self, scope: Scope, question: str, limit: int = 10, *, finders: frozenset[str] = FINDERS) -> list[Source]:
        """The best *limit* sources for *question*, numbered from 1; fewer where there are not so many.

        Each document is seen as it was or as it is, should it change meanwhile.
        """
        async with self._asking(scope, question, limit, finders) as query:
            for again in range(_AGAIN + 1):
                with suppress(Moved):
                    return await self._search(View(scope, self._stand, last=again == _AGAIN), query)
        raise AssertionError("the last view does not move")

    @asynccontextmanager
    async def _asking(self, scope: Scope, text: str, limit: int, finders: frozenset[str]) -> AsyncIterator[Query]:
        """A query whose text is embedded, which takes longest, once and beside all that does not need the vector."""
        meaning = asyncio.create_task(self._vector(text, finders))
        async with _ended(meaning):
            yield Query(scope, text, limit, finders, meaning)

    async def _search(self, view: View, query: Query) -> list[Source]:
        asked, _ = await asyncio.gather(self._asked(query), view.begin())
        near, matching, paths = await self._ready(view, query, asked)
        found = Found(near, min(near.values(), default=0.0), matching, {}, paths)
        ids = dict.fromkeys((*list(near)[: self._reach.pool], *matching, *paths))
        first = ranking.ranked(found, dict.fromkeys(ids, 0.0), self._clock(), self._weights)
        best = [id for id, _, _ in first[: max(self._reach.read, 2 * query.limit)]]
        passages = await self._passages.fetch(query.scope, best)
        await view.whole(best, passages)
        if "lexical" in query.finders:
            found = self._read(asked, found, passages)
        rows = ranking.ranked(found, {id: passages[id].updated for id in passages}, self._clock(), self._weights)
        kept = ranking.distinct((row[0] for row in rows), passages, query.limit, self._weights.duplicate)
        return self._measured(asked, await query.meaning, found, ranking.numbered(rows, kept, passages))

    async def _asked(self, query: Query) -> Question:
        words = bm25.question_words(query.text)
        spread = await self._passages.spread(query.scope, list({term for word in words for term in word.terms}))
        return Question(bm25.language_of(query.text), words, spread, bm25.question_weights(words, spread))

    async def _vector(self, question: str, finders: frozenset[str]) -> "Vectors | None":
        return (await self._embedder.embed([question], "query"))[0] if "dense" in finders else None

    async def _ready(self, view: View, query: Query, asked: Question) -> tuple[dict[str, float], dict[str, float], dict[str, Path]]:
        """What is found of documents that are ready; where others stand before it, a finder looks further."""
        by_meaning, by_words = asyncio.create_task(self._near(query)), asyncio.create_task(self._matching(query, asked))
        by_names = asyncio.create_task(self._paths(query, asked))
        async with _ended(by_meaning, by_words, by_names):
            near, matching, paths = await asyncio.gather(by_meaning, by_words, by_names)
        ranked = {*islice(near, self._reach.pool), *matching, *paths}
        if await view.ready(ranked) == ranked:
            return near, matching, paths
        wider = 1
        while True:
            ready = await view.ready({*near, *matching, *paths})
            close, like = _first(near, ready, self._reach.near), _first(matching, ready, self._reach.pool)
            few = len(near) == self._reach.near * wider and len(close) < self._reach.pool
            few |= len(matching) == self._reach.pool * wider and len(like) < self._reach.pool // 2
            if not few or wider >= _WIDEST:
                return close, like, {id: path for id, path in paths.items() if id in ready}
            wider *= _WIDER
            near, matching = await asyncio.gather(self._near(query, wider), self._matching(query, asked, wider))

    async def _near(self, query: Query, wider: int = 1) -> dict[str, float]:
        if (vector := await query.meaning) is None:
            return {}
        return {hit.passage: hit.score for hit in await self._passages.nearest(query.scope, vector, self._reach.near * wider)}

    async def _matching(self, query: Query, asked: Question, wider: int = 1) -> dict[str, float]:
        if "lexical" not in query.finders:
            return {}
        hits = await self._passages.matching(query.scope, asked.terms, self._reach.pool * wider)
        return {hit.passage: hit.score for hit in hits}

    async def _paths(self, query: Query, asked: Question) -> dict[str, Path]:
        """Where the entities that the question names lead to."""
        if self._graph is None or "graph" not in query.finders:
            return {}
        scope = query.scope
        degrees = await self._graph.degrees(scope, list(linking.names(asked.words)))
        entities = linking.linked(asked.words, degrees, asked.spread)
        if not entities:
            return {}
        passages, weight = asked.spread.passages, self._weights.mentioning
        mentions = await self._graph.mentioning(scope, list(entities), self._reach.about)
        first = linking.first_hop(entities, mentions, degrees, passages, weight)
        seeds = dict(sorted(first.items(), key=lambda each: (-each[1].strength, each[0]))[: self._reach.seeds])
        mentioned = [each for each in await self._graph.mentioned(scope, list(seeds)) if each.entity not in entities]
        beyond = await self._graph.degrees(scope, list(dict.fromkeys(each.entity for each in mentioned)))
        leading = linking.leading(seeds, mentioned, beyond, passages)[: self._reach.leading]
        further = await self._graph.mentioning(scope, leading, self._reach.beyond)
        second = linking.second_hop(seeds, mentioned, further, beyond, passages=passages, mentioning=weight)
        return {**second, **{id: path for id, path in first.items() if path.strength >= second.get(id, path).strength}}

    def _read(self, asked: Question, found: Found, passages: Mapping[str, Passage]) -> Found:
        """*found* with what only the texts of *passages* tell: the words of those that the graph added, and the best sentence of each."""
        unknown = [passages[id] for id in found.paths if id in passages and id not in found.lexical]
        products = {each.id: bm25.product(asked.terms, bm25.passage_weights(bm25.searchable(each), each.language)) for each in unknown}
        sentences = {id: self._coverage(asked, passage) for id, passage in passages.items()}
        return Found(found.dense, found.floor, {**found.lexical, **products}, sentences, found.paths)

    def _coverage(self, asked: Question, passage: Passage) -> float:
        above = "\n".join((passage.title, *passage.headings))
        return bm25.coverage(passage.text, passage.language, asked.words, asked.spread, above)

    def _measured(self, asked: Question, vector: "Vectors | None", found: Found, sources: list[Source]) -> list[Source]:
        """*sources*, each with its relevance where there is a backdrop."""
        if self._backdrop is None or vector is None:
            return sources
        levels = self._backdrop.levels(vector)
        return [replace(each, parts={**each.parts, relevance.PART: _relevance(asked, found, levels, each.passage)}) for each in sources]


@asynccontextmanager
async def _ended(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Behind the block none of *tasks* goes on; a fault of which nobody waits to hear any more is no news."""
    try:
        yield
    finally:
        await ended(*tasks)


def _relevance(asked: Question, found: Found, levels: Mapping[str, float], passage: Passage) -> float:
    words = relevance.granted(found.coverage.get(passage.id, 0.0), asked.language, passage.language)
    # Those that are not among the nearest are at most as near as the last one of them.
    cosine = found.dense.get(passage.id, found.floor)
    return round(relevance.relevance(cosine, levels.get(passage.language, levels[""]), words, asked.spread.passages), 4)


def _first(scores: Mapping[str, float], wanted: Collection[str], count: int) -> dict[str, float]:
    """The first *count* of *scores* that are *wanted*, in their order."""
    return dict(islice(((id, score) for id, score in scores.items() if id in wanted), count))
