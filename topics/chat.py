"""Asking: a chat request, and the commands and events that bring it to an expert."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from topics.message import Command, Event, Part, Request, Signal
from topics.plan import Plan

#: A stage, expert or branch as it stands in a subject: no dots, no wildcards, no blanks.
Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]

#: What engines take for whole numbers: a count or a limit in 32 bits, a seed in 64, all with a sign.
Count = Annotated[int, Field(le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class ImageUrl(Part):
    """An image by address or as a ``data:`` URL, in OpenAI's form."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Part):
    """A piece of text inside a message of several parts."""

    type: Literal["text"] = "text"
    text: str


class ImagePart(Part):
    """An image inside a message of several parts."""

    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCall(Part):
    """What an expert wants called: a name and its arguments as JSON text, which may be broken."""

    name: str
    arguments: str


class ToolCall(Part):
    """A finished tool call of an earlier assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Part):
    """One message of a conversation, in OpenAI's roles."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | tuple[ContentPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The words of the message, its images left out."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or () if isinstance(part, TextPart))

    @property
    def has_image(self) -> bool:
        """Whether only an expert that sees can answer."""
        return any(isinstance(part, ImagePart) for part in self.content or () if not isinstance(part, str))


class Sampling(Part):
    """How to draw tokens; whatever is left out is the expert's default."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Count | None = Field(default=None, ge=-1)
    max_tokens: Count | None = Field(default=None, ge=1)
    repeat_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Seed | None = None
    stop: tuple[str, ...] = Field(default=(), max_length=16)


class ChatRequest(Part):
    """What a client asked, free of the dialect it asked in."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    model: str | None = None
    sampling: Sampling = Sampling()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def question(self) -> str:
        """The words of the last user message: what routing looks at."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def has_image(self) -> bool:
        """Whether any message carries an image."""
        return any(message.has_image for message in self.messages)


#: How much a question asks for, from the least.
Complexity = Literal["simple", "moderate", "complex", "very_complex"]


class Decision(Part):
    """Which expert answers, and why."""

    model_id: str
    route_name: str
    complexity: Complexity
    confidence: float = Field(ge=0, le=1)
    reasoning: str


class RouteTurn(Command):
    """Decide what this turn needs and send it on its way."""

    pattern: ClassVar[str] = "cf.work.{turn}.router"
    request: ChatRequest


class CallExpert(Command):
    """Let *expert* answer into *branch*; should it be out of reach, the next of the *alternatives* (experts' names).

    *passed* counts how often the call was passed on so.
    """

    pattern: ClassVar[str] = "cf.work.{turn}.call.{expert}.{bucket}"
    expert: Token
    bucket: int = Field(ge=0, lt=64)
    branch: Token = "main"
    request: ChatRequest
    alternatives: tuple[str, ...] = Field(default=(), max_length=16)
    passed: int = Field(default=0, ge=0)
    plan: Plan = Plan()

    @property
    def dedupe(self) -> str:
        """One call for each branch of a turn, and one each time that it is passed on."""
        return f"{self.turn}:call:{self.branch}:{self.passed}"


#: Why a turn is stopped whose deadline has passed: it ends with an error.
EXPIRED = "expired"


class CancelTurn(Signal):
    """Stop this turn wherever it is."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.cancel"
    reason: str = "asked"


class EraseTurn(Request):
    """Stop this turn and remove every trace of it; the reply is an ``Erased``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.erase"


class PreviewRoute(Request):
    """Tell which expert would answer *request*, and why, but do nothing; the reply is a ``Decision``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.route"
    request: ChatRequest


class Erased(Part):
    """How many stored messages of a turn are gone."""

    messages: int


class TurnRouted(Event):
    """What the router decided, and the plan it made."""

    pattern: ClassVar[str] = "cf.log.{turn}.router"
    decision: Decision
    plan: Plan
    started: float
    ended: float


class ExpertCalled(Event):
    """How a call of an expert ended."""

    pattern: ClassVar[str] = "cf.log.{turn}.caller"
    expert: str
    branch: str
    attempt: int
    outcome: str
    continued: Literal["prefill", "skip", "reset"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    burnt_tokens: int = 0
    cached: bool = False
    started: float
    first_token: float | None = None
    ended: float

    @property
    def dedupe(self) -> str:
        """One fact for each attempt."""
        return f"{self.turn}:called:{self.branch}:{self.attempt}"


class TurnFailed(Event):
    """A stage gave a turn up; the command it could not do is kept for inspection."""

    pattern: ClassVar[str] = "cf.dead.{turn}.{stage}"
    stage: Token
    title: str
    detail: str
    body: str
