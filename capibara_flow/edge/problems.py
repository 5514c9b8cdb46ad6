"""Errors as clients meet them: problem details (RFC 9457) natively, OpenAI's error object below ``/v1``."""

import re
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import from_json

from capibara_flow.errors import BadRequest, CapibaraError
from topics.output import Failed

#: The header of an error that may be gone when it is tried again; in seconds.
AGAIN = {"Retry-After": "2"}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_OURS = re.compile(r"^(?:Input|Tuple|List|Dictionary|String) should ")
_AFTERWARDS = re.compile(r" after validation, not .*$")
_KIND = re.compile(r"must be (?:a valid \w+|an object)$")
_UNKNOWN_KIND = re.compile(r"Input tag .* found using '(\w+)' does not match any of the expected tags: (.*)$", re.DOTALL)


def as_failed(turn: str, error: CapibaraError) -> Failed:
    """*error* as the event that ends a stream."""
    return Failed(turn=turn, title=error.title, status=error.status, detail=str(error), retryable=error.retryable)


def problem(status: int, title: str, detail: str) -> dict[str, Any]:
    """Problem details."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail}


def openai_error(status: int, title: str, detail: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; ``code`` is our title with underscores."""
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "model_not_found" if title == "unknown expert" else title.replace(" ", "_")
    return {"error": {"message": detail, "type": kind, "param": param, "code": code}}


def respond(request: web.Request, status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    """An error response in the dialect of the path that was asked."""
    if request.path.startswith("/v1/"):
        return web.json_response(openai_error(status, title, detail), status=status, headers=headers)
    return web.json_response(problem(status, title, detail), status=status, headers=headers, content_type="application/problem+json")


def explained(error: ValidationError, raw: bytes) -> BadRequest:
    """What is wrong with the body *raw*, in one sentence that names the fields as the client wrote them."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    body = None if found[0]["type"] == "json_invalid" else from_json(raw)
    told: dict[str, list[str]] = {}
    for each in found:
        told.setdefault(_place(each["loc"], body, missing=each["type"] == "missing"), []).append(_words(each["msg"]))
    # A value that may be of several kinds is refused by each of them; what is wrong inside the kind that it has says more.
    deepest = [place for place in told if not any(other.startswith(f"{place}.") for other in told)]
    return BadRequest("; ".join(_sentence(place, told[place]) for place in deepest[:5]))


def _place(loc: Sequence[int | str], body: Any, *, missing: bool) -> str:
    """*loc* without the names of our own types, which stand between those of the client's fields."""
    names = []
    for number, part in enumerate(loc, 1):
        if isinstance(body, dict) and part in body:
            body = body[str(part)]
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        elif not (missing and number == len(loc)):
            continue
        names.append(str(part))
    return ".".join(names)


def _words(message: str) -> str:
    """What must be, without what our own language calls it."""
    message = message.removeprefix("Value error, ")
    if found := _UNKNOWN_KIND.match(message):
        return f"{found[1]} must be one of {found[2]}"
    message = message.replace("Unable to extract tag using discriminator 'type'", "type must be given")
    return _AFTERWARDS.sub("", _OURS.sub("must ", message))


def _sentence(place: str, said: list[str]) -> str:
    # Of several refusals the one that is not about the mere kind says more.
    plain = [each for each in said if not _KIND.match(each)] or sorted(set(said))
    words = " or ".join([plain[0], *(each.removeprefix("must be ") for each in plain[1:])])
    if place:
        return f"{place}: {words}"
    return f"the body {words}" if words.startswith("must ") else words
