"""What the dialects share in asking: pure functions from our request to theirs."""

from collections.abc import Mapping
from typing import Any

from capibara_flow.errors import BadRequest
from capibara_flow.ports import Abilities
from topics.chat import ChatMessage, ChatRequest


def renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """*fields* under the dialect's *names*; a field without a name there is one the dialect does not know."""
    return {names[key]: value for key, value in fields.items() if key in names}


def openai_message(message: ChatMessage) -> dict[str, Any]:
    """*message* in OpenAI's form, without what is empty."""
    dumped = message.model_dump(mode="json", exclude_none=True)
    if not message.tool_calls:
        del dumped["tool_calls"]
    return dumped


def continues(request: ChatRequest) -> bool:
    """Whether the request ends with the beginning of an answer that is to be continued."""
    last = request.messages[-1]
    return last.role == "assistant" and not last.tool_calls


def json_schema(request: ChatRequest) -> dict[str, Any] | None:
    """The schema that the answer must follow (``{}``: any JSON), out of OpenAI's ``response_format``; none for text."""
    wanted = request.response_format or {}
    if wanted.get("type") == "json_object":
        return dict(wanted.get("schema") or {})
    if wanted.get("type") == "json_schema":
        return dict((wanted.get("json_schema") or {}).get("schema") or {})
    return None


def refuse_beyond(abilities: Abilities, request: ChatRequest, name: str) -> None:
    """Raise ``BadRequest`` for what the expert *name* cannot do, instead of dropping it silently."""
    if request.has_image and not abilities.images:
        raise BadRequest(f"{name} cannot see images")
    if request.tools and not abilities.tools:
        raise BadRequest(f"{name} cannot call tools")
