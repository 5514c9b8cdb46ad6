"""Stand-ins for the engines behind ingester and retriever: a library in memory that finds what has a word in common."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from capibara_flow import wiring
from capibara_flow.domain.ingesting import Finding
from capibara_flow.errors import DocumentRefused
from capibara_flow.runtime import brokers
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.depositing import Deposit
from capibara_flow.runtime.ingesting import File, Taken
from capibara_flow.runtime.joining import Join
from capibara_flow.settings import Settings
from topics.grounding import ListDocuments
from topics.knowledge import Document, Passage, Scope, Source
from topics.streams import ingester_consumer, retriever_consumer
from workers import ingester, retriever

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass
class Library:
    """Documents by scope and id, each with its text; *uploads* is what was brought, and into which scope, in order.

    Who looks for something dusty waits until it is *dusted*. What is found is taken for unrelated unless it is *related*.
    """

    kept: dict[tuple[Scope, str], tuple[Document, str]] = field(default_factory=dict)
    uploads: list[tuple[Scope, File]] = field(default_factory=list)
    dusted: asyncio.Event = field(default_factory=asyncio.Event)
    related: bool = True
    findings: list[Finding] = field(default_factory=list)

    async def ingest(self, scope: Scope, file: File) -> Taken:
        self.uploads.append((scope, file))
        if b"\0" in file.data:
            raise DocumentRefused(f"{file.name}: it is neither text nor a document that can be read")
        address = file.address or file.name
        id, digest = _hash(scope.tenant, scope.collection, address), hashlib.sha256(file.data).hexdigest()
        before = self.kept.get((scope, id))
        if before and before[0].digest == digest:
            return Taken("unchanged", before[0])
        document = Document(id, scope, file.title or file.name, address, digest, "en", NOW, file.owner, passages=1)
        self.kept[scope, id] = (document, file.data.decode())
        return Taken("replaced" if before else "created", document)

    async def documents(self, asked: ListDocuments) -> Sequence[Document]:
        scope = Scope(asked.tenant, asked.collection)
        mine = sorted((document for (where, _), (document, _) in self.kept.items() if where == scope), key=lambda each: each.id)
        if asked.document:
            return [each for each in mine if each.id == asked.document]
        return [each for each in mine if each.id > asked.after][: asked.limit]

    async def remove(self, scope: Scope, id: str) -> bool:
        return self.kept.pop((scope, id), None) is not None

    async def check(self, repair: bool) -> Sequence[Finding]:
        found = list(self.findings)
        if repair:
            self.findings.clear()
        return found

    async def search(self, scope: Scope, query: str, limit: int) -> Sequence[Source]:
        words = set(query.lower().split())
        if "dusty" in words:
            await self.dusted.wait()
        found = [
            (len(words & set(text.lower().split())), document, text) for (where, _), (document, text) in self.kept.items() if where == scope
        ]
        best = sorted((each for each in found if each[0]), key=lambda each: (-each[0], each[1].id))[:limit]
        return [
            Source(n, _passage(document, text), float(score), {"words": float(score)}) for n, (score, document, text) in enumerate(best, 1)
        ]

    def written(self, sources: Sequence[Source], question: str) -> tuple[Sequence[Source], str]:
        if not self.related:
            return (), ""
        return sources, "\n".join(f"[{each.n}] {each.passage.text}" for each in sources)


def _passage(document: Document, text: str) -> Passage:
    where = {"title": document.title, "address": document.address, "language": "en", "updated": document.updated.timestamp()}
    return Passage(f"{document.id}-0", document.id, 0, text, 0, len(text), **where)


@asynccontextmanager
async def knowing(settings: Settings) -> AsyncIterator[Library]:
    """A retriever and an ingester with a library in memory, for the length of a block."""
    library = Library()
    async with AsyncExitStack() as stack:
        for name, module, consumer in (("retriever", retriever, retriever_consumer()), ("ingester", ingester, ingester_consumer())):
            client = await stack.enter_async_context(wiring.connected(settings, name))
            answers = FencedAnswers(client, name)
            await answers.start()
            stack.push_async_callback(answers.stop)
            broker = brokers.broker(settings, name)
            own = {"ingest": library.ingest, "check": library.check, "deposit": Deposit(client)}
            if module is retriever:
                own = {"search": library.search, "documents": library.documents, "remove": library.remove, "join": Join(client)}
                own["written"] = library.written
            await module.build(broker, answers=answers, consumer=consumer, **own).start()
            stack.push_async_callback(broker.stop)
        yield library
