"""Turn ids: sortable by time, unguessable, and able to tell whose they are without a database."""

import hashlib
from collections.abc import Iterable

from topics.chat import BUCKETS

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_TIME, _CHANCE, _OWNER = 10, 16, 6
LENGTH = _TIME + _CHANCE + _OWNER
#: The tenant of all who ask without a name.
ANONYMOUS = "anonymous"


def _encode(number: int, width: int) -> str:
    """Crockford's base 32 of *number* in *width* digits, high digits cut off."""
    return "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(width)))


def _owner(tenant: str) -> str:
    """The tenant's mark: 30 bits of a hash, enough to refuse strangers an id that they cannot guess anyway."""
    return _encode(int.from_bytes(hashlib.sha256(b"owner:" + tenant.encode()).digest()[:4], "big") >> 2, _OWNER)


def turn_id(*, milliseconds: int, entropy: bytes, tenant: str) -> str:
    """An id of 32 characters: time, chance (80 bits of *entropy*, 10 bytes) and the mark of *tenant*."""
    return _encode(milliseconds, _TIME) + _encode(int.from_bytes(entropy[:10], "big"), _CHANCE) + _owner(tenant)


def is_turn_id(text: str) -> bool:
    """Whether *text* can be a turn's id, and so is safe in a subject."""
    return len(text) == LENGTH and all(letter in _ALPHABET for letter in text)


def belongs(turn: str, tenant: str) -> bool:
    """Whether *turn* was opened by *tenant*."""
    return turn[-_OWNER:] == _owner(tenant)


def created(turn: str) -> float:
    """When *turn* was opened, in seconds since the epoch."""
    number = 0
    for letter in turn[:_TIME]:
        number = number << 5 | _ALPHABET.index(letter)
    return number / 1000


def bucket(tenant: str) -> int:
    """Which of the buckets *tenant* waits in where nobody gave him one of his own: 0 is for who has no name."""
    if tenant in {"", ANONYMOUS}:
        return 0
    return 1 + int.from_bytes(hashlib.sha256(b"bucket:" + tenant.encode()).digest()[:4], "big") % (BUCKETS - 1)


def own_buckets(tenants: Iterable[str]) -> dict[str, int]:
    """A bucket of its own for each of *tenants*, as far as there are enough for all; else none: a hash serves strangers as well."""
    named = sorted(set(tenants) - {"", ANONYMOUS})
    return {tenant: number for number, tenant in enumerate(named, 1)} if len(named) < BUCKETS else {}
