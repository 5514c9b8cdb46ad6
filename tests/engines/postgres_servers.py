"""PostgreSQL servers for tests: one of our own, one in a container with TimescaleDB, and a fresh database on either."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import asyncpg
import stamina

from capibara_flow.engines.postgres.database import Database

TIMESCALE = "timescale/timescaledb:2.17.2-pg17"
_numbers = itertools.count()


@contextmanager
def timescale() -> Iterator[str]:
    """The URL of TimescaleDB in a container: where Docker answers only."""
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(TIMESCALE).with_exposed_ports(5432)
    for name in ("USER", "PASSWORD", "DB"):
        container.with_env(f"POSTGRES_{name}", "capibara")
    with container:
        host = container.get_container_host_ip()
        url = f"postgresql://capibara:capibara@{host}:{container.get_exposed_port(5432)}/capibara"
        for attempt in stamina.retry_context(on=Exception, attempts=None, timeout=120, wait_max=2):
            with attempt:
                asyncio.run(_say(url, "SELECT 1"))
        yield url


@asynccontextmanager
async def fresh(server: str) -> AsyncIterator[str]:
    """The URL of a new database on *server* that goes with the block."""
    name = f"test_{next(_numbers)}"
    await _say(server, f"CREATE DATABASE {name}")
    try:
        yield f"{server.rpartition('/')[0]}/{name}"
    finally:
        await _say(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Database]:
    """A ``Database`` at *url* for the length of a block."""
    database = Database(url, patience_seconds=20)
    yield database
    await database.aclose()


async def _say(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()
