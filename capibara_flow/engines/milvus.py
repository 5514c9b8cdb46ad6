"""Passages in Milvus: one collection for all scopes, with a dense vector and a sparse one a row. Embedded (Milvus Lite) or a server.

Rows are told apart by a key that is derived from scope and passage id, so that the same id in two scopes is two rows. Which model the
vectors are of stands in the collection's properties. The client blocks: it works in a few threads of its own.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]  # it comes without types
import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import ConnectError, ConnectionConfigException, ErrorCode, MilvusException, MilvusUnavailableException

from capibara_flow.engines.nearby import Nearby
from capibara_flow.errors import CannotStart, DocumentRefused, EmbedderMismatch, StoreInUse, StoreUnavailable
from capibara_flow.ports import Spread, Vectors
from topics.knowledge import Hit, Passage, Scope

Result = TypeVar("Result")
Embed = Callable[[Sequence[Passage]], Awaitable[Vectors]]

_MODEL, _DIMENSION = "capibara.model", "capibara.dimension"
#: A row without any word still needs a term: the last place, which no word has.
_NO_TERM = 2**32 - 2
_ROWS = 500  # at a time, to and from the store
_READ = 2000  # at a time, where a scope is read once: for each page, Milvus Lite looks at all rows
_MOST = 16_384  # hits that Milvus gives at most
_BODY = 65_536  # bytes that a JSON field takes
#: So many rows are not left to Milvus Lite's log alone: reading them from there takes long.
_FLUSH_AT = 200
#: How often a server is asked what others wrote, how far clocks may differ, and which share may be missed before all is counted again.
_LOOK_S, _SKEW_MS, _DRIFT = 30.0, 60_000, 0.02
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises, and advice that is not for our readers
logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)

#: Milvus answers so when it is not there, not ready or has too much to do.
_AWAY = {ErrorCode.RATE_LIMIT, ErrorCode.FORCE_DENY, 1, 2, 5, 101, 503}


@dataclass
class _Terms:
    """The terms of each row of a scope by key, and how many rows have each; *newest* is the latest change that is in it.

    Of Milvus Lite, which looks at each row in Python, the rows are *nearby* as well, and searched there.
    """

    rows: dict[str, tuple[str, "array[int]"]] = field(default_factory=dict)
    containing: Counter[int] = field(default_factory=Counter)
    newest: int = 0
    looked: float = 0.0
    nearby: Nearby | None = None

    def put(self, key: str, document: str, terms: Iterable[int], changed: int) -> None:
        """Count a row; one that was there under the key is counted no more."""
        self.drop(key)
        self.rows[key] = (document, array("I", (term for term in terms if term != _NO_TERM)))
        self.containing.update(self.rows[key][1])
        self.newest = max(self.newest, changed)

    def take(self, row: Mapping[str, Any]) -> None:
        """Count *row* as it is written and read, and have it nearby."""
        self.put(row["key"], row["document"], row["sparse"], row["changed"])
        if self.nearby is not None:
            self.nearby.put(row["key"], row["passage"], row["dense"], row["sparse"])

    def drop(self, key: str) -> None:
        """Count a row no more."""
        for term in self.rows.pop(key, ("", ()))[1]:
            self.containing[term] -= 1
            if not self.containing[term]:
                del self.containing[term]

    def of(self, document: str) -> list[str]:
        """The keys of the rows of a document."""
        return [key for key, (owner, _) in self.rows.items() if owner == document]

    def forget(self, keys: Sequence[str]) -> None:
        """Count the rows with these *keys* no more."""
        if self.nearby is not None:
            self.nearby.forget(keys)
        for key in keys:
            self.drop(key)


class MilvusPassages:
    """``ports.PassageStore`` at *uri*: ``http://host:19530`` with a *token* (``user:password``), or a path that Milvus Lite keeps.

    A path ends with ``.db`` and belongs to one process at a time: ``prepare`` raises ``StoreInUse`` in a second one. *timeout* is in
    seconds, for one call. How many rows have a term is read once a scope, kept in step with what this process writes, and with what
    others write to a server by looking for changes now and then. What Milvus Lite keeps is searched in memory, exactly: it takes 4 bytes a
    number and 16 a term.
    """

    def __init__(
        self,
        uri: str,
        *,
        token: str = "",
        collection: str = "capibara_passages",
        timeout: float = 10.0,
        threads: int = 4,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._uri = uri
        self._lite = "://" not in uri
        self._token = token
        self._name = collection
        self._timeout = timeout
        self._clock = clock
        self._client: MilvusClient | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="milvus")
        self._opening = asyncio.Lock()
        self._terms: dict[str, _Terms] = {}
        self._counting = asyncio.Lock()
        self._writing = threading.RLock()
        self._unflushed = 0

    async def prepare(self, model: str, dimension: int) -> None:
        await self._do(self._prepare, model, dimension)

    async def put(self, scope: Scope, passages: Sequence[Passage], dense: Vectors, sparse: Sequence[Mapping[int, float]]) -> None:
        where, changed = _digest(scope.tenant, scope.collection), int(self._clock() * 1000)
        rows = [
            {**_facts(scope, where, passage), "changed": changed, "dense": vector, "sparse": _sparse(weights)}
            for passage, vector, weights in zip(passages, dense, sparse, strict=True)
        ]
        for some in _slices(rows):
            await self._do(self._upsert, where, some)

    async def delete(self, scope: Scope, document: str, keep: Collection[str] = ()) -> None:
        where = _digest(scope.tenant, scope.collection)
        await self._do(self._delete, where, document, {_digest(where, id) for id in keep})

    async def nearest(self, scope: Scope, vector: Vectors, limit: int) -> list[Hit]:
        where = _digest(scope.tenant, scope.collection)
        row = np.asarray(vector, np.float32).reshape(-1)
        if self._lite and (rows := (await self._counted(where)).nearby) is not None:
            return await self._do(rows.nearest, row, limit)
        return await self._do(self._search, "dense", row, f"scope == {_literal(where)}", "COSINE", limit)

    async def matching(self, scope: Scope, terms: Mapping[int, float], limit: int) -> list[Hit]:
        wanted = {term: weight for term, weight in terms.items() if weight > 0}
        if not wanted:
            return []
        where = _digest(scope.tenant, scope.collection)
        if self._lite and (rows := (await self._counted(where)).nearby) is not None:
            return await self._do(rows.matching, wanted, limit)
        return await self._do(self._search, "sparse", wanted, f"scope == {_literal(where)}", "IP", limit)

    async def spread(self, scope: Scope, terms: Sequence[int]) -> Spread:
        counted = await self._counted(_digest(scope.tenant, scope.collection))
        return Spread(len(counted.rows), {term: counted.containing[term] for term in terms if term in counted.containing})

    async def fetch(self, scope: Scope, ids: Sequence[str]) -> dict[str, Passage]:
        where, found = _digest(scope.tenant, scope.collection), {}
        for some in _slices(list(dict.fromkeys(ids))):
            keys = ", ".join(_literal(_digest(where, id)) for id in some)
            for row in await self._do(self._query, f"key in [{keys}]", ["body"]):  # a key is of one scope
                passage = _passage(row["body"])
                found[passage.id] = passage
        return found

    async def documents(self, scope: Scope) -> dict[str, int]:
        where = _digest(scope.tenant, scope.collection)
        return await self._do(self._owners, f"scope == {_literal(where)}")

    async def reembed(self, model: str, dimension: int, embed: Embed, told: Callable[[int], None] = lambda _: None) -> int:
        """Make every vector anew, by *embed* of *model*: how many there are; *told* hears how many more are done.

        What is kept stays in use until all is done. Nobody else may write in the meantime.
        """
        await self._do(self._load)
        done, copy = 0, f"{self._name}_next"
        await self._do(self._create, copy, model, dimension)
        pages = await self._do(self._pages, ["*"])
        while page := await self._do(next, pages, None):
            vectors = await embed([_passage(row["body"]) for row in page])
            fresh = [{**row, "dense": vector} for row, vector in zip(page, vectors, strict=True)]
            await self._do(self._insert, copy, fresh)
            done += len(page)
            told(len(page))
        await self._do(self._swap, copy)
        return done

    async def aclose(self) -> None:
        async with self._opening:
            client, self._client = self._client, None
            if client is not None:
                await asyncio.get_running_loop().run_in_executor(self._pool, self._close, client)
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    # --- in threads ----------------------------------------------------------------------------------------------

    async def _do(self, deed: Callable[..., Result], *given: Any) -> Result:
        """*deed* in a thread, with the client open; what may go away again is raised as ``StoreUnavailable``."""
        loop = asyncio.get_running_loop()
        with _faults(self._uri):
            if self._client is None:
                async with self._opening:
                    if self._client is None:
                        self._client = await loop.run_in_executor(self._pool, self._open)
            return await loop.run_in_executor(self._pool, lambda: deed(*given))

    def _open(self) -> MilvusClient:
        if not self._lite:
            return MilvusClient(self._uri, token=self._token, timeout=self._timeout)
        if not self._uri.endswith(".db"):
            raise CannotStart(f"{self._uri}: a path for Milvus Lite ends with .db; the address of a server begins with http://")
        Path(self._uri).parent.mkdir(parents=True, exist_ok=True)
        _check_free(self._uri)
        return MilvusClient(self._uri)

    def _close(self, client: MilvusClient) -> None:
        with suppress(MilvusException, grpc.RpcError):
            client.close()
        if self._lite:
            from milvus_lite.server_manager import server_manager_instance  # noqa: PLC0415  only where it is embedded

            server_manager_instance.release_server(self._uri)

    @property
    def _milvus(self) -> MilvusClient:
        if self._client is None:
            raise StoreUnavailable("the store of passages was closed")
        return self._client

    def _prepare(self, model: str, dimension: int) -> None:
        self._mend()
        if not self._milvus.has_collection(self._name, timeout=self._timeout):
            self._create(self._name, model, dimension)
            return
        kept = self._milvus.describe_collection(self._name, timeout=self._timeout).get("properties") or {}
        if (kept.get(_MODEL), str(kept.get(_DIMENSION))) != (model, str(dimension)):
            raise EmbedderMismatch(
                f"the passages in {self._uri} were embedded by {kept.get(_MODEL)} ({kept.get(_DIMENSION)} numbers), the embedder is "
                f"{model} ({dimension}): set the embedder back, or make the vectors anew with `capibara rag reembed`"
            )
        self._milvus.load_collection(self._name, timeout=self._timeout)

    def _load(self) -> None:
        """Have what is kept at hand, whatever model it is of: a client that has just begun has nothing."""
        self._mend()
        if not self._milvus.has_collection(self._name, timeout=self._timeout):
            raise CannotStart(f"there are no passages in {self._uri} that could be embedded again")
        self._milvus.load_collection(self._name, timeout=self._timeout)

    def _mend(self) -> None:
        """Put right what a ``reembed`` left that died between its last two steps."""
        old = f"{self._name}_old"
        if self._milvus.has_collection(old, timeout=self._timeout):
            if self._milvus.has_collection(self._name, timeout=self._timeout):
                self._milvus.drop_collection(old, timeout=self._timeout)
            else:
                self._milvus.rename_collection(old, self._name, timeout=self._timeout)

    def _create(self, name: str, model: str, dimension: int) -> None:
        self._milvus.drop_collection(name, timeout=self._timeout)
        schema = self._milvus.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("scope", DataType.VARCHAR, max_length=64, is_partition_key=True)
        schema.add_field("document", DataType.VARCHAR, max_length=1024)
        schema.add_field("passage", DataType.VARCHAR, max_length=1024)
        schema.add_field("changed", DataType.INT64)
        schema.add_field("body", DataType.JSON)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimension)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        indexes = self._milvus.prepare_index_params()
        indexes.add_index("dense", index_type="FLAT" if self._lite else "AUTOINDEX", metric_type="COSINE")  # exact, and quick enough
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        properties = {_MODEL: model, _DIMENSION: str(dimension)}
        self._milvus.create_collection(name, schema=schema, consistency_level="Strong", properties=properties, timeout=self._timeout)
        self._milvus.create_index(name, indexes, timeout=self._timeout, sync=not self._lite)  # Lite has them at once; the client would wait
        self._milvus.load_collection(name, timeout=self._timeout)

    def _upsert(self, where: str, rows: list[dict[str, Any]]) -> None:
        """Write *rows* and count them, whether or not somebody still waits for it."""
        with self._kept_in_step(where):
            self._milvus.upsert(self._name, rows, timeout=self._timeout)
            with self._writing:
                if counted := self._terms.get(where):
                    for row in rows:
                        counted.take(row)
            self._unflushed += len(rows)
            if self._lite and self._unflushed >= _FLUSH_AT:
                self._unflushed = 0
                self._milvus.flush(self._name)

    @contextmanager
    def _kept_in_step(self, where: str) -> Iterator[None]:
        """While what Milvus Lite keeps of a scope changes: nobody reads it meanwhile, and all is read anew when a change broke off."""
        with self._writing if self._lite else nullcontext():
            try:
                yield
            except BaseException:
                if self._lite:
                    self._terms.pop(where, None)
                raise

    def _insert(self, name: str, rows: list[dict[str, Any]]) -> None:
        self._milvus.upsert(name, rows, timeout=self._timeout)
        if self._lite:
            self._milvus.flush(name)

    def _delete(self, where: str, document: str, keep: set[str]) -> None:
        which = f"scope == {_literal(where)} and document == {_literal(document)}"
        with self._kept_in_step(where):
            counted = self._terms.get(where)
            if not keep:
                self._milvus.delete(self._name, filter=which, timeout=self._timeout)
                gone = counted.of(document) if counted else []
            else:
                # The store is asked, for what is counted of a server may lack what others wrote.
                there = (
                    counted.of(document) if counted and self._lite else [row["key"] for page in self._pages(["key"], which) for row in page]
                )
                gone = [key for key in there if key not in keep]
                for some in _slices(gone):
                    self._milvus.delete(self._name, filter=f"key in [{', '.join(map(_literal, some))}]", timeout=self._timeout)
            with self._writing:
                if counted:
                    counted.forget(gone)

    def _search(self, field: str, vector: Any, which: str, metric: str, limit: int) -> list[Hit]:
        found = self._milvus.search(
            self._name,
            data=[vector],
            anns_field=field,
            filter=which,
            limit=min(limit, _MOST),
            output_fields=["passage"],
            search_params={"metric_type": metric},
            timeout=self._timeout,
        )[0]
        hits = [Hit(each["entity"]["passage"], float(each["distance"])) for each in found]
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage))

    def _query(self, which: str, fields: list[str]) -> list[dict[str, Any]]:
        return list(self._milvus.query(self._name, filter=which, output_fields=fields, timeout=self._timeout))

    def _pages(self, fields: list[str], which: str = "", size: int = _ROWS) -> Iterator[list[dict[str, Any]]]:
        """All rows, *size* at a time."""
        pages = self._milvus.query_iterator(self._name, batch_size=size, filter=which, output_fields=fields, timeout=self._timeout)
        try:
            while page := pages.next():
                yield page
        finally:
            pages.close()

    def _owners(self, which: str) -> dict[str, int]:
        return dict(Counter(row["document"] for page in self._pages(["document"], which) for row in page))

    def _swap(self, copy: str) -> None:
        """Let *copy* take the place of what is in use; ``_mend`` sees what is left to do at any point."""
        self._milvus.rename_collection(self._name, f"{self._name}_old", timeout=self._timeout)
        self._milvus.rename_collection(copy, self._name, timeout=self._timeout)
        self._milvus.drop_collection(f"{self._name}_old", timeout=self._timeout)
        self._terms.clear()

    # --- statistics ----------------------------------------------------------------------------------------------

    async def _counted(self, where: str) -> _Terms:
        """The terms of a scope: read once, then kept in step."""
        counted = self._terms.get(where)
        if counted is not None and (self._lite or self._clock() - counted.looked < _LOOK_S):
            return counted
        async with self._counting:
            counted = self._terms.get(where)
            if counted is None:
                counted = await self._do(self._count, where)
            elif not self._lite and self._clock() - counted.looked >= _LOOK_S:
                counted = self._terms[where] = await self._do(self._look, where, counted)
            counted.looked = self._clock()
            return counted

    def _count(self, where: str) -> _Terms:
        with self._writing:
            counted = self._read(_Terms(nearby=Nearby(self._dimension()) if self._lite else None), f"scope == {_literal(where)}")
            self._terms[where] = counted
            return counted

    def _dimension(self) -> int:
        kept = self._milvus.describe_collection(self._name, timeout=self._timeout)
        return int((kept.get("properties") or {})[_DIMENSION])

    def _look(self, where: str, counted: _Terms) -> _Terms:
        """*counted* with what others wrote since; all is read again when too much of it is gone."""
        only = f"scope == {_literal(where)}"
        with self._writing:
            self._read(counted, f"{only} and changed > {counted.newest - _SKEW_MS}")
            there = int(self._query(only, ["count(*)"])[0]["count(*)"])
            return counted if abs(there - len(counted.rows)) <= _DRIFT * there else self._count(where)

    def _read(self, into: _Terms, which: str) -> _Terms:
        fields = ["document", "changed", "sparse", *(("passage", "dense") if into.nearby is not None else ())]
        for page in self._pages(fields, which, _READ):
            for row in page:
                into.take(row)
        return into


def _facts(scope: Scope, where: str, passage: Passage) -> dict[str, Any]:
    body = {"tenant": scope.tenant, "collection": scope.collection, **asdict(passage)}
    if (size := len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))) >= _BODY:
        raise DocumentRefused(f"passage {passage.id!r} has {size} bytes, Milvus takes less than {_BODY}: cut it smaller")
    return {"key": _digest(where, passage.id), "scope": where, "document": passage.document, "passage": passage.id, "body": body}


def _sparse(weights: Mapping[int, float]) -> dict[int, float]:
    return {term: weight for term, weight in weights.items() if weight > 0} or {_NO_TERM: 1e-6}


def _passage(body: Mapping[str, Any]) -> Passage:
    fields = {name: body[name] for name in Passage.__dataclass_fields__ if name in body}
    return Passage(**{**fields, "headings": tuple(fields.get("headings", ()))})


def _digest(*parts: str) -> str:
    """A name for *parts* in 32 hexadecimal digits: it needs no escaping, and nobody can choose it."""
    lengths = "\0".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(lengths.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _literal(text: str) -> str:
    """*text* as a string in a filter: neither quotes nor backslashes nor ends of lines get out of it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def _slices(items: list[Result]) -> Iterator[list[Result]]:
    return (items[start : start + _ROWS] for start in range(0, len(items), _ROWS))


def _check_free(path: str) -> None:
    """Raise ``StoreInUse`` when another process has Milvus Lite's folder: its own error would be a traceback in the log."""
    from milvus_lite.db import MilvusLite  # noqa: PLC0415  only where it is embedded
    from milvus_lite.exceptions import DataDirLockedError  # noqa: PLC0415

    try:
        MilvusLite(path).close()
    except DataDirLockedError as error:
        raise StoreInUse(
            f"{path} is in use by another process: Milvus Lite serves one at a time. Let that one do it, or run a Milvus server"
        ) from error


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Errors of the client as ours: no connection, none in time, or a server that is not ready."""
    try:
        yield
    except (ConnectError, ConnectionConfigException, MilvusUnavailableException, grpc.RpcError, OSError) as error:
        raise StoreUnavailable(f"the passages in {uri} cannot be reached: {_reason(error)}") from error
    except MilvusException as error:
        if error.retriable or error.code in _AWAY or isinstance(error.code, grpc.StatusCode):
            raise StoreUnavailable(f"the passages in {uri} cannot be reached: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", "") or error).split())[:200] or type(error).__name__
