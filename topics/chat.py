"""Asking: a chat request, and the commands and events that bring it to an expert."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from topics.knowledge import DEFAULT_COLLECTION, Collection, Source
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
    #: Whether the answer is to rest on documents, of this collection; none: wherever there are some.
    grounded: bool | None = None
    collection: Collection = DEFAULT_COLLECTION

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


#: How many buckets tenants wait in: 0 is for who asks without a name.
BUCKETS = 64
Bucket = Annotated[int, Field(ge=0, lt=BUCKETS)]

#: Which of a tenant's own turns go first; among tenants it decides nothing.
Priority = Literal["low", "normal", "high"]
#: From the first to the last.
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")


class RouteTurn(Command):
    """Decide what this turn needs and send it on its way.

    Its tenant waits in *bucket*, if the door knows one that he shares with nobody; else a hash decides.
    """

    pattern: ClassVar[str] = "cf.work.{turn}.router"
    request: ChatRequest
    bucket: Bucket | None = None
    priority: Priority = "normal"


class CallExpert(Command):
    """Let *expert* answer into *branch*; should it be out of reach, the next of the *alternatives* (experts' names).

    *passed* counts how often the call was passed on so. What it says is to rest on the *sources*,
    which the *context* puts before the question.
    """

    pattern: ClassVar[str] = "cf.work.{turn}.call.{expert}.{lane}"
    expert: Token
    bucket: Bucket
    priority: Priority = "normal"
    branch: Token = "main"
    request: ChatRequest
    alternatives: tuple[str, ...] = Field(default=(), max_length=16)
    passed: int = Field(default=0, ge=0)
    sources: tuple[Source, ...] = Field(default=(), max_length=100)
    context: str = ""
    plan: Plan = Plan()

    @property
    def lane(self) -> str:
        """The line that it waits in, as it stands in a subject: its tenant's bucket, and the priority unless that is the normal one."""
        return lane_of(self.bucket, self.priority)

    @property
    def dedupe(self) -> str:
        """One call for each branch of a turn, and one each time that it is passed on."""
        return f"{self.turn}:call:{self.branch}:{self.passed}"


def lane_of(bucket: int, priority: Priority = "normal") -> str:
    """The lane of *bucket* for turns of this *priority*."""
    return str(bucket) if priority == "normal" else f"{bucket}-{priority}"


def bucket_of(lane: str) -> tuple[int, Priority]:
    """The bucket and the priority that *lane* is for; raises ``ValueError`` when it is none."""
    number, _, word = lane.partition("-")
    for priority in PRIORITIES:
        if lane_of(int(number), priority) == lane:
            return int(number), priority
    raise ValueError(f"{lane} is no lane: {word} is no priority")


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
    """What the router decided, and the plan it made; by which *version* of the software, and by which *configuration* (a digest)."""

    pattern: ClassVar[str] = "cf.log.{turn}.router"
    decision: Decision
    plan: Plan
    started: float
    ended: float
    version: str = ""
    configuration: str = ""


#: How the outcome of a call begins that came to nothing, so that another expert was asked.
PASSED_ON = "passed on: "


class ExpertCalled(Event):
    """How a call of an expert ended.

    Tokens are those of the whole answer so far, over all attempts: see ``topics.output.Usage``.
    """

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
    def final(self) -> bool:
        """Whether the answer ended with this call: nobody else was asked to go on with it."""
        return not self.outcome.startswith(PASSED_ON)

    @property
    def dedupe(self) -> str:
        """One fact for each attempt; two of different experts may bear the same number, when nothing was seen of the first."""
        return f"{self.turn}:called:{self.branch}:{self.attempt}:{self.expert}:{self.started:.6f}"


class TurnFailed(Event):
    """A stage gave a turn up; the command it could not do is kept for inspection."""

    pattern: ClassVar[str] = "cf.dead.{turn}.{stage}"
    stage: Token
    title: str
    detail: str
    body: str
