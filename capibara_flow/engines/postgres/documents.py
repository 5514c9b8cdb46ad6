"""``ports.Documents`` in PostgreSQL: a row for a document that is ready or leaving, one for what of it is unfinished; all tenants."""

# ruff: noqa: S608  statements are put together from names of our own, never from values

from collections.abc import Mapping, Sequence
from typing import Any

from capibara_flow.engines.keys import key, scope_key
from capibara_flow.engines.postgres.database import Database
from capibara_flow.ports import Edition, Standing
from topics.knowledge import Document, Scope

_FIELDS = "scope, id, tenant, collection, title, address, digest, language, updated, owner, passages, edition"
_VALUES = "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12"
_SAME_FIELDS = """title = excluded.title, address = excluded.address, digest = excluded.digest, language = excluded.language,
        updated = excluded.updated, owner = excluded.owner, passages = excluded.passages, edition = excluded.edition, changed = now()"""
_TENANT = "INSERT INTO capibara.tenants (name, key) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING"
_BEGIN = f"INSERT INTO capibara.unfinished ({_FIELDS}) VALUES ({_VALUES}) ON CONFLICT (scope, id) DO UPDATE SET {_SAME_FIELDS}"
_LEFT_NO_MORE = "DELETE FROM capibara.documents WHERE scope = $1 AND id = $2 AND state = 'leaving'"
# The row is locked to the end of the transaction, so that a scope's revisions become visible in their order.
_REVISION = """INSERT INTO capibara.revisions (scope, revision) VALUES ($1, 1)
    ON CONFLICT (scope) DO UPDATE SET revision = revisions.revision + 1"""
# Both may be done twice: whoever is ready already does not replace itself.
_REPLACED = f"""INSERT INTO capibara.unfinished ({_FIELDS}) SELECT {_FIELDS} FROM capibara.documents
    WHERE scope = $1 AND id = $2 AND state = 'ready' AND (edition, digest) <> ($3, $4)
    ON CONFLICT (scope, id) DO UPDATE SET {_SAME_FIELDS}"""
_BEGUN_NO_MORE = "DELETE FROM capibara.unfinished WHERE scope = $1 AND id = $2 AND edition = $3 AND digest = $4"
_READY = f"""INSERT INTO capibara.documents ({_FIELDS}, state, revision)
    VALUES ({_VALUES}, 'ready', (SELECT revision FROM capibara.revisions WHERE scope = $1))
    ON CONFLICT (scope, id) DO UPDATE SET state = excluded.state, revision = excluded.revision, {_SAME_FIELDS}"""
_SETTLED = "DELETE FROM capibara.unfinished WHERE scope = $1 AND id = $2"
_LEAVING = "UPDATE capibara.documents SET state = 'leaving', changed = now() WHERE scope = $1 AND id = $2 RETURNING *"
_BEGUN = "SELECT * FROM capibara.unfinished WHERE scope = $1 AND id = $2"
_GONE = "DELETE FROM capibara.documents WHERE scope = $1 AND id = $2"
_FIND = "SELECT * FROM capibara.documents WHERE scope = $1 AND id = $2 AND state = 'ready'"
_SAME = "SELECT * FROM capibara.documents WHERE scope = $1 AND digest = $2 AND state = 'ready' ORDER BY id LIMIT 1"
_LISTED = "SELECT * FROM capibara.documents WHERE scope = $1 AND id > $2 AND state = 'ready' ORDER BY id LIMIT $3"
_LEFT = f"""SELECT {_FIELDS} FROM capibara.documents WHERE scope = $1 AND id = $2 AND state <> 'ready'
    UNION ALL SELECT {_FIELDS} FROM capibara.unfinished WHERE scope = $1 AND id = $2"""
_UNFINISHED = f"""SELECT {_FIELDS}, changed FROM capibara.documents WHERE state <> 'ready'
    UNION ALL SELECT {_FIELDS}, changed FROM capibara.unfinished ORDER BY changed, scope, id"""
# Joined, not ``= ANY``: for that the whole scope is read.
_STANDING = """SELECT coalesce((SELECT revision FROM capibara.revisions WHERE scope = $1), 0) AS now,
        found.id, found.edition, found.revision
    FROM (VALUES (1)) AS one LEFT JOIN (unnest($2::text[]) AS wanted (id) JOIN capibara.documents AS found
        ON found.scope = $1 AND found.id = wanted.id COLLATE "C" AND found.state = 'ready') ON true"""
_SCOPES = """SELECT tenant, collection FROM capibara.documents UNION SELECT tenant, collection FROM capibara.unfinished
    ORDER BY tenant, collection"""
_TENANTS = "SELECT name FROM capibara.tenants ORDER BY name"


class PostgresDocuments:
    """``ports.Documents`` on *database*, which it closes at its own end unless others share it."""

    def __init__(self, database: Database, *, shared: bool = False) -> None:
        self._database, self._shared = database, shared

    async def begin(self, document: Document) -> None:
        own, scope = _own(document), document.scope
        await self._database.change((_TENANT, scope.tenant, key(scope.tenant)), (_BEGIN, *_row(document)), (_LEFT_NO_MORE, *own))

    async def ready(self, document: Document) -> None:
        own, scope, edition = _own(document), document.scope, (document.edition, document.digest)
        await self._database.change(
            (_TENANT, scope.tenant, key(scope.tenant)),
            (_REVISION, own[0]),
            (_REPLACED, *own, *edition),
            (_BEGUN_NO_MORE, *own, *edition),
            (_READY, *_row(document)),
        )

    async def settled(self, scope: Scope, id: str) -> None:
        await self._database.change((_SETTLED, scope_key(scope), id))

    async def left(self, scope: Scope, id: str) -> list[Document]:
        return [_document(row) for row in await self._database.fetch(_LEFT, scope_key(scope), id)]

    async def standing(self, scope: Scope, ids: Sequence[str]) -> Standing:
        rows = await self._database.fetch(_STANDING, scope_key(scope), list(ids))
        return Standing(rows[0]["now"], {row["id"]: Edition(row["edition"], row["revision"]) for row in rows if row["id"] is not None})

    async def leaving(self, scope: Scope, id: str) -> Document | None:
        own = (scope_key(scope), id)
        rows = await self._database.change((_LEAVING, *own), (_BEGUN, *own))
        return next((_document(row) for row in rows if row is not None), None)

    async def gone(self, scope: Scope, id: str) -> None:
        own = (scope_key(scope), id)
        await self._database.change((_GONE, *own), (_SETTLED, *own))

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

    async def _one(self, statement: str, *values: Any) -> Document | None:
        rows = await self._database.fetch(statement, *values)
        return _document(rows[0]) if rows else None


def _own(document: Document) -> tuple[str, str]:
    return scope_key(document.scope), document.id


def _row(document: Document) -> tuple[Any, ...]:
    """The values of ``_FIELDS``."""
    scope, each = document.scope, document
    about = (each.title, each.address, each.digest, each.language, each.updated, each.owner, each.passages, each.edition)
    return (*_own(document), scope.tenant, scope.collection, *about)


def _document(row: Mapping[str, Any]) -> Document:
    scope = Scope(row["tenant"], row["collection"])
    names = ("id", "title", "address", "digest", "language", "updated", "owner", "passages", "edition")
    return Document(scope=scope, **{name: row[name] for name in names})
