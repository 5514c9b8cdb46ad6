"""``ports.GraphStore`` in Ladybug (MIT), an embedded property graph with Cypher: one folder of this machine, one process.

The graph: ``(Scope)-[Keeps]->(Document)-[Holds]->(Passage)-[Mentions {name, about}]->(Entity {degree})``. Only primary keys are
indexed, and for what hangs on a node only where the key is one parameter: with a list of keys (``IN``, ``UNWIND``) it reads whole
tables. So each statement begins at one key, and there are as many as there are keys; but an entity knows by itself how many passages
mention it, for many names of a question are looked up that nobody mentions. Values only ever travel as parameters.
"""

import asyncio
import fcntl
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import ladybug

from capibara_flow.engines.keys import distinct, key, scope_key
from capibara_flow.errors import BadRequest, CannotStart, StoreInUse, StoreUnavailable
from topics.knowledge import Mention, Scope

Found = TypeVar("Found")

_SCHEMA = (
    "CREATE NODE TABLE IF NOT EXISTS Scope(key STRING PRIMARY KEY)",
    "CREATE NODE TABLE IF NOT EXISTS Document(key STRING PRIMARY KEY, id STRING)",
    "CREATE NODE TABLE IF NOT EXISTS Passage(key STRING PRIMARY KEY, id STRING)",
    "CREATE NODE TABLE IF NOT EXISTS Entity(key STRING PRIMARY KEY, id STRING, degree INT64)",
    "CREATE REL TABLE IF NOT EXISTS Keeps(FROM Scope TO Document)",
    "CREATE REL TABLE IF NOT EXISTS Holds(FROM Document TO Passage)",
    "CREATE REL TABLE IF NOT EXISTS Mentions(FROM Passage TO Entity, name STRING, about BOOL)",
)
_MENTIONED_BEFORE = "MATCH (:Document {key: $document})-[:Holds]->(:Passage)-[:Mentions]->(e:Entity) RETURN e.key, COUNT(*)"
_HELD = "MATCH (:Document {key: $document})-[:Holds]->(p:Passage) RETURN p.key"
_FORGET_PASSAGE = "MATCH (p:Passage {key: $key}) DETACH DELETE p"
_FORGET_DOCUMENT = "MATCH (d:Document {key: $document}) DETACH DELETE d"
_LESS = "MATCH (e:Entity {key: $key}) SET e.degree = e.degree - $count"
_SWEEP_ENTITY = "MATCH (e:Entity {key: $key}) WHERE e.degree <= 0 DETACH DELETE e"
_SWEEP_SCOPE = "MATCH (s:Scope {key: $scope}) WHERE NOT EXISTS { MATCH (s)-[:Keeps]->(:Document) } DELETE s"
_SCOPE = "MERGE (:Scope {key: $scope})"
_DOCUMENT = "CREATE (:Document {key: $document, id: $id})"
_KEEPS = "MATCH (s:Scope {key: $scope}), (d:Document {key: $document}) CREATE (s)-[:Keeps]->(d)"
_PASSAGE = "MERGE (p:Passage {key: $key}) ON CREATE SET p.id = $id"
_HOLDS = "MATCH (d:Document {key: $document}), (p:Passage {key: $key}) CREATE (d)-[:Holds]->(p)"
_ENTITY = """MERGE (e:Entity {key: $key})
    ON CREATE SET e.id = $id, e.degree = $count ON MATCH SET e.degree = e.degree + $count"""
_MENTIONS = """MATCH (p:Passage {key: $passage}), (e:Entity {key: $entity})
    CREATE (p)-[:Mentions {name: $name, about: $about}]->(e)"""
#: Mentions of one entity that are cheaper to sort here than there.
_FEW = 500
_DEGREES = "UNWIND $keys AS k MATCH (e:Entity {key: k}) RETURN e.id, e.degree"
# Where the limit is a parameter, the statement is planned anew each time, which takes eight times as long.
_SOME = f"MATCH (e:Entity {{key: $key}})<-[m:Mentions]-(p:Passage) RETURN p.id, e.id, m.name, m.about LIMIT {_FEW}"
_FIRST = """MATCH (e:Entity {key: $key})<-[m:Mentions]-(p:Passage)
    RETURN p.id, e.id, m.name, m.about ORDER BY m.about DESC, p.id LIMIT $limit"""
_MENTIONED = "MATCH (p:Passage {key: $key})-[m:Mentions]->(e:Entity) RETURN p.id, e.id, m.name, m.about"
_DOCUMENTS = "MATCH (:Scope {key: $scope})-[:Keeps]->(d:Document)-[:Holds]->(p:Passage) RETURN d.id, COUNT(p)"
#: Faults of the statement itself, which waiting does not mend.
_OURS = ("Parser exception", "Binder exception", "Catalog exception")
_READERS = 2


class LadybugGraph:
    """``ports.GraphStore`` in the file *path*, which is made where there is none; opened at the first use.

    One process may have it; another one gets ``StoreInUse``. One thread writes, two read meanwhile, and the event loop never waits.
    A statement may take *seconds*. *memory* bytes bound its page cache; they are taken as they are needed, but a checkpoint needs some
    2 KB a mention, and fails where that is more: 128 MiB held 80,000 mentions.
    """

    def __init__(self, path: Path, *, memory: int = 2**30, seconds: float = 30) -> None:
        self._path, self._memory, self._seconds = path.absolute(), memory, seconds
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ladybug-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="ladybug-reader")
        self._opening = threading.Lock()
        self._own = threading.local()
        self._database: ladybug.Database | None = None
        self._lock: IO[bytes] | None = None
        self._closed = False

    async def put(self, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
        await self._in(self._writer, lambda cypher: _put(cypher, scope, document, mentions))

    async def delete(self, scope: Scope, document: str) -> None:
        await self._in(self._writer, lambda cypher: _put(cypher, scope, document, ()))

    async def degrees(self, scope: Scope, entities: Sequence[str]) -> dict[str, int]:
        keys = _keys(scope, entities)
        return dict(await self._in(self._readers, lambda cypher: cypher(_DEGREES, {"keys": keys})))

    async def mentioning(self, scope: Scope, entities: Sequence[str], limit: int) -> list[Mention]:
        keys = _keys(scope, entities)
        return await self._in(self._readers, lambda cypher: [each for key in keys for each in _first(cypher, key, limit)])

    async def mentioned(self, scope: Scope, passages: Sequence[str]) -> list[Mention]:
        keys = _keys(scope, passages)
        rows = await self._in(self._readers, lambda cypher: [row for key in keys for row in cypher(_MENTIONED, {"key": key})])
        return [Mention(*row) for row in rows]

    async def documents(self, scope: Scope) -> dict[str, int]:
        return dict(await self._in(self._readers, lambda cypher: cypher(_DOCUMENTS, {"scope": scope_key(scope)})))

    async def aclose(self) -> None:
        self._closed = True
        for threads in (self._writer, self._readers):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._close)

    async def _in(self, threads: ThreadPoolExecutor, deed: "Callable[[Cypher], Found]") -> Found:
        if self._closed:
            raise StoreUnavailable(f"the graph {self._path} was closed")
        return await asyncio.get_running_loop().run_in_executor(threads, self._do, deed)

    def _do(self, deed: "Callable[[Cypher], Found]") -> Found:
        try:
            return deed(self._cypher)
        except UnicodeEncodeError as error:
            raise BadRequest(f"the graph cannot keep this: {error}") from error
        except RuntimeError as error:
            if str(error).startswith(_OURS):
                raise
            raise StoreUnavailable(f"the graph {self._path} does not answer: {error}") from error

    def _cypher(self, statement: str, values: Mapping[str, Any]) -> list[Any]:
        if not hasattr(self._own, "connection"):
            self._own.connection = ladybug.Connection(self._opened(), num_threads=1)
            self._own.connection.set_query_timeout(int(self._seconds * 1000))
        with self._own.connection.execute(statement, dict(values)) as result:
            return list(result.get_all())

    def _opened(self) -> "ladybug.Database":
        with self._opening:
            if self._database is None:
                self._take_lock()
                self._database = self._open()
            return self._database

    def _open(self) -> "ladybug.Database":
        try:
            database = ladybug.Database(self._path, buffer_pool_size=self._memory, max_num_threads=_READERS, max_db_size=2**36)
        except RuntimeError as error:
            raise CannotStart(f"the graph {self._path} cannot be opened: {error}: put a whole one there, or move it away") from error
        with ladybug.Connection(database, num_threads=1) as connection:
            for statement in _SCHEMA:
                connection.execute(statement)
        return database

    def _take_lock(self) -> None:
        """Ladybug itself lets a second process in, which would destroy the file."""
        if self._lock:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_name(f"{self._path.name}.lock").open("ab")
        except OSError as error:
            raise CannotStart(f"the graph cannot be kept in {self._path}: {error.strerror}: choose another place") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StoreInUse(f"another process uses the graph {self._path}: stop it, or choose another place") from None
        self._lock = lock

    def _close(self) -> None:
        if self._database:
            self._database.close()
            self._database = None
        if self._lock:
            self._lock.close()
            self._lock = None


Cypher = Callable[[str, Mapping[str, Any]], list[Any]]


def _put(cypher: Cypher, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
    """Forget *document* and keep *mentions* of it, all or nothing."""
    cypher("BEGIN TRANSACTION", {})
    try:
        where, own = {"scope": scope_key(scope)}, {"document": _key(scope, document)}
        before = cypher(_MENTIONED_BEFORE, own)
        for entity, count in before:
            cypher(_LESS, {"key": entity, "count": count})
        for row in cypher(_HELD, own):
            cypher(_FORGET_PASSAGE, {"key": row[0]})
        cypher(_FORGET_DOCUMENT, own)
        if mentions:
            _keep(cypher, scope, document, distinct(mentions))
        else:
            cypher(_SWEEP_SCOPE, where)
        for entity, _ in before:
            cypher(_SWEEP_ENTITY, {"key": entity})
        cypher("COMMIT", {})
    except BaseException:
        _undo(cypher)
        raise


def _keep(cypher: Cypher, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
    document.encode()
    where, own = {"scope": scope_key(scope)}, {"document": _key(scope, document)}
    cypher(_SCOPE, where)
    cypher(_DOCUMENT, {**own, "id": document})
    cypher(_KEEPS, {**where, **own})
    for id in dict.fromkeys(each.passage for each in mentions):
        cypher(_PASSAGE, {"key": _key(scope, id), "id": id})
        cypher(_HOLDS, {**own, "key": _key(scope, id)})
    for id, count in Counter(each.entity for each in mentions).items():
        cypher(_ENTITY, {"key": _key(scope, id), "id": id, "count": count})
    for each in mentions:
        ends = {"passage": _key(scope, each.passage), "entity": _key(scope, each.entity)}
        cypher(_MENTIONS, {**ends, "name": each.name, "about": each.about})


def _first(cypher: Cypher, key: str, limit: int) -> list[Mention]:
    """At most *limit* mentions of the entity with *key*, those that are about it first."""
    some = [Mention(*row) for row in cypher(_SOME, {"key": key})]
    if len(some) == _FEW:
        return [Mention(*row) for row in cypher(_FIRST, {"key": key, "limit": limit})]
    return sorted(some, key=lambda each: (not each.about, each.passage))[:limit]


def _undo(cypher: Cypher) -> None:
    try:
        cypher("ROLLBACK", {})
    except RuntimeError:
        # The fault ended the transaction already: there is nothing left to take back.
        return


def _key(scope: Scope, name: str) -> str:
    return key(scope.tenant, scope.collection, name)


def _keys(scope: Scope, names: Sequence[str]) -> list[str]:
    return [_key(scope, name) for name in dict.fromkeys(names)]
