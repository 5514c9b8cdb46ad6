"""What a request says beside its body: where to go on, under which key it may be repeated, yes or no."""

import hashlib
import re
from dataclasses import dataclass

import orjson
from aiohttp import web

from capibara_flow.errors import BadRequest
from topics.chat import ChatRequest, Priority

IDEMPOTENCY_KEY, REPLAYED = "Idempotency-Key", "Idempotency-Replayed"
_LONGEST_KEY = 255
_PLACE = re.compile(r"(\d{1,18})(?:-([1-9]\d{0,8}))?", re.ASCII)
_YES, _NO = ("true", "1"), ("false", "0")


@dataclass(frozen=True)
class Terms:
    """How a turn shall be done: within *seconds*, *attended* or not, in the *background*, once under *key* (a hash) if there is one.

    *priority* is among its tenant's own turns.
    """

    seconds: float
    attended: bool = False
    key: str | None = None
    background: bool = False
    priority: Priority = "normal"

    @property
    def recalled(self) -> bool:
        """Whether somebody may come back to a turn that nobody attends."""
        return not self.attended and (self.background or self.key is not None)


@dataclass(frozen=True)
class Place:
    """How far a reader got: it has everything up to message *sequence*, and the first *lines* of the very next one."""

    sequence: int
    lines: int = 0


def resume_point(request: web.Request) -> Place:
    """Where to go on: behind message ``SEQ``, or behind the k-th line of it, ``SEQ-k``; raises ``BadRequest``."""
    given = request.headers.get("Last-Event-ID") or request.query.get("after") or "0"
    found = _PLACE.fullmatch(given)
    if found is None or (found[2] and not int(found[1])):
        raise BadRequest("Last-Event-ID must be the id of an event of this turn")
    return Place(int(found[1]) - 1, int(found[2])) if found[2] else Place(int(found[1]))


def flag(request: web.Request, name: str) -> bool:
    """Whether the query says yes to *name*; raises ``BadRequest`` for what is neither yes nor no."""
    given = request.query.get(name, "false").lower()
    if given not in _YES + _NO:
        raise BadRequest(f"{name} must be one of {', '.join(_YES + _NO)}")
    return given in _YES


def idempotency_key(request: web.Request, tenant: str) -> str | None:
    """The hash of the request's ``Idempotency-Key`` among those of *tenant*, if it has one; raises ``BadRequest``."""
    given = request.headers.get(IDEMPOTENCY_KEY)
    if given is None:
        return None
    if not (0 < len(given) <= _LONGEST_KEY and given.isascii() and given.isprintable()):
        raise BadRequest(f"{IDEMPOTENCY_KEY} must be 1 to {_LONGEST_KEY} printable ASCII characters")
    return hashlib.sha256(orjson.dumps([tenant, given])).hexdigest()


def digest(request: ChatRequest) -> str:
    """What tells *request* from any other one, in whatever dialect and order of fields it was asked."""
    return hashlib.sha256(orjson.dumps(request.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)).hexdigest()
