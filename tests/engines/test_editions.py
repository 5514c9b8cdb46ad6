"""The stores that come along, all three: a document that is changed while others search is found as it was or as it is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from capibara_flow.domain.bm25 import passage_weights
from capibara_flow.domain.chunking import Sizes
from capibara_flow.domain.ingesting import passage_ids
from capibara_flow.domain.parsed import Parsed, plain_blocks
from capibara_flow.engines.ladybug import LadybugGraph
from capibara_flow.engines.milvus import MilvusPassages
from capibara_flow.engines.postgres.documents import PostgresDocuments
from capibara_flow.engines.postgres.embedded import EmbeddedPostgres
from capibara_flow.ports import Documents
from capibara_flow.runtime.ingesting import Ingester
from capibara_flow.runtime.searching import Searcher
from tests.engines.postgres_servers import connected, fresh
from tests.fakes_knowledge import FakeEmbedder
from tests.runtime.test_editions import written
from topics.knowledge import Scope

SCOPE, NOW = Scope("acme"), datetime(2026, 2, 3, tzinfo=UTC)


@dataclass
class Stores:
    """All that is open."""

    documents: Documents
    ingester: Ingester
    searcher: Searcher


async def parse(data: bytes, name: str = "", media_type: str | None = None) -> Parsed:
    return Parsed(data.decode(), plain_blocks(data.decode()), language="es")


@pytest.fixture
async def stores(postgres: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Stores]:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(fresh(postgres.url))
        documents = PostgresDocuments(await stack.enter_async_context(connected(url)))
        passages, graph = MilvusPassages(str(tmp_path / "passages.db")), LadybugGraph(tmp_path / "graph")
        stack.push_async_callback(passages.aclose)
        stack.push_async_callback(graph.aclose)
        embedder = FakeEmbedder()
        ingester = Ingester(parse, embedder, passages, graph, documents, passage_weights, Sizes(20, 30, 10), batch=2)
        yield Stores(documents, ingester, Searcher(embedder, passages, graph, stand=documents.standing))


async def test_a_document_that_changes_is_always_found_whole(stores: Stores) -> None:
    first = (await stores.ingester.take_in(SCOPE, written("old"), NOW)).document
    whole, seen, working = {frozenset(passage_ids(first))}, set[frozenset[str]](), True

    async def look() -> None:
        while working:
            found = await stores.searcher.search(SCOPE, "capibaras acuáticas", 10)
            seen.add(frozenset(each.passage.id for each in found))

    looking = [asyncio.create_task(look()) for _ in range(2)]
    for number in range(6):
        changed = written(f"new{number}", 3 + number % 2, title=f"Capibaras {number}")
        whole.add(frozenset(passage_ids((await stores.ingester.take_in(SCOPE, changed, NOW)).document)))
    working = False
    await asyncio.gather(*looking)
    assert seen <= whole
    assert len(seen) > 1
    assert await stores.ingester.check() == []
    await stores.ingester.remove(SCOPE, first.id)
    assert await stores.searcher.search(SCOPE, "capibaras acuáticas", 10) == []
    assert await stores.documents.unfinished() == await stores.ingester.check([SCOPE]) == []
