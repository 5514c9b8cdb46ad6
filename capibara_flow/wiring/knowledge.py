"""The knowledge of this installation: its stores, opened when they are first needed, shared by all workers of a process."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from capibara_flow.errors import CannotStart
from capibara_flow.ports import Documents, GraphStore, PassageStore
from capibara_flow.settings import KnowledgeSettings, SettingsError
from capibara_flow.tasks import LONG, ended
from capibara_flow.telemetry import log
from capibara_flow.wiring.postgres import postgres
from topics.grounding import ListDocuments
from topics.knowledge import Document, Mention, Passage, Scope, Source

if TYPE_CHECKING:
    from capibara_flow.domain.ingesting import Finding
    from capibara_flow.engines.milvus import MilvusPassages
    from capibara_flow.runtime.ingesting import Extract, File, Ingester, Taken
    from capibara_flow.runtime.searching import Searcher

Store = TypeVar("Store", PassageStore, GraphStore)
#: What the embedded store of passages is called in the folder.
PASSAGES = "passages.db"
_LOOK_SECONDS = 10.0  # between looks who has documents: other processes take some in as well


@dataclass(frozen=True)
class Stores:
    """All that is open."""

    documents: Documents
    searcher: "Searcher"
    ingester: "Ingester"


class Library:
    """Search, list, take in and remove. The stores are opened by the first who needs them, and a fault there is met by everybody anew."""

    def __init__(self, settings: KnowledgeSettings, clock: Callable[[], float] = time.time) -> None:
        if not settings.enabled:
            raise SettingsError("no place for documents: set CAPIBARA_KNOWLEDGE__FOLDER to a folder, or name a server for each store")
        self._settings, self._clock = settings, clock
        #: Who finds what passages mention; rules do where it is nobody.
        self.extract: Extract | None = None
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[Stores] | None = None
        self._stores: Stores | None = None
        self._tenants: list[str] = []
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open in the background what was used before: whoever has documents wants to find something in them."""
        if self._was_used:
            self._looking = asyncio.create_task(self._look())

    @property
    def _was_used(self) -> bool:
        """Whether there may be documents. A PostgreSQL in the folder says nothing: usage is there as well."""
        settings = self._settings
        return bool(settings.postgres or settings.milvus) or (settings.folder is not None and (settings.folder / PASSAGES).exists())

    async def aclose(self) -> None:
        """Let everything go."""
        await ended(self._looking, self._opening, again=LONG)
        await self._stack.aclose()

    async def opened(self) -> Stores:
        """The stores; raises ``CannotStart``, ``StoreInUse``, ``StoreUnavailable`` and ``EmbedderMismatch``."""
        if self._stores is not None:
            return self._stores
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(lambda _: setattr(self, "_opening", None))
        # Whoever has waited for long enough goes; the opening goes on, for the next one.
        return await asyncio.shield(self._opening)

    async def _open(self) -> Stores:
        async with AsyncExitStack() as stack:
            self._stores = await _open(self._settings, stack, self._clock, self._extract)
            self._stack = stack.pop_all()
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        return self._stores

    async def _extract(self, passages: Sequence[Passage], title: str) -> Sequence[Mention]:
        from capibara_flow.runtime.ingesting import by_rule  # noqa: PLC0415

        return await (self.extract or by_rule)(passages, title)

    async def search(self, scope: Scope, question: str, limit: int) -> Sequence[Source]:
        """The best *limit* sources for *question*."""
        return await (await self.opened()).searcher.search(scope, question, limit)

    async def listed(self, command: ListDocuments) -> Sequence[Document]:
        """Documents, or the one that is asked for."""
        documents, scope = (await self.opened()).documents, Scope(command.tenant, command.collection)
        if command.document:
            found = await documents.find(scope, command.document)
            return [found] if found else []
        return await documents.listed(scope, command.limit, command.after)

    async def take_in(self, scope: Scope, file: "File") -> "Taken":
        """Take a document in."""
        stores = await self.opened()
        taken = await stores.ingester.take_in(scope, file, datetime.fromtimestamp(self._clock(), UTC))
        self._tenants = sorted({*self._tenants, scope.tenant})
        return taken

    async def remove(self, scope: Scope, document: str) -> bool:
        """Remove a document from all stores; whether it was there."""
        return await (await self.opened()).ingester.remove(scope, document) is not None

    async def check(self, repair: bool) -> "Sequence[Finding]":
        """Where the stores do not agree; with *repair* each of these is mended."""
        ingester = (await self.opened()).ingester
        findings = await ingester.check()
        for each in findings if repair else ():
            await ingester.repair(each)
        return findings

    def facts(self) -> Mapping[str, Any]:
        """What a process tells of it."""
        return {"tenants": self._tenants, "open": self._stores is not None}

    async def _look(self) -> None:
        while True:
            try:
                scopes = await (await self.opened()).documents.scopes()
                self._tenants = sorted({scope.tenant for scope in scopes})
            except Exception as error:  # noqa: BLE001  whoever asks meets it as well; this only watches
                log.warning("knowledge_unread", error=repr(error))
            await asyncio.sleep(_LOOK_SECONDS)

    def written(self, sources: Sequence[Source], question: str) -> tuple[Sequence[Source], str]:
        """As many of *sources* as the prompt of *question* may take, and the text that puts them there."""
        return written(self._settings, sources, question)


def written(settings: KnowledgeSettings, sources: Sequence[Source], question: str) -> tuple[Sequence[Source], str]:
    """As many of *sources* as *settings* allow in the prompt of *question*, and the text that puts them there.

    None at all, and no text, where the best of them has not to do enough with the question.
    """
    from capibara_flow.domain.context import context  # noqa: PLC0415
    from capibara_flow.domain.relevance import related  # noqa: PLC0415
    from capibara_flow.engines.parsing.languages import language_of  # noqa: PLC0415

    if not related(sources, settings.relevance):
        return (), ""
    made = context(sources, settings.context_tokens, language=language_of(question))
    return made.sources, made.text


_open_now: dict[KnowledgeSettings, tuple[Library, list[None]]] = {}


@asynccontextmanager
async def library(settings: KnowledgeSettings) -> AsyncIterator[Library]:
    """The library of *settings*, the same for all workers of this process: embedded stores belong to one owner."""
    found, users = _open_now.get(settings) or (Library(settings), [])
    if not users:
        _open_now[settings] = found, users
        found.start()
    users.append(None)
    try:
        yield found
    finally:
        users.pop()
        if not users:
            del _open_now[settings]
            await found.aclose()


async def _open(settings: KnowledgeSettings, stack: AsyncExitStack, clock: Callable[[], float], extract: "Extract") -> Stores:
    """Every product is imported here, so that a machine without documents loads none of them."""
    try:
        from capibara_flow.domain.bm25 import passage_weights  # noqa: PLC0415
        from capibara_flow.engines.embeddings.build import build_embedder  # noqa: PLC0415
        from capibara_flow.engines.parsing.sandbox import Limits, Parsers  # noqa: PLC0415
        from capibara_flow.engines.postgres.database import Database  # noqa: PLC0415
        from capibara_flow.engines.postgres.documents import PostgresDocuments  # noqa: PLC0415
        from capibara_flow.runtime.ingesting import Ingester  # noqa: PLC0415
        from capibara_flow.runtime.searching import Searcher, backdrop  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise CannotStart(f"documents need {error.name}: `pip install 'capibara-flow[rag]'` brings it") from error
    embedder = await asyncio.to_thread(build_embedder, settings.embedder, capacity=1024)
    stack.push_async_callback(embedder.aclose)
    documents = PostgresDocuments(Database(await stack.enter_async_context(postgres(settings))))
    stack.push_async_callback(documents.aclose)
    passages = await _kept(_passages(settings), stack)
    await passages.prepare(embedder.model, embedder.dimension)
    graph = await _kept(_graph(settings), stack)
    parsers = Parsers(Limits(settings.document_bytes, settings.parse_seconds, settings.parse_memory_mib * 2**20))
    stack.push_async_callback(parsers.aclose)
    against = await backdrop(embedder) if settings.relevance else None
    searcher = Searcher(embedder, passages, graph, weights=_weights(settings), clock=clock, stand=documents.standing, backdrop=against)
    ingester = Ingester(parsers.parse, embedder, passages, graph, documents, passage_weights, extract=extract)
    return Stores(documents, searcher, ingester)


async def _kept(store: Store, stack: AsyncExitStack) -> Store:
    stack.push_async_callback(store.aclose)
    return store


def _passages(settings: KnowledgeSettings) -> "MilvusPassages":
    from capibara_flow.engines.milvus import MilvusPassages  # noqa: PLC0415

    token = settings.milvus_token.get_secret_value() if settings.milvus_token else ""
    return MilvusPassages(settings.milvus or str(_folder(settings) / PASSAGES), token=token)


async def reembed(settings: KnowledgeSettings, told: Callable[[int], None]) -> int:
    """Make every vector anew with the embedder of *settings*: how many there are; *told* hears how many more are done.

    Nobody else may take documents in meanwhile. Raises ``CannotStart`` and ``StoreUnavailable``.
    """
    from capibara_flow.domain.bm25 import searchable  # noqa: PLC0415
    from capibara_flow.engines.embeddings.build import build_embedder  # noqa: PLC0415

    embedder = await asyncio.to_thread(build_embedder, settings.embedder, capacity=0)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(embedder.aclose)
        passages = _passages(settings)
        stack.push_async_callback(passages.aclose)

        async def embed(page: Sequence[Passage]) -> Any:
            return await embedder.embed([searchable(passage) for passage in page], "passage")

        return await passages.reembed(embedder.model, embedder.dimension, embed, told)


def _graph(settings: KnowledgeSettings) -> GraphStore:
    if not settings.nebula:
        from capibara_flow.engines.ladybug import LadybugGraph  # noqa: PLC0415

        return LadybugGraph(_folder(settings) / "graph")
    from capibara_flow.engines.nebula import NebulaGraph  # noqa: PLC0415

    pairs = [each.strip().rpartition(":") for each in settings.nebula.split(",")]
    addresses = [(host, int(port)) for host, _, port in pairs]
    return NebulaGraph(addresses, user=settings.nebula_user, password=settings.nebula_password.get_secret_value())


def _folder(settings: KnowledgeSettings) -> Path:
    if settings.folder is None:
        raise SettingsError("no folder for the stores that come along: set CAPIBARA_KNOWLEDGE__FOLDER")
    settings.folder.mkdir(parents=True, exist_ok=True)
    return settings.folder


def _weights(settings: KnowledgeSettings) -> Any:
    from capibara_flow.domain.ranking import Weights  # noqa: PLC0415

    return Weights(
        vector=settings.vector_weight,
        graph=settings.graph_weight,
        recency=settings.recency_weight,
        half_life_days=settings.recency_half_life_days,
    )
