"""``ports.UsageLog`` in PostgreSQL; the table is a hypertable where TimescaleDB is installed, and reads the same."""

from datetime import datetime

from capibara_flow.engines.postgres.database import Database
from capibara_flow.ports import Spent, SpentDay

# All rows in one statement: as arrays, for a statement may take no more than 32,767 single values.
_RECORD = """INSERT INTO capibara.usage (at, tenant, expert, turn, branch, prompt_tokens, completion_tokens)
    SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[])
    ON CONFLICT DO NOTHING"""
_BY_DAY = """SELECT (at AT TIME ZONE 'UTC')::date AS day, tenant, expert, count(*) AS answers,
        sum(prompt_tokens)::bigint AS prompt_tokens, sum(completion_tokens)::bigint AS completion_tokens
    FROM capibara.usage
    WHERE at >= $1 AND at < $2 AND ($3::text IS NULL OR (tenant = $3 AND md5(tenant) = md5($3)))
    GROUP BY day, tenant, expert ORDER BY day, tenant COLLATE "C", expert COLLATE "C\""""


class PostgresUsage:
    """``ports.UsageLog`` on *database*, which it closes at its own end unless others share it."""

    def __init__(self, database: Database, *, shared: bool = False) -> None:
        self._database, self._shared = database, shared

    async def record(self, *spent: Spent) -> None:
        if spent:
            rows = [(e.when, e.tenant, e.expert, e.turn, e.branch, e.prompt_tokens, e.completion_tokens) for e in spent]
            await self._database.change((_RECORD, *map(list, zip(*rows, strict=True))))

    async def by_day(self, since: datetime, until: datetime, tenant: str | None = None) -> list[SpentDay]:
        return [SpentDay(**row) for row in await self._database.fetch(_BY_DAY, since, until, tenant)]

    async def aclose(self) -> None:
        if not self._shared:
            await self._database.aclose()
