"""Errors as clients meet them: problem details (RFC 9457) natively, OpenAI's error object below ``/v1``."""

from typing import Any

from aiohttp import web
from pydantic import ValidationError

from capibara_flow.errors import BadRequest, CapibaraError
from topics.output import Failed

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


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


def explained(error: ValidationError) -> BadRequest:
    """What is wrong with a body, in one sentence that names the fields."""
    problems = []
    for each in error.errors(include_url=False, include_input=False)[:5]:
        where = ".".join(str(part) for part in each["loc"])
        said = each["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {said}" if where else said)
    return BadRequest("; ".join(problems))
