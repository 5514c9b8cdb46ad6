"""Every statement of nGQL (NebulaGraph 3) that we say, as functions of their values: no more than these.

Vertex ids are keys of 64 hexadecimal digits, quoted as they are; ``quoted`` is for all other text.
"""

import re
from collections.abc import Sequence

#: Columns of the edges, in the order of their values.
COLUMNS = {"keeps": ("document",), "holds": ("document", "passage"), "mentions": ("passage", "entity", "name", "about")}
MAKE_EDGES = (
    "CREATE EDGE IF NOT EXISTS keeps(document string NOT NULL)",
    "CREATE EDGE IF NOT EXISTS holds(document string NOT NULL, passage string NOT NULL)",
    "CREATE EDGE IF NOT EXISTS mentions(passage string NOT NULL, entity string NOT NULL, name string NOT NULL, about bool NOT NULL)",
)
_MENTION = ", ".join(f"properties(edge).{name} AS {name}" for name in COLUMNS["mentions"])
#: What ends a string literal, begins an escape, or cannot stand in one: the scanner takes octal escapes for all of them.
_SPECIAL = re.compile(r'["\\\x00-\x1f\x7f]')
_SPACE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


def quoted(value: str) -> str:
    """*value* as a string literal; raises ``UnicodeEncodeError`` for halves of surrogate pairs."""
    value.encode()
    return '"' + _SPECIAL.sub(lambda found: f"\\{ord(found[0]):03o}", value) + '"'


def make_space(space: str, replicas: int) -> str:
    """Have *space*; raises ``ValueError`` for a name that is none."""
    return f"CREATE SPACE IF NOT EXISTS {_named(space)}(partition_num = 10, replica_factor = {replicas:d}, vid_type = FIXED_STRING(64))"


def use(space: str) -> str:
    """Go on in *space*."""
    return f"USE {_named(space)}"


def insert(edge: str, rows: Sequence[tuple[str, str, Sequence[str | bool]]]) -> str:
    """Put edges, each from a vertex to another with its values, in place of those that join the same two."""
    values = ", ".join(f"{_id(one)} -> {_id(other)}:({', '.join(map(_literal, each))})" for one, other, each in rows)
    return f"INSERT EDGE {edge}({', '.join(COLUMNS[edge])}) VALUES {values}"  # noqa: S608  literals are quoted above


def delete(edge: str, rows: Sequence[tuple[str, str]]) -> str:
    """Take edges away, which need not be there."""
    return f"DELETE EDGE {edge} {', '.join(f'{_id(one)} -> {_id(other)}' for one, other in rows)}"


def held(document: str) -> str:
    """The keys of the passages of *document*."""
    return f"GO FROM {_id(document)} OVER holds YIELD dst(edge) AS other"


def pairs(passages: Sequence[str]) -> str:
    """The keys of *passages*, each with that of an entity that it mentions."""
    return f"GO FROM {_ids(passages)} OVER mentions YIELD src(edge) AS one, dst(edge) AS other"


def mentioned(passages: Sequence[str]) -> str:
    """What *passages* mention."""
    return f"GO FROM {_ids(passages)} OVER mentions YIELD {_MENTION}"


def mentioning(entity: str, limit: int) -> str:
    """Who mentions *entity*, at most *limit*, those that are about it first."""
    order = "ORDER BY $-.about DESC, $-.passage ASC"
    return f"GO FROM {_id(entity)} OVER mentions REVERSELY YIELD {_MENTION} | {order} | LIMIT {limit:d}"


def degrees(entities: Sequence[str]) -> str:
    """How many passages mention each of *entities*."""
    count = "GROUP BY $-.entity YIELD $-.entity AS entity, count(*) AS n"
    return f"GO FROM {_ids(entities)} OVER mentions REVERSELY YIELD properties(edge).entity AS entity | {count}"


def documents(scope: str) -> str:
    """How many passages each document of *scope* has."""
    count = "GROUP BY $-.document YIELD $-.document AS document, count(*) AS n"
    return f"GO 2 STEPS FROM {_id(scope)} OVER keeps, holds YIELD properties(edge).document AS document | {count}"


def _named(space: str) -> str:
    if not _SPACE.fullmatch(space):
        raise ValueError(f"{space!r} cannot be the name of a space: letters, digits and _ only, a letter first")
    return space


def _id(key: str) -> str:
    return quoted(key)


def _ids(keys: Sequence[str]) -> str:
    return ", ".join(map(_id, keys))


def _literal(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else quoted(value)
