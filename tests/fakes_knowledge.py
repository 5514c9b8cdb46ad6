"""Fakes of the knowledge ports: stores in memory that remember, that can be slow, and that can fail before or behind any deed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

import numpy as np

from capibara_flow.errors import EmbedderMismatch
from capibara_flow.ports import Edition, Spread, Standing, Vectors
from topics.knowledge import Document, Hit, Mention, Passage, Scope


class Crash(Exception):
    """The process died here."""


@dataclass
class Faults:
    """What happens at the deeds of all fakes that share it: each passes here twice, before it is done and behind.

    *pause* seconds go by; at the *crash_at*-th passing (from 0), *error* is raised. *passed* tells by name what went on; who *watches* is
    called each time.
    """

    crash_at: int | None = None
    error: Exception = field(default_factory=Crash)
    pause: float = 0.0
    passed: list[str] = field(default_factory=list)
    watches: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def around(self, name: str) -> AsyncIterator[None]:
        await self._pass(f"{name}: before")
        yield
        await self._pass(f"{name}: behind")

    async def _pass(self, name: str) -> None:
        await asyncio.sleep(self.pause)
        self.passed.append(name)
        self.watches()
        if len(self.passed) - 1 == self.crash_at:
            raise self.error


@dataclass
class FakeEmbedder:
    """``ports.Embedder``: texts that share words have like vectors; *batches* is how many texts came at a time."""

    model: str = "fake"
    dimension: int = 32
    faults: Faults = field(default_factory=Faults)
    batches: list[int] = field(default_factory=list)

    async def embed(self, texts: Sequence[str], kind: Literal["query", "passage"] = "query") -> Vectors:
        async with self.faults.around("embedder.embed"):
            self.batches.append(len(texts))
            rows = np.zeros((len(texts), self.dimension), np.float32)
            for row, text in zip(rows, texts, strict=True):
                for word in text.lower().split():
                    row[int(sha256(word.encode()).hexdigest(), 16) % self.dimension] += 1
            lengths = np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32)
            unit: Vectors = rows / np.maximum(lengths, np.float32(1e-9))
            return unit

    async def aclose(self) -> None:
        return None


@dataclass(frozen=True)
class Kept:
    """A passage as ``FakePassages`` keeps it."""

    passage: Passage
    dense: Vectors
    sparse: Mapping[int, float]


@dataclass
class FakePassages:
    """``ports.PassageStore``: *kept* is by scope and passage id, *space* the model that it was prepared for."""

    faults: Faults = field(default_factory=Faults)
    kept: dict[Scope, dict[str, Kept]] = field(default_factory=dict)
    space: tuple[str, int] | None = None

    async def prepare(self, model: str, dimension: int) -> None:
        async with self.faults.around("passages.prepare"):
            if self.space not in (None, (model, dimension)):
                raise EmbedderMismatch(f"kept: {self.space}")
            self.space = (model, dimension)

    async def put(self, scope: Scope, passages: Sequence[Passage], dense: Vectors, sparse: Sequence[Mapping[int, float]]) -> None:
        async with self.faults.around("passages.put"):
            rows = zip(passages, dense, sparse, strict=True)
            self.kept.setdefault(scope, {}).update({each.id: Kept(each, row, weights) for each, row, weights in rows})

    async def delete(self, scope: Scope, document: str, keep: Collection[str] = ()) -> None:
        async with self.faults.around("passages.delete"):
            here = self.kept.get(scope, {})
            self.kept[scope] = {id: each for id, each in here.items() if each.passage.document != document or id in keep}

    async def nearest(self, scope: Scope, vector: Vectors, limit: int) -> list[Hit]:
        async with self.faults.around("passages.nearest"):
            query = np.asarray(vector, np.float32).reshape(-1)
            return _best({id: float(each.dense @ query) for id, each in self.kept.get(scope, {}).items()}, limit)

    async def matching(self, scope: Scope, terms: Mapping[int, float], limit: int) -> list[Hit]:
        async with self.faults.around("passages.matching"):
            here = self.kept.get(scope, {}).items()
            scores = {id: sum(weight * each.sparse.get(term, 0.0) for term, weight in terms.items()) for id, each in here}
            return _best({id: score for id, score in scores.items() if score > 0}, limit)

    async def spread(self, scope: Scope, terms: Sequence[int]) -> Spread:
        async with self.faults.around("passages.spread"):
            here = self.kept.get(scope, {}).values()
            counts = {term: sum(term in each.sparse for each in here) for term in terms}
            return Spread(len(here), {term: count for term, count in counts.items() if count})

    async def fetch(self, scope: Scope, ids: Sequence[str]) -> dict[str, Passage]:
        async with self.faults.around("passages.fetch"):
            here = self.kept.get(scope, {})
            return {id: here[id].passage for id in ids if id in here}

    async def documents(self, scope: Scope) -> dict[str, int]:
        async with self.faults.around("passages.documents"):
            return dict(Counter(each.passage.document for each in self.kept.get(scope, {}).values()))

    async def aclose(self) -> None:
        return None


def _best(scores: Mapping[str, float], limit: int) -> list[Hit]:
    order = sorted(scores, key=lambda id: (-scores[id], id))
    return [Hit(id, scores[id]) for id in order[:limit]]


@dataclass
class FakeGraph:
    """``ports.GraphStore``: *kept* is by scope and document."""

    faults: Faults = field(default_factory=Faults)
    kept: dict[Scope, dict[str, list[Mention]]] = field(default_factory=dict)

    def _all(self, scope: Scope) -> list[Mention]:
        return [mention for mentions in self.kept.get(scope, {}).values() for mention in mentions]

    async def put(self, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
        async with self.faults.around("graph.put"):
            here = self.kept.setdefault(scope, {})
            here.pop(document, None)
            if mentions:
                here[document] = list(mentions)

    async def delete(self, scope: Scope, document: str) -> None:
        async with self.faults.around("graph.delete"):
            self.kept.get(scope, {}).pop(document, None)

    async def degrees(self, scope: Scope, entities: Sequence[str]) -> dict[str, int]:
        async with self.faults.around("graph.degrees"):
            pairs = {(each.entity, each.passage) for each in self._all(scope) if each.entity in set(entities)}
            return dict(Counter(entity for entity, _ in pairs))

    async def mentioning(self, scope: Scope, entities: Sequence[str], limit: int) -> list[Mention]:
        async with self.faults.around("graph.mentioning"):
            found: list[Mention] = []
            for entity in dict.fromkeys(entities):
                mine = [each for each in self._all(scope) if each.entity == entity]
                found += sorted(mine, key=lambda each: (not each.about, each.passage))[:limit]
            return found

    async def mentioned(self, scope: Scope, passages: Sequence[str]) -> list[Mention]:
        async with self.faults.around("graph.mentioned"):
            return [each for each in self._all(scope) if each.passage in set(passages)]

    async def documents(self, scope: Scope) -> dict[str, int]:
        async with self.faults.around("graph.documents"):
            here = self.kept.get(scope, {})
            return {document: len({each.passage for each in mentions}) for document, mentions in here.items()}

    async def aclose(self) -> None:
        return None


@dataclass
class FakeDocuments:
    """``ports.Documents``: *kept* is by scope and document id, each ``ready`` or ``leaving``; *others* is what is unfinished of it.

    *revisions* is by scope, *came* the revision of a document that is ready.
    """

    faults: Faults = field(default_factory=Faults)
    kept: dict[tuple[Scope, str], tuple[str, Document]] = field(default_factory=dict)
    others: dict[tuple[Scope, str], Document] = field(default_factory=dict)
    revisions: Counter[Scope] = field(default_factory=Counter)
    came: dict[tuple[Scope, str], int] = field(default_factory=dict)

    def _ready(self, scope: Scope) -> list[Document]:
        mine = [each for (where, _), (state, each) in self.kept.items() if where == scope and state == "ready"]
        return sorted(mine, key=lambda each: each.id)

    async def begin(self, document: Document) -> None:
        async with self.faults.around("documents.begin"):
            place = document.scope, document.id
            self.others[place] = document
            if self.kept.get(place, ("", None))[0] == "leaving":
                del self.kept[place]

    async def ready(self, document: Document) -> None:
        async with self.faults.around("documents.ready"):
            place = document.scope, document.id
            state, before = self.kept.get(place, ("", None))
            if before is not None and state == "ready" and _edition(before) != _edition(document):
                self.others[place] = before
            if place in self.others and _edition(self.others[place]) == _edition(document):
                del self.others[place]
            self.revisions[document.scope] += 1
            self.came[place] = self.revisions[document.scope]
            self.kept[place] = ("ready", document)

    async def settled(self, scope: Scope, id: str) -> None:
        async with self.faults.around("documents.settled"):
            self.others.pop((scope, id), None)

    async def left(self, scope: Scope, id: str) -> list[Document]:
        async with self.faults.around("documents.left"):
            state, document = self.kept.get((scope, id), ("", None))
            leaving = [document] if document is not None and state != "ready" else []
            return [*leaving, *([self.others[scope, id]] if (scope, id) in self.others else [])]

    async def standing(self, scope: Scope, ids: Sequence[str]) -> Standing:
        async with self.faults.around("documents.standing"):
            ready = {each.id: Edition(each.edition, self.came[scope, each.id]) for each in self._ready(scope) if each.id in set(ids)}
            return Standing(self.revisions[scope], ready)

    async def leaving(self, scope: Scope, id: str) -> Document | None:
        async with self.faults.around("documents.leaving"):
            _, document = self.kept.get((scope, id), ("", None))
            if document is None:
                return self.others.get((scope, id))
            self.kept[scope, id] = ("leaving", document)
            return document

    async def gone(self, scope: Scope, id: str) -> None:
        async with self.faults.around("documents.gone"):
            self.kept.pop((scope, id), None)
            self.others.pop((scope, id), None)

    async def find(self, scope: Scope, id: str) -> Document | None:
        async with self.faults.around("documents.find"):
            state, document = self.kept.get((scope, id), ("", None))
            return document if state == "ready" else None

    async def same(self, scope: Scope, digest: str) -> Document | None:
        async with self.faults.around("documents.same"):
            return next((each for each in self._ready(scope) if each.digest == digest), None)

    async def listed(self, scope: Scope, limit: int, after: str = "") -> list[Document]:
        async with self.faults.around("documents.listed"):
            return [each for each in self._ready(scope) if each.id > after][:limit]

    async def unfinished(self) -> list[Document]:
        async with self.faults.around("documents.unfinished"):
            return [*(document for state, document in self.kept.values() if state != "ready"), *self.others.values()]

    async def scopes(self) -> list[Scope]:
        async with self.faults.around("documents.scopes"):
            return list(dict.fromkeys(scope for scope, _ in (*self.kept, *self.others)))

    async def aclose(self) -> None:
        return None


def _edition(document: Document) -> tuple[str, str]:
    return document.edition, document.digest
