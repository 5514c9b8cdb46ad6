"""A database as our stores use it: a pool of connections that heals, tables that are up to date, errors that are ours."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import stamina

from capibara_flow.engines.postgres.migrations import migrate
from capibara_flow.errors import BadRequest, CannotStart, StoreUnavailable

#: What may be better a moment later: no connection, a lost one, a server that starts, stops or is full.
_MAY_PASS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # How asyncpg sees a connection that the server ended a moment ago, now and then: it says that another operation is in progress.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
)
#: What an operator must mend.
_WRONG = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ClientConfigurationError,
)
#: Somebody else may be at it, and a table may be large.
_MIGRATION_SECONDS = 600


class Database:
    """PostgreSQL at *url*, as several stores may share it; connects, and brings the tables up to date, at the first use.

    A statement may take *seconds*; one that fails for want of a connection is tried again for *patience_seconds*, so it must be
    one that may be done twice. Raises ``StoreUnavailable`` behind that, ``CannotStart`` when the server does not take us, and
    ``BadRequest`` for values that no PostgreSQL can keep. *hypertable* is whether usage is one of TimescaleDB's.
    """

    def __init__(self, url: str, *, connections: int = 5, seconds: float = 10, patience_seconds: float = 5) -> None:
        self.hypertable = False
        self._url, self._connections = url, connections
        self._seconds, self._patience = seconds, patience_seconds
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def name(self) -> str:
        """Where it is, without its password."""
        parts = urlsplit(self._url)
        return f"PostgreSQL at {parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"

    async def fetch(self, statement: str, *values: Any) -> "list[asyncpg.Record]":
        """The rows of *statement*, whose ``$1``, ``$2``... are *values*."""
        async for attempt in self._tries():
            with attempt:
                async with self._connection() as connection:
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *values)
                    return rows
        raise AssertionError("stamina ends with a result or an error")

    async def change(self, *deeds: Sequence[Any]) -> "list[asyncpg.Record | None]":
        """Do *deeds*, each a statement and its values, in one transaction; the first row of each."""
        async for attempt in self._tries():
            with attempt:
                async with self._connection() as connection, connection.transaction():
                    return [await connection.fetchrow(statement, *values) for statement, *values in deeds]
        raise AssertionError("stamina ends with a result or an error")

    async def aclose(self) -> None:
        """Let the connections go; those that are in use have a moment."""
        self._closed = True
        if self._pool:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except _MAY_PASS:
                pool.terminate()

    def _tries(self) -> "AsyncIterator[stamina.Attempt]":
        return aiter(stamina.retry_context(on=StoreUnavailable, attempts=None, timeout=self._patience, wait_initial=0.05, wait_max=0.5))

    @asynccontextmanager
    async def _connection(self) -> "AsyncIterator[asyncpg.Connection]":
        if self._closed:
            raise CannotStart(f"{self.name} was closed")
        try:
            pool = await self._opened()
            async with pool.acquire(timeout=self._seconds) as connection:
                yield connection
        except _WRONG as error:
            raise CannotStart(f"{self.name} does not let us in: {error}") from error
        except (asyncpg.DataError, UnicodeEncodeError) as error:
            raise BadRequest(f"PostgreSQL cannot keep this: {error}") from error
        except _MAY_PASS as error:
            raise StoreUnavailable(f"{self.name} cannot be reached: {error or type(error).__name__}") from error

    async def _opened(self) -> "asyncpg.Pool":
        async with self._opening:
            if self._pool is None:
                await self._migrate()
                self._pool = await asyncpg.create_pool(
                    self._url, min_size=0, max_size=self._connections, timeout=self._seconds, command_timeout=self._seconds
                )
            return self._pool

    async def _migrate(self) -> None:
        connection = await asyncpg.connect(self._url, timeout=self._seconds, command_timeout=_MIGRATION_SECONDS)
        try:
            self.hypertable = await migrate(connection)
        finally:
            connection.terminate()
