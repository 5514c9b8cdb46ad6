"""llama-server's native ``/completion``: a bare prompt in, frames with ``stop`` out (llama.cpp, tools/server/README.md)."""

from typing import Any

import aiohttp
import orjson

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.sampling import chosen
from capibara_flow.engines.http import HttpChat, said_in
from capibara_flow.engines.reading import Reading
from capibara_flow.engines.requests import json_schema, renamed
from capibara_flow.engines.sse import SseDecoder
from capibara_flow.engines.templates import template
from capibara_flow.ports import Abilities, Finish, Piece, Tally, Text
from topics.chat import ChatRequest, Sampling

DEFAULTS = Sampling(temperature=0.7, top_p=0.9, repeat_penalty=1.2, max_tokens=200)
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "n_predict",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}


class LlamaCompletion(HttpChat):
    """One expert behind ``/completion``; we own its chat template. Raises ``SettingsError`` for an unknown template."""

    def __init__(self, expert: Expert, url: str, *, session: aiohttp.ClientSession | None = None) -> None:
        super().__init__(expert, url, session=session)
        self._template = template(expert.template)

    @property
    def abilities(self) -> Abilities:
        """A template can always be left open; tools and images need the chat dialect."""
        return Abilities(prefill=True, json_schema=True, max_tokens=self.expert.sampling.max_tokens or DEFAULTS.max_tokens)

    @property
    def chat_url(self) -> str:
        """Where requests are posted."""
        return self.base.removesuffix("/v1") + "/completion"

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The prompt by the expert's template, and sampling by the request, the expert, or ``DEFAULTS``."""
        fields = chosen(DEFAULTS, self.expert.sampling, request.sampling)
        fields["stop"] = [*self._template.stops, *fields.get("stop", ())]
        body = {"prompt": self._template.prompt(request.messages), "stream": True, **renamed(fields, _SAMPLING)}
        if self.expert.model:
            body["model"] = self.expert.model
        if (schema := json_schema(request)) is not None:
            body["json_schema"] = schema
        return body

    def reading(self) -> Reading:
        """How an answer is read."""
        return CompletionReading()


class CompletionReading(Reading):
    """Reads completion frames; the one with ``stop: true`` is the end, there is no ``[DONE]``."""

    def __init__(self) -> None:
        super().__init__(SseDecoder())

    def read(self, frame: bytes, pieces: list[Piece]) -> None:
        """Understand one frame."""
        if frame == b"[DONE]":
            self.over = True
            return
        chunk = orjson.loads(frame)
        if text := chunk.get("content"):
            pieces.append(Text(text))
        if chunk.get("stop"):
            self.tally = Tally(chunk.get("tokens_evaluated") or 0, chunk.get("tokens_predicted") or 0)
            self.finish = Finish("length" if _ran_out(chunk) else "stop")
            self.over = True
        elif error := chunk.get("error"):
            self.broken(f"reported: {said_in(error)}")


def _ran_out(chunk: dict[str, Any]) -> bool:
    """Whether the limit ended it: ``stop_type``, or ``stopped_limit`` of releases before December 2024."""
    return chunk.get("stop_type") == "limit" or bool(chunk.get("stopped_limit"))
