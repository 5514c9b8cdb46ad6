"""Documents in and out of the three stores, and the stores brought to agree again; whatever breaks off can be done again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from capibara_flow.domain.bm25 import searchable
from capibara_flow.domain.chunking import Sizes, chunks
from capibara_flow.domain.entities import mentions
from capibara_flow.domain.ingesting import (
    Finding,
    How,
    Stock,
    confirmed,
    decide,
    digest_of,
    document_id,
    edition_of,
    findings,
    linked_as,
    owner,
    passage_ids,
    passages_of,
)
from capibara_flow.domain.parsed import Parsed
from capibara_flow.errors import DocumentRefused
from capibara_flow.ports import Documents, Embedder, GraphStore, PassageStore
from topics.grounding import Disagreement
from topics.knowledge import Document, Mention, Passage, Scope

#: What is done (``read``, ``passages``, ``graph``), how much of it, and of how much.
Progress = Callable[[str, int, int], None]
#: The sparse weights of a text in a language (ISO 639-1).
Sparse = Callable[[str, str], Mapping[int, float]]
#: Who finds what the passages of a document with a title mention.
Extract = Callable[[Sequence[Passage], str], Awaitable[Sequence[Mention]]]

_PAGE = 500


class Parse(Protocol):
    """Reads a file; raises ``DocumentRefused``."""

    def __call__(self, data: bytes, name: str = "", media_type: str | None = None) -> Awaitable[Parsed]:
        """The text of the file with the content *data*."""
        ...


@dataclass(frozen=True)
class File:
    """A file as it comes: its content, and what its sender tells of it. *address* is its name where none is given."""

    data: bytes
    name: str = ""
    address: str = ""
    title: str = ""
    media_type: str | None = None
    owner: str = ""
    updated: datetime | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a file, and the document that has its content now."""

    how: How
    document: Document


async def by_rule(passages: Sequence[Passage], title: str) -> Sequence[Mention]:
    """What passages mention, told without a model, in a thread."""
    return await asyncio.to_thread(mentions, passages, title)


def _silent(stage: str, done: int, of: int) -> None:
    """Nobody watches."""


@dataclass
class Ingester:
    """Takes documents in and out. One document is worked on by one task at a time, in this process; others have to see to that among them.

    *batch* passages are embedded and kept at a time; a crash loses at most the work on one batch.
    """

    parse: Parse
    embedder: Embedder
    passages: PassageStore
    graph: GraphStore
    documents: Documents
    sparse: Sparse
    sizes: Sizes = field(default_factory=Sizes)
    extract: Extract = by_rule
    batch: int = 32
    _locks: dict[tuple[Scope, str], tuple[asyncio.Lock, list[None]]] = field(default_factory=dict, init=False)

    async def take_in(self, scope: Scope, file: File, now: datetime, progress: Progress = _silent) -> Taken:
        """Have *file* in the stores, or find that it is there already; *now* is its date when nothing else tells one.

        Raises ``DocumentRefused`` (and nothing has changed), ``EmbedderMismatch`` and ``StoreUnavailable``; doing it again goes on
        where it broke off.
        """
        address = file.address or file.name
        if not address:
            raise DocumentRefused("it has neither a name nor an address: give it one")
        id, digest = document_id(scope, address), await asyncio.to_thread(digest_of, file.data)
        async with self._alone(scope, id), self._alone(scope, digest):
            await self.passages.prepare(self.embedder.model, self.embedder.dimension)
            ready, same = await self.documents.find(scope, id), await self.documents.same(scope, digest)
            decision = decide(id, digest, file.title, ready, same)
            if decision.stands is not None:
                if decision.how == "same":
                    await self._leave(scope, id)
                elif left := await self.documents.left(scope, id):
                    await self._settle(decision.stands, left)
                return Taken(decision.how, decision.stands)
            parsed = await self.parse(file.data, file.name or address, file.media_type)
            progress("read", 1, 1)
            document, passages = await asyncio.to_thread(self._cut, scope, file, parsed, (id, digest, address), now)
            await self._write(document, passages, ready, progress)
            return Taken(decision.how, document)

    def _cut(self, scope: Scope, file: File, parsed: Parsed, known: tuple[str, str, str], now: datetime) -> tuple[Document, list[Passage]]:
        id, digest, address = known
        pieces = chunks(parsed.text, parsed.blocks, self.sizes)
        if not pieces:
            raise DocumentRefused("there is no text in it")
        updated = file.updated or parsed.updated or now
        document = Document(
            id=id,
            scope=scope,
            title=file.title or parsed.title or file.name or address,
            address=address,
            digest=digest,
            language=parsed.language,
            updated=updated if updated.tzinfo else updated.replace(tzinfo=UTC),
            owner=file.owner,
            passages=len(pieces),
        )
        document = replace(document, edition=edition_of(document, pieces))
        return document, passages_of(document, pieces)

    async def _write(self, document: Document, passages: Sequence[Passage], before: Document | None, progress: Progress) -> None:
        """Have *document* in place of the one *before*, which stays to be found until the new one is whole."""
        scope, id = document.scope, document.id
        others = [each for each in await self.documents.left(scope, id) if each.edition != document.edition]
        if others:
            await self._clear(document, others, before)
        await self.documents.begin(document)
        there = await self._fetched(document)
        await self._put(scope, [each for each in passages if each.id not in there], len(there), progress)
        await self._link(document, passages)
        progress("graph", 1, 1)
        await self.documents.ready(document)
        if before is not None:
            await self._settle(document, [before])

    async def _settle(self, ready: Document, left: Sequence[Document]) -> None:
        """Have nothing of a document in any store but the edition that is *ready*."""
        await self._clear(ready, left)
        await self.documents.settled(ready.scope, ready.id)

    async def _clear(self, kept: Document, others: Sequence[Document], ready: Document | None = None) -> None:
        """Take the *others* of a document out of passages and graph; *kept* and the *ready* one stay."""
        keep = [id for each in (kept, ready) if each is not None for id in passage_ids(each)]
        await self.passages.delete(kept.scope, kept.id, keep)
        for name in {linked_as(each) for each in others} - {linked_as(each) for each in (kept, ready) if each is not None}:
            await self.graph.delete(kept.scope, name)

    async def _fetched(self, document: Document) -> dict[str, Passage]:
        ids, found = passage_ids(document), dict[str, Passage]()
        for at in range(0, len(ids), _PAGE):
            found |= await self.passages.fetch(document.scope, ids[at : at + _PAGE])
        return found

    async def _put(self, scope: Scope, passages: Sequence[Passage], done: int, progress: Progress) -> None:
        for at in range(0, len(passages), self.batch):
            progress("passages", done + at, done + len(passages))
            batch = passages[at : at + self.batch]
            texts = [searchable(passage) for passage in batch]
            dense = await self.embedder.embed(texts, "passage")
            sparse = await asyncio.to_thread(self._weights, batch, texts)
            await self.passages.put(scope, batch, dense, sparse)
        progress("passages", done + len(passages), done + len(passages))

    def _weights(self, passages: Sequence[Passage], texts: Sequence[str]) -> list[Mapping[int, float]]:
        return [self.sparse(text, passage.language) for passage, text in zip(passages, texts, strict=True)]

    async def _link(self, document: Document, passages: Sequence[Passage]) -> None:
        await self.graph.put(document.scope, linked_as(document), await self.extract(passages, document.title))

    async def remove(self, scope: Scope, id: str) -> Document | None:
        """Have nothing of a document in any store; what it was, if it was there."""
        async with self._alone(scope, id):
            return await self._leave(scope, id)

    async def _leave(self, scope: Scope, id: str, linked: Collection[str] = ()) -> Document | None:
        """Have nothing of a document anywhere; *linked* is what it is called in the graph besides what the list tells."""
        document = await self.documents.leaving(scope, id)
        left = await self.documents.left(scope, id)
        await self.passages.delete(scope, id)
        for name in {*linked, *(linked_as(each) for each in left)}:
            await self.graph.delete(scope, name)
        await self.documents.gone(scope, id)
        return document

    async def check(self, scopes: Sequence[Scope] | None = None) -> list[Finding]:
        """Where the stores do not agree, of all scopes that have a document, or of *scopes*; reads everything twice."""
        first = [each for scope in await self._scopes(scopes) for each in await self._look(scope)]
        again = [each for scope in dict.fromkeys(each.scope for each in first) for each in await self._look(scope)]
        return confirmed(first, again)

    async def _scopes(self, scopes: Sequence[Scope] | None) -> Sequence[Scope]:
        if scopes is not None:
            return scopes
        unfinished = [document.scope for document in await self.documents.unfinished()]
        return list(dict.fromkeys([*await self.documents.scopes(), *unfinished]))

    async def _look(self, scope: Scope) -> list[Finding]:
        """The list is read behind the stores: what is in a store was in the list before, so nothing new seems to belong to nobody."""
        passages, linked = await self.passages.documents(scope), await self.graph.documents(scope)
        unfinished = {each.id: each for each in await self.documents.unfinished() if each.scope == scope}
        ready: dict[str, Document] = {}
        while page := await self.documents.listed(scope, _PAGE, max(ready, default="")):
            ready |= {each.id: each for each in page}
        busy = {id for where, id in self._locks if where == scope}
        return findings(scope, Stock(ready, unfinished, passages, linked), busy)

    async def repair(self, finding: Finding) -> None:
        """Do what mends *finding*; what cannot be mended is removed, to be taken in again from its address."""
        scope, id = finding.scope, finding.document
        async with self._alone(scope, id):
            linked = [name for name in await self.graph.documents(scope) if owner(name) == id]
            document = None if finding.repair == "remove" else await self.documents.find(scope, id)
            there = await self._fetched(document) if document else {}
            if document is None or len(there) < document.passages:
                await self._leave(scope, id, linked)
                return
            if finding.repair == "relink":
                await self._link(document, sorted(there.values(), key=lambda passage: passage.number))
                return
            await self.passages.delete(scope, id, passage_ids(document))
            for name in set(linked) - {linked_as(document)}:
                await self.graph.delete(scope, name)
            await self.documents.settled(scope, id)

    @asynccontextmanager
    async def _alone(self, scope: Scope, key: str) -> AsyncIterator[None]:
        """While nobody else here works on what *key* names."""
        lock, waiting = self._locks.setdefault((scope, key), (asyncio.Lock(), []))
        waiting.append(None)
        try:
            async with lock:
                yield
        finally:
            waiting.pop()
            if not waiting:
                del self._locks[scope, key]


def disagreement(found: Finding) -> Disagreement:
    """*found* as it is told."""
    where = {"tenant": found.scope.tenant, "collection": found.scope.collection}
    return Disagreement(**where, document=found.document, address=found.address, why=found.why, repair=found.repair)
