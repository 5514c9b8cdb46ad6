"""The door described: OpenAPI 3.1, its schemas computed from the models that check the bodies."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from capibara_flow import __version__
from capibara_flow.edge.asked import IDEMPOTENCY_KEY, REPLAYED
from capibara_flow.edge.bodies import ChatBody, CompletionBody, DocumentBody, RouteBody, SearchBody
from topics.chat import Decision
from topics.grounding import DocumentFacts
from topics.knowledge import DEFAULT_COLLECTION
from topics.output import OUTPUTS
from topics.usage import UsageDay

_TURN = {"name": "turn", "in": "path", "required": True, "schema": {"type": "string", "minLength": 32, "maxLength": 32}}
_COMPLETION = {"name": "turn", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^(chatcmpl-)?[0-9A-Z]{32}$"}}
_NATIVE = {
    "required": False,
    "description": "The id of the last event that was read. In the native dialect every event of the turn has one: that of a stored "
    "message, SEQ, or of the k-th of several lines in one, SEQ-k. Take it as a word without a meaning",
    "schema": {"type": "string", "pattern": r"^\d{1,18}(-[1-9]\d{0,8})?$"},
}
_CHUNK = {"required": False, "description": "The last id that was read", "schema": {"type": "string", "pattern": r"^\d{1,18}$"}}
_HEADER, _QUERY = {"name": "Last-Event-ID", "in": "header"}, {"name": "after", "in": "query"}
_ERASE = {"name": "erase", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}
_USAGE = {"name": "include_usage", "in": "query", "required": False, "schema": {"type": "boolean", "default": False}}
_DOCUMENT = {"name": "document", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{1,64}$"}}
_ONCE = {
    "name": IDEMPOTENCY_KEY,
    "in": "header",
    "required": False,
    "description": f"The same key with the same request again reads the turn of the first one ({REPLAYED}: true); with another, 422",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]*$"},
}

_LIMIT = {"name": "limit", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}}
_SINCE = {
    "name": "since",
    "in": "query",
    "required": False,
    "description": "How long ago at most: 90s, 15m, 1h, 2d",
    "schema": {"type": "string", "pattern": r"^\d{1,9}(\.\d{1,3})?[smhd]?$"},
}
_FILTERS = [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in ("expert", "outcome")]
_FORMAT = {"name": "format", "in": "query", "required": False, "schema": {"type": "string", "enum": ["json", "svg", "html"]}}


def _body(name: str) -> dict[str, Any]:
    return {"required": True, **_json(name)}


def _json(name: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def _answer(text: str, *kinds: str) -> dict[str, Any]:
    return {"description": text, "content": {kind: {"schema": {"type": "string" if "text" in kind else "object"}} for kind in kinds}}


def _gone(error: dict[str, Any]) -> dict[str, Any]:
    return error | {"description": "What went wrong; 404: there is no such turn, 410: what is asked for is no longer kept"}


def _query(name: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema or {"type": "string"}}


def _usage() -> dict[str, Any]:
    count, moment = {"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}
    total = {"type": "object", "properties": dict.fromkeys(("answers", "prompt_tokens", "completion_tokens"), count)}
    days = {"type": "array", "items": {"$ref": "#/components/schemas/UsageDay"}}
    told = {"since": moment, "until": moment, "days": days, "total": total, "waiting": count, "more": {"type": "boolean"}}
    schema = {"type": "object", "properties": told, "required": list(told)}
    return {"description": "The days, and their sums; waiting: calls not yet in them", "content": {"application/json": {"schema": schema}}}


_COLLECTION = _query("collection", {"type": "string", "pattern": r"^[\w.-]{1,64}$", "default": DEFAULT_COLLECTION})
_SAID = [_query(name) for name in ("name", "title", "address")]
_WAIT = _query("wait", {"type": "boolean", "default": False})
_MOMENT = {"type": "string", "pattern": r"^(\d{4}-\d\d-\d\d|\d{1,9}(\.\d{1,3})?[smhd]?)$"}
_PROBLEM = _answer("What went wrong", "application/problem+json")
_ERROR = _answer("What went wrong", "application/json")
_CHAT = {"200": _answer("The answer", "text/event-stream", "application/json"), "4XX": _PROBLEM, "5XX": _PROBLEM}
_PATHS: dict[str, Any] = {
    "/api/chat": {
        "post": {"summary": "Ask; the answer streams back", "parameters": [_ONCE], "requestBody": _body("ChatBody"), "responses": _CHAT}
    },
    "/api/chat/{turn}/events": {
        "get": {
            "summary": "Go on reading a turn, on any edge",
            "parameters": [_TURN, _HEADER | _NATIVE, _QUERY | _NATIVE],
            "responses": {"200": _answer("The events after that one", "text/event-stream"), "4XX": _gone(_PROBLEM), "5XX": _PROBLEM},
        }
    },
    "/api/chat/{turn}": {
        "delete": {
            "summary": "Stop a turn, or stop it and remove every trace of it",
            "parameters": [_TURN, _ERASE],
            "responses": {
                "200": _answer("It is erased: how many stored messages that were", "application/json"),
                "202": _answer("It is being stopped", "application/json"),
                "4XX": _gone(_PROBLEM),
                "5XX": _PROBLEM,
            },
        }
    },
    "/api/turns": {
        "get": {
            "summary": "The newest turns of the key's tenant that are kept; it needs a key",
            "parameters": [_LIMIT, _SINCE, *_FILTERS],
            "responses": {"200": _answer("turns, and whether there may be more", "application/json"), "4XX": _PROBLEM, "5XX": _PROBLEM},
        }
    },
    "/api/turns/{turn}": {
        "get": {
            "summary": "What happened in a turn, and when: as JSON, or as a picture or page by format or Accept",
            "parameters": [_TURN, _FORMAT],
            "responses": {
                "200": _answer("The timeline", "application/json", "image/svg+xml", "text/html"),
                "4XX": _PROBLEM,
                "5XX": _PROBLEM,
            },
        }
    },
    "/api/usage": {
        "get": {
            "summary": "Answers and tokens of the key's tenant, by day and expert; it needs a key",
            "parameters": [_query("since", _MOMENT | {"default": "7d"}), _query("until", _MOMENT)],
            "responses": {"200": _usage(), "4XX": _PROBLEM, "5XX": _PROBLEM},
        }
    },
    "/api/rag/documents": {
        "post": {
            "summary": "Bring documents: files of a form, one bare body with a name, or a text in JSON; each is taken in as a turn",
            "parameters": [_COLLECTION, *_SAID, _WAIT],
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {"schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}},
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                    **_json("DocumentBody")["content"],
                },
            },
            "responses": {
                "200": _answer("With wait: nothing new; or the one document's events", "application/json", "text/event-stream"),
                "201": _answer("With wait: what became of each document", "application/json"),
                "202": _answer("For each document its turn, and where to follow it", "application/json"),
                "4XX": _PROBLEM,
                "5XX": _PROBLEM,
            },
        },
        "get": {
            "summary": "The documents of a collection, by id",
            "parameters": [
                _COLLECTION,
                _query("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
                _query("after"),
            ],
            "responses": {"200": _answer("documents, and what to go on after", "application/json"), "4XX": _PROBLEM, "5XX": _PROBLEM},
        },
    },
    "/api/rag/documents/{document}": {
        "get": {
            "summary": "One document's facts",
            "parameters": [_DOCUMENT, _COLLECTION],
            "responses": {"200": _json("DocumentFacts") | {"description": "The document"}, "4XX": _PROBLEM, "5XX": _PROBLEM},
        },
        "delete": {
            "summary": "Remove a document from every store",
            "parameters": [_DOCUMENT, _COLLECTION],
            "responses": {"200": _answer("It is gone", "application/json"), "4XX": _PROBLEM, "5XX": _PROBLEM},
        },
    },
    "/api/rag/search": {
        "post": {
            "summary": "What has most to do with a query, the best first; more than five sources in TOON to who accepts it",
            "requestBody": _body("SearchBody"),
            "responses": {
                "200": _answer("The sources, the seconds, and whether a chat would use them", "application/json", "application/toon"),
                "4XX": _PROBLEM,
                "5XX": _PROBLEM,
            },
        }
    },
    "/v1/chat/completions": {
        "post": {
            "summary": "Ask, in OpenAI's dialect",
            "parameters": [_ONCE],
            "requestBody": _body("CompletionBody"),
            "responses": {"200": _answer("The completion", "text/event-stream", "application/json"), "4XX": _ERROR, "5XX": _ERROR},
        }
    },
    "/v1/chat/completions/{turn}/events": {
        "get": {
            "summary": "Go on reading a streamed completion, on any edge",
            "parameters": [_COMPLETION, _HEADER | _CHUNK, _QUERY | _CHUNK, _USAGE],
            "responses": {"200": _answer("The chunks after that one", "text/event-stream"), "4XX": _gone(_ERROR), "5XX": _ERROR},
        }
    },
    "/api/router/test": {
        "post": {
            "summary": "Who would answer, and why: nothing is asked",
            "requestBody": _body("RouteBody"),
            "responses": {
                "200": {
                    "description": "The decision",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Decision"}}},
                },
                "4XX": _PROBLEM,
                "5XX": _PROBLEM,
            },
        }
    },
    "/v1/models": {"get": {"summary": "The experts", "responses": {"200": _answer("A list", "application/json"), "4XX": _ERROR}}},
    "/health": {"get": {"summary": "This process answers", "responses": {"200": _answer("Yes", "application/json")}}},
    "/ready": {
        "get": {
            "summary": "A turn can be served",
            "responses": {"200": _answer("Yes", "application/json"), "503": _answer("What is missing", "application/json")},
        }
    },
    "/stats": {"get": {"summary": "What this edge has done", "responses": {"200": _answer("Figures", "application/json")}}},
    "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": _answer("Metrics", "text/plain")}}},
    "/openapi.json": {"get": {"summary": "This document", "responses": {"200": _answer("OpenAPI", "application/json")}}},
}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    taken = (ChatBody, CompletionBody, RouteBody, DocumentBody, SearchBody)
    given = (*OUTPUTS, Decision, DocumentFacts, UsageDay)
    models: list[Any] = [*((model, "validation") for model in taken), *((model, "serialization") for model in given)]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Capibara Flow", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": _PATHS,
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
