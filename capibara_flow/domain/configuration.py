"""Which configuration somebody decided by: fleets and routes as data without secrets, and a short digest of them. Pure."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routes import Routes

#: What stands where a secret was.
REDACTED = "(redacted)"
_SECRET = re.compile(r"key|token|secret|passw|credential|authorization|cookie", re.IGNORECASE)
_HARMLESS = re.compile(r"tokenizer", re.IGNORECASE)
_DIGITS = 12


def told(fleet: Fleet) -> dict[str, Any]:
    """*fleet* as JSON data without its secrets: API keys, options of engines that are called like one, and what addresses hide."""
    data: dict[str, Any] = redacted(fleet.model_dump(mode="json", exclude_defaults=True))
    return data


def redacted(value: Any) -> Any:
    """*value*, JSON data, without the words that stand under the name of a secret, and without users and keys in addresses."""
    if isinstance(value, Mapping):
        return {name: REDACTED if isinstance(each, str) and is_secret(name) else redacted(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    return _address(value) if isinstance(value, str) and "://" in value else value


def is_secret(name: str) -> bool:
    """Whether what is called *name* (a field, a header, an option of an engine) is nobody else's business."""
    return bool(_SECRET.search(name)) and not _HARMLESS.search(name)


def digest(fleet: Fleet, routes: Routes | None) -> str:
    """A short name for *fleet* and the *routes* that it is read by: 12 hexadecimal digits of a SHA-256.

    It is the same with and without secrets, so that it tells nothing of them.
    """
    data = {"fleet": told(fleet), "routes": None if routes is None else routes.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:_DIGITS]


def _address(text: str) -> str:
    """*text*, if it is an address, without a user in it, and without what its query calls a secret."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return REDACTED
    host = parts.netloc.rpartition("@")[2]
    fields = [field.partition("=") for field in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}{sign}{REDACTED if sign and is_secret(name) else value}" for name, sign, value in fields)
    return urlunsplit(parts._replace(netloc=host, query=query)) if (host, query) != (parts.netloc, parts.query) else text
