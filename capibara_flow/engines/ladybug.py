"""``ports.GraphStore`` in Ladybug (MIT), an embedded property graph with Cypher: one folder of this machine, one process.

The graph: ``(Scope)-[Keeps]->(Document)-[Holds]->(Passage)-[Mentions {name, about}]->(Entity {degree})``. Only primary keys are
indexed, and what hangs on a node is found from there only where that node is matched first: with several in one pattern it reads whole
tables. So a list of keys is unwound, its nodes are matched, and what hangs on them follows in a pattern of its own (for reading, an
optional one). An entity knows by itself how many passages mention it, for many names of a question are looked up that nobody mentions.
Values only ever travel as parameters.
"""

import asyncio
import fcntl
import threading
from collections import Counter, defaultdict
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
_SWEEP_ENTITY = "MATCH (e:Entity {key: $key}) WHERE e.degree <= 0 DETACH DELETE e"
_SWEEP_SCOPE = "MATCH (s:Scope {key: $scope}) WHERE NOT EXISTS { MATCH (s)-[:Keeps]->(:Document) } DELETE s"
_SCOPE = "MERGE (:Scope {key: $scope})"
_DOCUMENT = "CREATE (:Document {key: $document, id: $id})"
_KEEPS = "MATCH (s:Scope {key: $scope}), (d:Document {key: $document}) CREATE (s)-[:Keeps]->(d)"
_PASSAGE = "MERGE (p:Passage {key: $key}) ON CREATE SET p.id = $id"
_HOLDS = "MATCH (d:Document {key: $document}), (p:Passage {key: $key}) CREATE (d)-[:Holds]->(p)"
_KNOWN = "UNWIND $keys AS key MATCH (e:Entity {key: key}) RETURN e.key"
_ENTITIES = "UNWIND $entities AS each CREATE (:Entity {key: each.key, id: each.id, degree: each.count})"
_COUNT = "UNWIND $entities AS each MATCH (e:Entity {key: each.key}) SET e.degree = e.degree + each.count"
_MENTIONS = """MATCH (p:Passage {key: $passage}) UNWIND $mentions AS each MATCH (e:Entity {key: each.entity})
    CREATE (p)-[:Mentions {name: each.name, about: each.about}]->(e)"""
#: Mentions of one entity that are cheaper to sort here than there.
_FEW = 500
_DEGREES = "UNWIND $keys AS key MATCH (e:Entity {key: key}) RETURN e.id, e.degree"
# An entity of too many, and a passage without any, is one row without the other end.
_SOME = f"""UNWIND $keys AS key MATCH (e:Entity {{key: key}})
    OPTIONAL MATCH (e)<-[m:Mentions]-(p:Passage) WHERE e.degree <= {_FEW} RETURN p.id, e.id, m.name, m.about"""
_FIRST = """MATCH (e:Entity {key: $key})<-[m:Mentions]-(p:Passage)
    RETURN p.id, e.id, m.name, m.about ORDER BY m.about DESC, p.id LIMIT $limit"""
_MENTIONED = """UNWIND $keys AS key MATCH (p:Passage {key: key})
    OPTIONAL MATCH (p)-[m:Mentions]->(e:Entity) RETURN p.id, e.id, m.name, m.about"""
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
        return await self._in(self._readers, lambda cypher: _first(cypher, scope, list(dict.fromkeys(entities)), limit))

    async def mentioned(self, scope: Scope, passages: Sequence[str]) -> list[Mention]:
        keys, places = _keys(scope, passages), {id: place for place, id in enumerate(passages)}
        rows = await self._in(self._readers, lambda cypher: cypher(_MENTIONED, {"keys": keys}) if keys else [])
        return sorted((Mention(*row) for row in rows if row[1] is not None), key=lambda each: places[each.passage])

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
        if before:
            cypher(_COUNT, {"entities": [{"key": entity, "count": -count} for entity, count in before]})
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
    _count(cypher, {_key(scope, id): (id, count) for id, count in Counter(each.entity for each in mentions).items()})
    rows = defaultdict(list)
    for each in mentions:
        rows[each.passage].append({"entity": _key(scope, each.entity), "name": each.name, "about": each.about})
    for id, its in rows.items():
        cypher(_MENTIONS, {"passage": _key(scope, id), "mentions": its})


def _count(cypher: Cypher, entities: Mapping[str, tuple[str, int]]) -> None:
    """Have *entities*, by key, with their ids, and count so many more mentions of each; MERGE takes four times as long."""
    known = {row[0] for row in cypher(_KNOWN, {"keys": list(entities)})}
    if fresh := [{"key": key, "id": id, "count": count} for key, (id, count) in entities.items() if key not in known]:
        cypher(_ENTITIES, {"entities": fresh})
    if known:
        cypher(_COUNT, {"entities": [{"key": key, "count": entities[key][1]} for key in sorted(known)]})


def _first(cypher: Cypher, scope: Scope, entities: Sequence[str], limit: int) -> list[Mention]:
    """At most *limit* mentions of each of *entities*, those that are about it first."""
    found: dict[str, list[Mention]] = {id: [] for id in entities}
    for row in cypher(_SOME, {"keys": [_key(scope, id) for id in entities]}) if entities else ():
        passage, entity = row[:2]
        if passage is None:
            found[entity] = [Mention(*each) for each in cypher(_FIRST, {"key": _key(scope, entity), "limit": limit})]
        else:
            found[entity].append(Mention(*row))
    return [each for its in found.values() for each in sorted(its, key=lambda each: (not each.about, each.passage))[:limit]]


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
