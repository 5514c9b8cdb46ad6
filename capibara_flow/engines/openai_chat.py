"""``/v1/chat/completions`` as OpenAI defined it, and as llama-server and vLLM extend it."""

import re
from typing import Any

import orjson

from capibara_flow.domain.sampling import chosen
from capibara_flow.engines.http import HttpChat, said_in
from capibara_flow.engines.reading import Reading
from capibara_flow.engines.requests import continues, openai_message, renamed
from capibara_flow.engines.sse import SseDecoder
from capibara_flow.ports import Abilities, Finish, Piece, Tally, Text, ToolFragment
from topics.chat import ChatRequest

_STANDARD = {name: name for name in ("temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty", "seed", "stop")}
_SAMPLING = {
    "openai": _STANDARD,
    "llama_server": {**_STANDARD, "top_k": "top_k", "repeat_penalty": "repeat_penalty"},
    "vllm": {**_STANDARD, "top_k": "top_k", "repeat_penalty": "repetition_penalty"},
}
#: Finish reasons by which an engine says that it did not finish.
_FAILURES = frozenset({"error", "abort"})


class OpenAIChat(HttpChat):
    """One expert behind ``/v1/chat/completions``; the address may or may not end in its version."""

    @property
    def abilities(self) -> Abilities:
        """Tools and images as configured; prefill where both of its flags are known to work."""
        return Abilities(
            tools=self.expert.tools,
            images="image" in self.expert.modalities,
            prefill=self._prefills,
            json_schema=True,
            max_tokens=self.expert.sampling.max_tokens,
        )

    @property
    def chat_url(self) -> str:
        """Where requests are posted."""
        return f"{self._versioned}/chat/completions"

    @property
    def health_url(self) -> str:
        """``/health``, or the list of models where no such thing is promised."""
        return f"{self._versioned}/models" if self.expert.dialect == "openai" else super().health_url

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The request in the expert's dialect; plain ``openai`` gets standard fields only."""
        body = {
            "model": self.expert.model or self.expert.name,
            "messages": [openai_message(message) for message in request.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **renamed(chosen(self.expert.sampling, request.sampling), _SAMPLING[self.expert.dialect]),
        }
        if request.tools:
            body["tools"] = request.tools
            if request.tool_choice is not None:
                body["tool_choice"] = request.tool_choice
        if request.response_format is not None:
            body["response_format"] = request.response_format
        if self._prefills and continues(request):
            # vLLM silently starts anew with only one of them.
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def reading(self) -> Reading:
        """How an answer is read."""
        return OpenAIReading()

    @property
    def _prefills(self) -> bool:
        return self.expert.scripted or self.expert.dialect in ("llama_server", "vllm")

    @property
    def _versioned(self) -> str:
        has_version = re.search(r"://[^/]+/(.*/)?v\d[^/]*(/|$)", self.base)
        return self.base if has_version else f"{self.base}/v1"


class OpenAIReading(Reading):
    """Reads ``chat.completion.chunk`` frames, whichever way the finish reason, the reasoning and errors come."""

    def __init__(self) -> None:
        super().__init__(SseDecoder())

    def read(self, frame: bytes, pieces: list[Piece]) -> None:
        """Understand one chunk, an error frame, or ``[DONE]``, which proves nothing."""
        if frame == b"[DONE]":
            self.over = True
            return
        chunk = orjson.loads(frame)
        if choices := chunk.get("choices"):
            choice = choices[0]
            if delta := choice.get("delta"):
                _read_delta(delta, pieces)
            if reason := choice.get("finish_reason"):
                self._finished(reason)
        if usage := chunk.get("usage"):
            self.tally = Tally(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        if not choices and (error := _error_in(chunk)):
            self.broken(f"reported: {said_in(error)}")

    def _finished(self, reason: str) -> None:
        if reason in _FAILURES:
            self.broken(f"gave up: its finish reason is {reason!r}")
        else:
            self.finish = Finish(reason)


def _read_delta(delta: dict[str, Any], pieces: list[Piece]) -> None:
    if (reasoning := delta.get("reasoning_content") or delta.get("reasoning")) and isinstance(reasoning, str):
        pieces.append(Text(reasoning=reasoning))
    if text := delta.get("content"):
        if not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}")
        pieces.append(Text(text))
    for position, call in enumerate(delta.get("tool_calls") or ()):
        function = call.get("function") or {}
        index = call.get("index")
        pieces.append(
            ToolFragment(
                index=position if index is None else index,
                id=call.get("id") or None,
                name=function.get("name") or None,
                arguments=function.get("arguments") or "",
            )
        )


def _error_in(chunk: dict[str, Any]) -> object:
    """OpenAI's and llama-server's ``error``, or vLLM's older object of the type ``error``."""
    return chunk.get("error") or (chunk if chunk.get("object") == "error" else None)
