"""Ollama's native ``/api/chat``: lines of JSON, options under their own names (ollama/docs/api.md)."""

import secrets
from typing import Any, ClassVar

import orjson

from capibara_flow.domain.sampling import chosen
from capibara_flow.engines.http import HttpChat, said_in
from capibara_flow.engines.reading import Reading
from capibara_flow.engines.requests import json_schema, renamed
from capibara_flow.engines.sse import LineDecoder
from capibara_flow.errors import BadRequest
from capibara_flow.ports import Abilities, Finish, Piece, Tally, Text, ToolFragment
from topics.chat import ChatMessage, ChatRequest, ImagePart

_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "num_predict",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}


class OllamaChat(HttpChat):
    """One model of an Ollama server; the address may or may not end in ``/api``."""

    health_path: ClassVar[str] = "/api/version"

    @property
    def abilities(self) -> Abilities:
        """As configured; whether a prefill is continued depends on each model's template, so it is not promised."""
        return Abilities(
            tools=self.expert.tools,
            images="image" in self.expert.modalities,
            json_schema=True,
            max_tokens=self.expert.sampling.max_tokens,
        )

    @property
    def chat_url(self) -> str:
        """Where requests are posted."""
        return f"{self._root}/api/chat"

    @property
    def health_url(self) -> str:
        """What answers 200 when the server is there."""
        return self._root + self.health_path

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The request in Ollama's form; raises ``BadRequest`` for a forced tool call or an image that is not inline."""
        body: dict[str, Any] = {
            "model": self.expert.model or self.expert.name,
            "messages": _messages(request),
            "stream": True,
            "options": renamed(chosen(self.expert.sampling, request.sampling), _OPTIONS),
        }
        if request.tools and request.tool_choice != "none":
            if request.tool_choice not in (None, "auto"):
                raise BadRequest("Ollama cannot be made to call a tool: tool_choice may be auto or none")
            body["tools"] = request.tools
        if (schema := json_schema(request)) is not None:
            body["format"] = schema or "json"
        return body

    def reading(self) -> Reading:
        """How an answer is read."""
        return OllamaReading()

    @property
    def _root(self) -> str:
        return self.base.removesuffix("/v1").removesuffix("/api")


class OllamaReading(Reading):
    """Reads Ollama's lines; the one with ``done: true`` is the end, whole tool calls become single fragments."""

    def __init__(self) -> None:
        super().__init__(LineDecoder())
        self._calls = 0

    def read(self, frame: bytes, pieces: list[Piece]) -> None:
        """Understand one line."""
        line = orjson.loads(frame)
        if error := line.get("error"):
            self.broken(f"reported: {said_in(error)}")
            return
        message = line.get("message") or {}
        if thinking := message.get("thinking"):
            pieces.append(Text(reasoning=thinking))
        if text := message.get("content"):
            pieces.append(Text(text))
        for call in message.get("tool_calls") or ():
            pieces.append(self._fragment(call))
        if line.get("done"):
            self.tally = Tally(line.get("prompt_eval_count") or 0, line.get("eval_count") or 0)
            self.finish = Finish("tool_calls" if self._calls else line.get("done_reason") or "stop")
            self.over = True

    def _fragment(self, call: dict[str, Any]) -> ToolFragment:
        function = call["function"]
        index, self._calls = self._calls, self._calls + 1
        arguments = orjson.dumps(function.get("arguments") or {}).decode()
        return ToolFragment(index, call.get("id") or f"call_{secrets.token_hex(8)}", function["name"], arguments)


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    names = {call.id: call.function.name for message in request.messages for call in message.tool_calls}
    return [_message(message, names) for message in request.messages]


def _message(message: ChatMessage, tool_names: dict[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.text}
    if images := [_base64(part) for part in message.content or () if isinstance(part, ImagePart)]:
        said["images"] = images
    if message.tool_calls:
        said["tool_calls"] = [
            {"function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}} for call in message.tool_calls
        ]
    if message.role == "tool" and (name := message.name or tool_names.get(message.tool_call_id or "")):
        said["tool_name"] = name
    return said


def _base64(image: ImagePart) -> str:
    head, comma, data = image.image_url.url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise BadRequest("Ollama takes images only inline, as data: URLs in base64")
    return data


def _arguments(text: str) -> dict[str, Any]:
    """Arguments as the object that Ollama wants; what a model once wrote that is no JSON object is shown to it as it is."""
    try:
        parsed = orjson.loads(text or "{}")
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"unreadable": text}
