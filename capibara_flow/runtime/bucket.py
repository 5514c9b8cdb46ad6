"""What stands where a key of a bucket was (NATS ADR-8 and ADR-43): it was removed, or it ran out."""

from capibara_flow.runtime.client import header
from capibara_flow.runtime.output import Stored

MARKER = "Nats-Marker-Reason"
#: Headers that remove a key, and are soon gone themselves: else a marker would follow, behind whatever came after them.
REMOVED = {"KV-Operation": "PURGE", "Nats-Rollup": "sub", "Nats-TTL": "1s"}


def removed(message: Stored) -> bool:
    """Whether somebody removed the key."""
    return bool(header(message.headers, b"KV-Operation"))


def marker(message: Stored) -> bytes:
    """Why the broker put a marker in the key's place, empty when it did not."""
    return header(message.headers, MARKER.encode())
