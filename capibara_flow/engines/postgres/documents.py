"""``ports.Documents`` in PostgreSQL: one row a document, with its state; the tenants that have any."""

from collections.abc import Mapping
from typing import Any

from capibara_flow.engines.keys import key, scope_key
from capibara_flow.engines.postgres.database import Database
from topics.knowledge import Document, Scope

_TENANT = "INSERT INTO capibara.tenants (name, key) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING"
# Read under the row's lock, and before the row is written, so that of two that begin at once only one is told of it.
_BEFORE = "SELECT * FROM capibara.documents WHERE scope = $1 AND id = $2 FOR UPDATE"
_PUT = """INSERT INTO capibara.documents
        (scope, id, state, tenant, collection, title, address, digest, language, updated, owner, passages)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
    ON CONFLICT (scope, id) DO UPDATE SET state = excluded.state, title = excluded.title, address = excluded.address,
        digest = excluded.digest, language = excluded.language, updated = excluded.updated, owner = excluded.owner,
        passages = excluded.passages, changed = now()"""
_LEAVING = "UPDATE capibara.documents SET state = 'leaving', changed = now() WHERE scope = $1 AND id = $2 RETURNING *"
_GONE = "DELETE FROM capibara.documents WHERE scope = $1 AND id = $2"
_FIND = "SELECT * FROM capibara.documents WHERE scope = $1 AND id = $2 AND state = 'ready'"
_SAME = "SELECT * FROM capibara.documents WHERE scope = $1 AND digest = $2 AND state = 'ready' ORDER BY id LIMIT 1"
_LISTED = "SELECT * FROM capibara.documents WHERE scope = $1 AND id > $2 AND state = 'ready' ORDER BY id LIMIT $3"
_UNFINISHED = "SELECT * FROM capibara.documents WHERE state <> 'ready' ORDER BY changed, scope, id"
_SCOPES = "SELECT DISTINCT tenant, collection FROM capibara.documents ORDER BY tenant, collection"
_TENANTS = "SELECT name FROM capibara.tenants ORDER BY name"


class PostgresDocuments:
    """``ports.Documents`` on *database*, which it closes at its own end unless others share it."""

    def __init__(self, database: Database, *, shared: bool = False) -> None:
        self._database, self._shared = database, shared

    async def begin(self, document: Document) -> Document | None:
        return await self._put(document, "begun")

    async def ready(self, document: Document) -> None:
        await self._put(document, "ready")

    async def leaving(self, scope: Scope, id: str) -> Document | None:
        row, *_ = await self._database.change((_LEAVING, scope_key(scope), id))
        return None if row is None else _document(row)

    async def gone(self, scope: Scope, id: str) -> None:
        await self._database.change((_GONE, scope_key(scope), id))

    async def find(self, scope: Scope, id: str) -> Document | None:
        return await self._one(_FIND, scope_key(scope), id)

    async def same(self, scope: Scope, digest: str) -> Document | None:
        return await self._one(_SAME, scope_key(scope), digest)

    async def listed(self, scope: Scope, limit: int, after: str = "") -> list[Document]:
        return [_document(row) for row in await self._database.fetch(_LISTED, scope_key(scope), after, limit)]

    async def unfinished(self) -> list[Document]:
        return [_document(row) for row in await self._database.fetch(_UNFINISHED)]

    async def scopes(self) -> list[Scope]:
        return [Scope(row["tenant"], row["collection"]) for row in await self._database.fetch(_SCOPES)]

    async def tenants(self) -> list[str]:
        """Every tenant that ever had a document here."""
        return [row["name"] for row in await self._database.fetch(_TENANTS)]

    async def aclose(self) -> None:
        if not self._shared:
            await self._database.aclose()

    async def _put(self, document: Document, state: str) -> Document | None:
        scope, each = document.scope, document
        own = (scope_key(scope), each.id)
        about = (scope.tenant, scope.collection, each.title, each.address, each.digest, each.language, each.updated, each.owner)
        before, *_ = await self._database.change(
            (_BEFORE, *own), (_TENANT, scope.tenant, key(scope.tenant)), (_PUT, *own, state, *about, each.passages)
        )
        return _document(before) if before and before["state"] == "ready" else None

    async def _one(self, statement: str, *values: Any) -> Document | None:
        rows = await self._database.fetch(statement, *values)
        return _document(rows[0]) if rows else None


def _document(row: Mapping[str, Any]) -> Document:
    scope = Scope(row["tenant"], row["collection"])
    names = ("id", "title", "address", "digest", "language", "updated", "owner", "passages")
    return Document(scope=scope, **{name: row[name] for name in names})
