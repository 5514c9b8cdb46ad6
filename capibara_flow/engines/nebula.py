"""``ports.GraphStore`` in NebulaGraph 3, through ``nebula3-python`` (Apache-2.0): a graph that several machines share.

The graph has three kinds of edges, and each carries the names of what it joins::

    scope -keeps(document)-> document -holds(document, passage)-> passage -mentions(passage, entity, name, about)-> entity

Vertices are keys (see ``keys``) without properties of their own, so that nothing is left of an entity that nobody mentions, and two
writers cannot disagree about that. All statements stand in ``nebula_statements``. graphd takes no parameters for vertex ids and for
values that are inserted (its issues 3990 and 4773), so ids are 64 hexadecimal digits and every other value goes through ``quoted``.
A document takes several statements, in an order in which a writer that dies leaves nothing that its next try would not find.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import stamina
from nebula3.common.ttypes import ErrorCode
from nebula3.Config import Config
from nebula3.Exception import (
    AuthFailedException,
    ClientServerIncompatibleException,
    InValidHostname,
    IOErrorException,
    NotValidConnectionException,
)
from nebula3.fbthrift.Thrift import TException
from nebula3.gclient.net.ConnectionPool import ConnectionPool
from nebula3.gclient.net.Session import Session

from capibara_flow.engines import nebula_statements as statements
from capibara_flow.engines.keys import distinct, key, scope_key
from capibara_flow.errors import BadRequest, CannotStart, StoreUnavailable
from topics.knowledge import Mention, Scope

Found = TypeVar("Found")

#: A statement is no longer than graphd's default `max_allowed_query_size` of 4 MiB by far.
_ROWS, _CHARACTERS = 500, 500_000
_NO_SESSION = (ErrorCode.E_SESSION_INVALID, ErrorCode.E_SESSION_TIMEOUT, ErrorCode.E_SESSION_NOT_FOUND)
_REFUSED = (ErrorCode.E_BAD_USERNAME_PASSWORD, ErrorCode.E_BAD_PERMISSION, ErrorCode.E_INVALID_PASSWORD)
_WRONG = (ErrorCode.E_SYNTAX_ERROR, ErrorCode.E_SEMANTIC_ERROR, ErrorCode.E_STATEMENT_EMPTY)
#: A new space, and new kinds of edges, are known to all after two heartbeats of 10 s.
_SCHEMA_SECONDS = 60
_THREADS = 4

Row = Sequence[Any]
Run = Callable[[str], list[list[Any]]]


class NebulaGraph:
    """``ports.GraphStore`` in *space* of the cluster whose graphds listen at *addresses* (host and port).

    The space and its schema are made at the first use. The client blocks: four threads, each with a session of its own, work for the
    loop. A statement may take *seconds*; what fails for want of a connection or a session is tried again for *patience_seconds*.
    Raises ``StoreUnavailable`` behind that and ``CannotStart`` when the cluster does not take us.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        *,
        user: str = "root",
        password: str = "nebula",  # noqa: S107  graphd's own default, as long as authorization is off
        space: str = "capibara",
        replicas: int = 1,
        seconds: float = 10,
        patience_seconds: float = 5,
    ) -> None:
        self._addresses, self._user, self._password = list(addresses), user, password
        self._space, self._replicas = space, replicas
        self._seconds, self._patience = seconds, patience_seconds
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="nebula")
        self._opening = threading.Lock()
        self._own = threading.local()
        self._sessions: list[Session] = []
        self._pool: ConnectionPool | None = None
        self._prepared = self._closed = False

    @property
    def name(self) -> str:
        """Where it is."""
        return f"NebulaGraph at {', '.join(f'{host}:{port}' for host, port in self._addresses)}"

    async def put(self, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
        await self._in_thread(lambda run: _put(run, scope, document, distinct(mentions)))

    async def delete(self, scope: Scope, document: str) -> None:
        await self._in_thread(lambda run: _put(run, scope, document, []))

    async def degrees(self, scope: Scope, entities: Sequence[str]) -> dict[str, int]:
        keys = _keys(scope, entities)
        rows = await self._in_thread(lambda run: [row for some in _parts(keys) for row in run(statements.degrees(some))])
        return _counts(rows)

    async def mentioning(self, scope: Scope, entities: Sequence[str], limit: int) -> list[Mention]:
        keys = _keys(scope, entities)
        rows = await self._in_thread(lambda run: [row for each in keys for row in run(statements.mentioning(each, limit))])
        return [Mention(*row) for row in rows]

    async def mentioned(self, scope: Scope, passages: Sequence[str]) -> list[Mention]:
        keys = _keys(scope, passages)
        rows = await self._in_thread(lambda run: [row for some in _parts(keys) for row in run(statements.mentioned(some))])
        return [Mention(*row) for row in rows]

    async def documents(self, scope: Scope) -> dict[str, int]:
        rows = await self._in_thread(lambda run: run(statements.documents(scope_key(scope))))
        return _counts(rows)

    async def aclose(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._close)

    async def _in_thread(self, deed: "Callable[[Run], Found]") -> Found:
        loop = asyncio.get_running_loop()
        waits = {"wait_initial": 0.05, "wait_max": 0.5, "wait_jitter": 0.1}
        tries = stamina.retry_context(on=StoreUnavailable, attempts=None, timeout=self._patience, **waits)
        async for attempt in tries:
            with attempt:
                if self._closed:
                    raise CannotStart(f"{self.name} was closed")
                return await loop.run_in_executor(self._threads, self._do, deed)
        raise AssertionError("stamina ends with a result or an error")

    def _do(self, deed: "Callable[[Run], Found]") -> Found:
        try:
            self._prepare()
            return deed(self._run)
        except (AuthFailedException, ClientServerIncompatibleException) as error:
            raise CannotStart(f"{self.name} does not let us in: {error}") from error
        except UnicodeEncodeError as error:
            raise BadRequest(f"NebulaGraph cannot keep this: {error}") from error
        except (IOErrorException, NotValidConnectionException, InValidHostname, TException, OSError) as error:
            self._forget_session()
            raise StoreUnavailable(f"{self.name} cannot be reached: {error or type(error).__name__}") from error

    def _run(self, statement: str) -> list[list[Any]]:
        """The rows of *statement*; raises by the code of what graphd answers."""
        result = self._session().execute(statement)
        if result.is_succeeded():
            return [[value.cast() for value in result.row_values(number)] for number in range(result.row_size())]
        code, told = result.error_code(), f"{self.name}: {result.error_msg()} ({result.error_code()})"
        if code in _REFUSED:
            raise CannotStart(told)
        if code in _WRONG:
            raise BadRequest(told)
        if code in _NO_SESSION:
            self._forget_session()
        raise StoreUnavailable(told)

    def _session(self) -> Session:
        """This thread's session, in our space."""
        session: Session | None = getattr(self._own, "session", None)
        if session is None:
            session = self._opened().get_session(self._user, self._password, retry_connect=False)
            with self._opening:
                self._sessions.append(session)
            self._own.session = session
            if self._prepared:
                self._go_into_space()
        return session

    def _go_into_space(self) -> None:
        try:
            self._run(statements.use(self._space))
        except BaseException:
            self._forget_session()
            raise

    def _forget_session(self) -> None:
        session, self._own.session = getattr(self._own, "session", None), None
        if session is not None:
            with self._opening:
                self._sessions.remove(session)
            _release(session)

    def _opened(self) -> ConnectionPool:
        with self._opening:
            # The client never takes back the connection of a login that failed: a pool that is full of those is left behind.
            if self._pool and self._pool.in_used_connects() > len(self._sessions) + _THREADS:
                self._pool = None
            if self._pool is None:
                config, pool = Config(), ConnectionPool()
                config.timeout = int(self._seconds * 1000)
                config.max_connection_pool_size = 3 * _THREADS * len(self._addresses)
                try:
                    pool.init(self._addresses, config)
                except RuntimeError as error:
                    # It wants all of them; one is enough for us.
                    if not pool.get_ok_servers_num():
                        pool.close()
                        raise StoreUnavailable(f"{self.name} cannot be reached: {error}") from error
                self._pool = pool
            elif not self._pool.get_ok_servers_num():
                self._pool.update_servers_status()
            return self._pool

    def _prepare(self) -> None:
        """Have the space and the kinds of edges, once; other processes may be at it too."""
        if self._prepared:
            return
        self._run(statements.make_space(self._space, self._replicas))
        waits = {"timeout": _SCHEMA_SECONDS, "wait_max": 2, "wait_jitter": 0.1}
        for attempt in stamina.retry_context(on=(StoreUnavailable, BadRequest), attempts=None, **waits):
            with attempt:
                self._run(statements.use(self._space))
                for each in statements.MAKE_EDGES:
                    self._run(each)
                self._run(statements.documents(key()))
                self._run(statements.mentioned([key()]))
        self._prepared = True

    def _close(self) -> None:
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            _release(session)
        if self._pool:
            self._pool.close()
            self._pool = None


def _release(session: Session) -> None:
    try:
        session.release()
    except (TException, OSError):
        # It is to go, and its connection is gone already.
        return


def _put(run: Run, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
    """Keep *mentions* as all of *document*: what is new first, then away with what is left from before."""
    where, own = scope_key(scope), _key(scope, document)
    passages = {_key(scope, each.passage): each.passage for each in mentions}
    pairs = {(_key(scope, each.passage), _key(scope, each.entity)): each for each in mentions}
    held = {row[0] for row in run(statements.held(own))}
    stale = [(one, other) for some in _parts(sorted(held)) for one, other in run(statements.pairs(some)) if (one, other) not in pairs]
    if mentions:
        run(statements.insert("keeps", [(where, own, (document,))]))
    for some in _parts([(own, each, (document, passage)) for each, passage in passages.items()]):
        run(statements.insert("holds", some))
    for some in _parts([(*pair, (each.passage, each.entity, each.name, each.about)) for pair, each in pairs.items()]):
        run(statements.insert("mentions", some))
    for some in _parts(stale):
        run(statements.delete("mentions", some))
    for some in _parts([(own, each) for each in sorted(held - passages.keys())]):
        run(statements.delete("holds", some))
    if not mentions:
        run(statements.delete("keeps", [(where, own)]))


def _parts(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """*rows* in order, in lists that one statement takes; none is empty."""
    part: list[Any] = []
    size = 0
    for row in rows:
        if part and (len(part) == _ROWS or size + len(repr(row)) > _CHARACTERS):
            yield part
            part, size = [], 0
        part.append(row)
        size += len(repr(row))
    if part:
        yield part


def _counts(rows: Sequence[Sequence[Any]]) -> dict[str, int]:
    return {name: count for name, count in rows}  # noqa: C416  rows are lists, of which dict() is told another type


def _key(scope: Scope, name: str) -> str:
    return key(scope.tenant, scope.collection, name)


def _keys(scope: Scope, names: Sequence[str]) -> list[str]:
    return [_key(scope, name) for name in dict.fromkeys(names)]
