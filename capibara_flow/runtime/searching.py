"""Finding what a question can be grounded in: by meaning, by words, and over two hops of the graph of what passages mention."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from capibara_flow.domain import bm25, linking, ranking
from capibara_flow.domain.linking import Path
from capibara_flow.domain.ranking import Found, Weights
from capibara_flow.ports import Embedder, GraphStore, PassageStore, Spread
from topics.knowledge import Passage, Scope, Source

#: All that finds passages: each can be left out, to see what it is good for.
FINDERS = frozenset({"dense", "lexical", "graph"})


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
class Question:
    """A question as it is looked for."""

    words: Sequence[bm25.Word]
    spread: Spread
    terms: Mapping[int, float]


class Searcher:
    """Searches *passages*, and *graph* where there is one; questions are embedded by *embedder*. Raises ``StoreUnavailable``."""

    def __init__(
        self,
        embedder: Embedder,
        passages: PassageStore,
        graph: GraphStore | None = None,
        *,
        weights: Weights = WEIGHTS,
        reach: Reach = REACH,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._embedder = embedder
        self._passages = passages
        self._graph = graph
        self._weights = weights
        self._reach = reach
        self._clock = clock

    async def search(self, scope: Scope, question: str, limit: int = 10, *, finders: frozenset[str] = FINDERS) -> list[Source]:
        """The best *limit* sources for *question*, numbered from 1; fewer where there are not so many."""
        asked = await self._asked(scope, question)
        near, matching, paths = await asyncio.gather(
            self._near(scope, question, finders), self._matching(scope, asked, finders), self._paths(scope, asked, finders)
        )
        found = Found(near, min(near.values(), default=0.0), matching, {}, paths)
        ids = dict.fromkeys((*list(near)[: self._reach.pool], *matching, *paths))
        first = ranking.ranked(found, dict.fromkeys(ids, 0.0), self._clock(), self._weights)
        passages = await self._passages.fetch(scope, [id for id, _, _ in first[: max(self._reach.read, 2 * limit)]])
        if "lexical" in finders:
            found = self._read(asked, found, passages)
        rows = ranking.ranked(found, {id: passages[id].updated for id in passages}, self._clock(), self._weights)
        kept = ranking.distinct((row[0] for row in rows), passages, limit, self._weights.duplicate)
        return ranking.numbered(rows, kept, passages)

    async def _asked(self, scope: Scope, question: str) -> Question:
        words = bm25.question_words(question)
        terms = list({term for word in words for term in word.terms})
        spread = await self._passages.spread(scope, terms)
        return Question(words, spread, bm25.question_weights(words, spread))

    async def _near(self, scope: Scope, question: str, finders: frozenset[str]) -> dict[str, float]:
        if "dense" not in finders:
            return {}
        vector = (await self._embedder.embed([question], "query"))[0]
        return {hit.passage: hit.score for hit in await self._passages.nearest(scope, vector, self._reach.near)}

    async def _matching(self, scope: Scope, asked: Question, finders: frozenset[str]) -> dict[str, float]:
        hits = await self._passages.matching(scope, asked.terms, self._reach.pool) if "lexical" in finders else ()
        return {hit.passage: hit.score for hit in hits}

    async def _paths(self, scope: Scope, asked: Question, finders: frozenset[str]) -> dict[str, Path]:
        """Where the entities that the question names lead to."""
        if self._graph is None or "graph" not in finders:
            return {}
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
