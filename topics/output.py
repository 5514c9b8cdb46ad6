"""What a client may see of a turn, in order. On the wire: one JSON object a line, its ``event`` first."""

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from topics.chat import Decision
from topics.knowledge import Source
from topics.message import Event, Part
from topics.plan import Plan


class Output(Event):
    """Base of the output events; ``event`` names it on the stream of the client."""

    pattern: ClassVar[str] = "cf.out.{turn}.data.{branch}"
    #: Whether nothing comes behind it, and whether it counts only as long as nobody has begun to answer.
    final: ClassVar[bool] = False
    opening: ClassVar[bool] = False
    event: str

    @property
    def branch(self) -> str:
        """Output that is said outside a fenced answer belongs to the turn's main branch."""
        return "main"

    def line(self) -> bytes:
        """This event as one line of JSON."""
        return self.model_dump_json(exclude_none=True).encode()


class Routed(Output):
    """Which expert answers, and what will be done for it."""

    opening: ClassVar[bool] = True
    event: Literal["routed"] = "routed"
    model_id: str
    route_name: str
    complexity: str
    confidence: float
    reasoning: str
    plan: tuple[str, ...] = ()

    @classmethod
    def of(cls, turn: str, decision: Decision, plan: Plan) -> "Routed":
        """The public face of a router's decision."""
        return cls(turn=turn, plan=tuple(step.stage for step in plan.steps), **decision.model_dump())


class SourceShown(Part):
    """A source as the client sees it; *offsets* are where its text starts and ends in the document, *parts* what its score is made of."""

    n: int
    title: str
    url: str
    date: str
    score: float
    parts: dict[str, float] = {}
    offsets: tuple[int, int]
    text: str
    document: str

    @classmethod
    def of(cls, source: Source) -> "SourceShown":
        """The public face of a source."""
        passage = source.passage
        date = datetime.fromtimestamp(passage.updated, UTC).date().isoformat() if passage.updated else ""
        title = " › ".join(dict.fromkeys((passage.title, *passage.headings)))
        where = {"offsets": (passage.start, passage.end), "document": passage.document}
        score = {"score": source.score, "parts": source.parts}
        return cls(n=source.n, title=title, url=passage.address, date=date, text=passage.text, **score, **where)


class SourcesFound(Output):
    """What the answer may rest on, numbered as it is to cite it; a *problem* says why there is less than there should be."""

    opening: ClassVar[bool] = True
    event: Literal["sources"] = "sources"
    sources: tuple[SourceShown, ...]
    problem: str | None = None


class Cited(Output):
    """Which sources the answer cites, and which numbers it cites that no source has."""

    event: Literal["citations"] = "citations"
    cited: tuple[int, ...]
    unknown: tuple[int, ...] = ()


class Ingested(Output):
    """What became of a document that was taken in: see ``DocumentIngested``."""

    event: Literal["ingested"] = "ingested"
    document: str
    how: str
    title: str
    passages: int


class Token(Output):
    """Some text of the answer, or of the reasoning before it; several may be joined into one."""

    event: Literal["token"] = "token"
    text: str = ""
    reasoning: str | None = None


class ToolCalled(Output):
    """A fragment of a tool call, as the expert streams it: arguments of one ``index`` add up."""

    event: Literal["tool"] = "tool"
    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Reset(Output):
    """Throw the text so far away: the answer starts anew."""

    event: Literal["reset"] = "reset"
    reason: str


class Continued(Output):
    """*expert* goes on with what another attempt began: from its very words (``prefill``), or by saying them again, unseen (``skip``)."""

    event: Literal["continued"] = "continued"
    how: Literal["prefill", "skip"]
    expert: str
    attempt: int


class Waiting(Output):
    """Nothing goes on for now at *stage*, for this *reason*, of the kind *title*; it is tried again."""

    event: Literal["waiting"] = "waiting"
    stage: str
    title: str = ""
    reason: str
    attempt: int

    @property
    def dedupe(self) -> str:
        """Told once for each attempt."""
        return f"{self.turn}:waiting:{self.stage}:{self.attempt}"


class Loading(Output):
    """*expert* is being loaded first: ready in about *eta_s* seconds, as far as is known."""

    event: Literal["loading"] = "loading"
    expert: str
    eta_s: float | None = None


class Queued(Output):
    """All of *expert*'s hands are busy: this turn is the *position*-th to be begun, in about *eta_s* seconds, as far as is known."""

    opening: ClassVar[bool] = True
    event: Literal["queued"] = "queued"
    expert: str
    position: int = Field(ge=1)
    eta_s: float | None = None

    @property
    def dedupe(self) -> str:
        """Told once for each expert and power of two that the place is below: 15, 7, 3, 1."""
        return f"{self.turn}:queued:{self.expert}:{self.position.bit_length()}"


class Usage(Output):
    """What the answer took, over all *attempts*.

    ``completion_tokens`` are those that the client got, to be billed; ``burnt_tokens`` all that engines are known to have made for it.
    Where an attempt died before its engine told a count, the pieces that it sent stand in.
    """

    event: Literal["usage"] = "usage"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    burnt_tokens: int = 0
    attempts: int = 1


class Done(Output):
    """The only end of a complete answer; a *cached* one was made for an earlier turn that asked the same."""

    final: ClassVar[bool] = True
    event: Literal["done"] = "done"
    finish_reason: str
    model_id: str
    cached: Literal[True] | None = None
    timings: dict[str, float] = {}


class Failed(Output):
    """The only other end: problem details (RFC 9457)."""

    final: ClassVar[bool] = True
    event: Literal["error"] = "error"
    type: str = "about:blank"
    title: str
    status: int
    detail: str
    retryable: bool = False


AnyOutput = Annotated[
    Routed | Queued | SourcesFound | Cited | Ingested | Token | ToolCalled | Reset | Continued | Waiting | Loading | Usage | Done | Failed,
    Field(discriminator="event"),
]
OUTPUTS: tuple[type[Output], ...] = (
    Routed,
    Queued,
    SourcesFound,
    Cited,
    Ingested,
    Token,
    ToolCalled,
    Reset,
    Continued,
    Waiting,
    Loading,
    Usage,
    Done,
    Failed,
)
_READER: TypeAdapter[Any] = TypeAdapter(AnyOutput)
_MARK = b'"event":"'
FINALS = frozenset(output.model_fields["event"].default for output in OUTPUTS if output.final)


def event_of(line: bytes) -> str:
    """The name of the event on *line*, without parsing it: the turn's id, which stands before it, has no quotes."""
    start = line.index(_MARK) + len(_MARK)
    return line[start : line.index(b'"', start)].decode()


def known(line: bytes) -> Output | None:
    """Read one line; none when it is not an output event of this version: a newer one may have others."""
    try:
        return parse(line)
    except ValidationError:
        return None


def parse(line: bytes) -> Output:
    """Read one line; raises ``pydantic.ValidationError`` on anything that is not an output event."""
    output: Output = _READER.validate_json(line)
    return output
