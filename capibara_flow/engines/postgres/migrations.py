"""The tables, as numbered steps: each is applied once, in order, and never changed afterwards."""

from typing import Any

from capibara_flow.errors import CannotStart

#: Of the advisory lock under which one process at a time migrates: "capibara" as a number.
LOCK = 0x63617069_62617261
SCHEMA = "CREATE SCHEMA IF NOT EXISTS capibara"
APPLIED = """CREATE TABLE IF NOT EXISTS capibara.migrations (
    number int PRIMARY KEY, name text NOT NULL, applied timestamptz NOT NULL DEFAULT now())"""

#: A scope's key is a hash of tenant and collection: names may be longer than what an index takes.
STEPS: tuple[tuple[str, str], ...] = (
    (
        "tenants",
        "CREATE TABLE capibara.tenants (name text NOT NULL, key text PRIMARY KEY, since timestamptz NOT NULL DEFAULT now())",
    ),
    (
        "documents",
        """CREATE TABLE capibara.documents (
            scope text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL,
            state text NOT NULL CHECK (state IN ('begun', 'ready', 'leaving')),
            tenant text NOT NULL, collection text NOT NULL, title text NOT NULL, address text NOT NULL, digest text NOT NULL,
            language text NOT NULL, updated timestamptz NOT NULL, owner text NOT NULL, passages int NOT NULL,
            changed timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (scope, id));
        CREATE INDEX documents_by_digest ON capibara.documents (scope, digest) WHERE state = 'ready';
        CREATE INDEX documents_unfinished ON capibara.documents (state) WHERE state <> 'ready'""",
    ),
    (
        "usage",
        """CREATE TABLE capibara.usage (
            at timestamptz NOT NULL, tenant text NOT NULL, expert text NOT NULL, turn text NOT NULL, branch text NOT NULL,
            prompt_tokens bigint NOT NULL, completion_tokens bigint NOT NULL,
            PRIMARY KEY (turn, branch, at));
        CREATE INDEX usage_by_tenant ON capibara.usage (md5(tenant), at DESC);
        CREATE INDEX usage_by_time ON capibara.usage (at DESC)""",
    ),
    (
        "editions",
        """ALTER TABLE capibara.documents ADD COLUMN edition text NOT NULL DEFAULT '', ADD COLUMN revision bigint NOT NULL DEFAULT 0;
        CREATE TABLE capibara.revisions (scope text COLLATE "C" PRIMARY KEY, revision bigint NOT NULL);
        CREATE TABLE capibara.unfinished (
            scope text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL,
            tenant text NOT NULL, collection text NOT NULL, title text NOT NULL, address text NOT NULL, digest text NOT NULL,
            language text NOT NULL, updated timestamptz NOT NULL, owner text NOT NULL, passages int NOT NULL, edition text NOT NULL,
            changed timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (scope, id));
        WITH begun AS (DELETE FROM capibara.documents WHERE state = 'begun' RETURNING *)
        INSERT INTO capibara.unfinished (scope, id, tenant, collection, title, address, digest, language, updated, owner, passages, edition)
            SELECT scope, id, tenant, collection, title, address, digest, language, updated, owner, passages, edition FROM begun""",
    ),
)
#: The last step makes a hypertable of usage, and is looked at again at each start: the extension may come later.
HYPERTABLE = "SELECT create_hypertable('capibara.usage', 'at', create_default_indexes => false, migrate_data => true)"
_INSTALLED = "SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'"
_AVAILABLE = "SELECT count(*) FROM pg_available_extensions WHERE name = 'timescaledb'"
_SUPERUSER = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
_PRELOADED = "SELECT current_setting('shared_preload_libraries') LIKE '%timescaledb%'"
_IS_HYPERTABLE = """SELECT count(*) FROM timescaledb_information.hypertables
    WHERE hypertable_schema = 'capibara' AND hypertable_name = 'usage'"""


async def migrate(connection: Any) -> bool:
    """Bring the tables to the newest step in one transaction; whether usage is a hypertable. *connection* is asyncpg's.

    Raises ``CannotStart`` when a newer release made them.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        await connection.execute(SCHEMA)
        await connection.execute(APPLIED)
        done = await connection.fetchval("SELECT coalesce(max(number), 0) FROM capibara.migrations")
        if done > len(STEPS):
            raise CannotStart(f"the database was made by a newer release (step {done}; this one knows {len(STEPS)}): install that one")
        for number, (name, statements) in enumerate(STEPS[done:], done + 1):
            await connection.execute(statements)
            await connection.execute("INSERT INTO capibara.migrations (number, name) VALUES ($1, $2)", number, name)
        return await _hypertable(connection)


async def _hypertable(connection: Any) -> bool:
    """Make usage a hypertable where TimescaleDB is there, or can be had without asking anybody."""
    if not await connection.fetchval(_INSTALLED):
        ours = await connection.fetchval(_AVAILABLE) and await connection.fetchval(_SUPERUSER)
        if not (ours and await connection.fetchval(_PRELOADED)):
            return False
        await connection.execute("CREATE EXTENSION timescaledb")
    if not await connection.fetchval(_IS_HYPERTABLE):
        await connection.execute(HYPERTABLE)
    return True
