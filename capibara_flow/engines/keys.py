"""Names as keys: of any length and any characters to 64 hexadecimal digits, which every store takes in every place."""

import json
from collections.abc import Iterable
from hashlib import sha256

from topics.knowledge import Mention, Scope


def key(*names: str) -> str:
    """The SHA-256, in hex, of *names*, of which no two lists share one."""
    # JSON escapes what UTF-8 could not encode, and marks where a name ends.
    return sha256(json.dumps(names).encode()).hexdigest()


def scope_key(scope: Scope) -> str:
    """The key of *scope*."""
    return key(scope.tenant, scope.collection)


def distinct(mentions: Iterable[Mention]) -> list[Mention]:
    """*mentions* with each pair of passage and entity once: the last of them, in the place of the first.

    Raises ``UnicodeEncodeError`` where there are halves of surrogate pairs, which no store takes.
    """
    each = {(each.passage, each.entity): each for each in mentions}
    for mention in each.values():
        f"{mention.passage}{mention.entity}{mention.name}".encode()
    return list(each.values())
