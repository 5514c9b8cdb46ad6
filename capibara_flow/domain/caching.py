"""Answers that may be given again: to the same question, of the same tenant, to the same expert, drawn in the same way."""

import hashlib
import json

from pydantic import ValidationError

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.sampling import chosen
from capibara_flow.ports import Finish, Piece, Tally, Text, ToolFragment
from topics.chat import ChatMessage, ChatRequest
from topics.message import Part

#: Bytes that a kept answer may have; larger ones are rare, and not kept.
LARGEST = 256 * 1024
_USUAL_TEMPERATURE = 1.0  # of engines, where neither request nor expert names one
#: What of an expert decides on its answers: when that changes, what it said before counts no more.
_DECIDES = {"name", "dialect", "model", "weights", "template"}


class CachedAnswer(Part):
    """A whole answer: the reasoning before it, its text, why it ended, and what the engine counted when it was made."""

    reasoning: str = ""
    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def pieces(self) -> tuple[Piece, ...]:
        """The answer as an engine would say it."""
        said = [Text(reasoning=self.reasoning)] if self.reasoning else []
        tally = Tally(self.prompt_tokens, self.completion_tokens)
        return *said, *([Text(self.text)] if self.text else []), tally, Finish(self.finish_reason)

    def body(self) -> bytes | None:
        """The answer as it is kept; none when it is larger than ``LARGEST``."""
        body = json.dumps(self.model_dump()).encode()  # escapes what engines may say and pydantic would not write: lone surrogates
        return body if len(body) <= LARGEST else None

    @classmethod
    def of(cls, body: bytes) -> "CachedAnswer | None":
        """What *body* keeps; none when it is no answer of ours."""
        try:
            return cls.model_validate_json(body)
        except ValidationError:
            return None


class Recording:
    """Listens to the pieces of an engine that says an answer from its beginning."""

    def __init__(self) -> None:
        self._said: list[Text] = []
        self._pieces = 0
        self._length = 0
        self._calls = False
        self._tally: Tally | None = None
        self._reason: str | None = None

    def take(self, piece: Piece) -> None:
        """Hear *piece*."""
        match piece:
            case Text(text, reasoning):
                self._pieces += 1
                self._length += len(text) + len(reasoning)
                if self._length <= LARGEST:
                    self._said.append(piece)
            case ToolFragment():
                self._calls = True
            case Tally():
                self._tally = piece
            case Finish(reason):
                self._reason = reason

    @property
    def answer(self) -> CachedAnswer | None:
        """What may be given again: a whole answer in words that ended by itself, and is not too long; none otherwise."""
        if self._calls or self._reason != "stop" or self._length > LARGEST:
            return None
        return CachedAnswer(
            reasoning="".join(piece.reasoning for piece in self._said),
            text="".join(piece.text for piece in self._said),
            finish_reason=self._reason,
            prompt_tokens=self._tally.prompt_tokens if self._tally else 0,
            completion_tokens=self._tally.completion_tokens if self._tally else self._pieces,
        )


def cache_key(tenant: str, expert: Expert, request: ChatRequest, *, warmest: float, grounded: bool = False) -> str | None:
    """Under which key the answer of *expert* to *request* may be kept for *tenant*: a SHA-256 in hexadecimal.

    None when it may not: with tools or images, drawn at a temperature above *warmest*, or *grounded* in sources, which may change.
    What neither the request nor the expert says of the temperature counts as 1.
    """
    sampling = chosen(expert.sampling, request.sampling)
    if grounded or request.tools or sampling.get("temperature", _USUAL_TEMPERATURE) > warmest:
        return None
    if request.has_image or any(map(_of_tools, request.messages)):
        return None
    parts = [
        tenant,
        expert.model_dump(include=_DECIDES),
        sampling | {"stop": sorted(sampling.get("stop", ()))},
        [message.model_dump(exclude_none=True) for message in request.messages],
        request.response_format,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_tools(message: ChatMessage) -> bool:
    return message.role == "tool" or bool(message.tool_calls)
