"""The sockets that engines and the broker plug into."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from topics.chat import ChatRequest, Decision, RouteTurn
from topics.grounding import IngestDocument
from topics.knowledge import Document, Hit, Mention, Passage, Scope
from topics.message import Part, Request
from topics.output import Output
from topics.streams import Consumer

# --- engines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """Some text of an answer (or of the reasoning before it)."""

    text: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class ToolFragment:
    """A piece of a tool call; the arguments of one *index* add up."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Tally:
    """Tokens that the engine counted."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The engine says that the answer is complete, and why: ``stop``, ``length``, ``tool_calls``..."""

    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """The engine is loading the expert: about *eta_s* seconds more, none when nothing is known of it."""

    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """What follows was said before, to the same question: no engine made it anew."""


Piece = Text | ToolFragment | Tally | Finish | Load | Recalled


@dataclass(frozen=True)
class Abilities:
    """What an engine can do beyond plain chat, and how long its answers are when a request does not say (tokens, none: no limit)."""

    tools: bool = False
    images: bool = False
    prefill: bool = False
    json_schema: bool = False
    max_tokens: int | None = None


class ChatEngine(Protocol):
    """One served expert.

    ``stream`` yields pieces; a stream that ends without ``Finish`` is an error that the engine itself raises
    (``EngineBroke``). Other errors: ``EngineUnreachable``, ``EngineBusy``, ``EngineRefusesUs``, ``BadRequest``. Closing the iterator
    stops the engine's work at once.
    """

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """Answer *request*, piece by piece."""
        ...

    async def health(self) -> None:
        """Return when the engine can answer; raise ``EngineUnreachable`` or ``EngineBusy`` otherwise."""
        ...

    async def aclose(self) -> None:
        """Let its connections go."""
        ...


# --- embeddings ----------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Rows of unit length, one a text: (n, dimension), float32.
Vectors: TypeAlias = "NDArray[np.float32]"


class Embedder(Protocol):
    """Texts become vectors whose dot product tells how near they are in meaning."""

    @property
    def model(self) -> str:
        """Which space the vectors lie in: those of different models cannot be compared."""
        ...

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        ...

    async def embed(self, texts: Sequence[str], kind: Literal["query", "passage"] = "query") -> Vectors:
        """Embed *texts*, away from the event loop; some models tell a question from what answers it by *kind*."""
        ...

    async def aclose(self) -> None:
        """Let its memory and threads go."""
        ...


# --- knowledge -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """How a scope's *passages* spread over terms: *containing* counts those that have a term; terms that none has are left out."""

    passages: int = 0
    containing: Mapping[int, int] = field(default_factory=dict)


class PassageStore(Protocol):
    """Passages with their vectors: dense ones of one model, and sparse ones of weighted terms.

    All of it raises ``StoreUnavailable`` while the store cannot be reached.
    """

    async def prepare(self, model: str, dimension: int) -> None:
        """Have what is needed for vectors of *model*; raises ``EmbedderMismatch`` when those of another one are kept."""
        ...

    async def put(self, scope: Scope, passages: Sequence[Passage], dense: "Vectors", sparse: Sequence[Mapping[int, float]]) -> None:
        """Keep *passages*, each with its row of *dense* and its *sparse* weights by term; the same id again replaces what was there."""
        ...

    async def delete(self, scope: Scope, document: str, keep: Collection[str] = ()) -> None:
        """Keep no passage of *document* any more but those with the ids *keep*; it need not exist."""
        ...

    async def nearest(self, scope: Scope, vector: "Vectors", limit: int) -> list[Hit]:
        """The passages most alike *vector* (one row), by cosine, the best first."""
        ...

    async def matching(self, scope: Scope, terms: Mapping[int, float], limit: int) -> list[Hit]:
        """The passages with the greatest product with the sparse *terms*, the best first."""
        ...

    async def spread(self, scope: Scope, terms: Sequence[int]) -> Spread:
        """How many passages there are, and how many have each of *terms*; what others wrote a moment ago may not be in it yet."""
        ...

    async def fetch(self, scope: Scope, ids: Sequence[str]) -> dict[str, Passage]:
        """The passages with these *ids*, as far as they are there."""
        ...

    async def documents(self, scope: Scope) -> dict[str, int]:
        """How many passages each document has."""
        ...

    async def aclose(self) -> None:
        """Let its connections go."""
        ...


class GraphStore(Protocol):
    """Which passages mention which entities. Raises ``StoreUnavailable`` while the store cannot be reached."""

    async def put(self, scope: Scope, document: str, mentions: Sequence[Mention]) -> None:
        """Keep *mentions* as all that the passages of *document* mention, in place of what was kept of it."""
        ...

    async def delete(self, scope: Scope, document: str) -> None:
        """Keep nothing of *document*; entities that nobody mentions go as well."""
        ...

    async def degrees(self, scope: Scope, entities: Sequence[str]) -> dict[str, int]:
        """How many passages mention each of *entities*; those that nobody mentions are left out."""
        ...

    async def mentioning(self, scope: Scope, entities: Sequence[str], limit: int) -> list[Mention]:
        """Who mentions *entities*: at most *limit* mentions of each, those that are about it first."""
        ...

    async def mentioned(self, scope: Scope, passages: Sequence[str]) -> list[Mention]:
        """What *passages* mention."""
        ...

    async def documents(self, scope: Scope) -> dict[str, int]:
        """How many passages of each document mention something."""
        ...

    async def aclose(self) -> None:
        """Let its connections go."""
        ...


@dataclass(frozen=True, slots=True)
class Edition:
    """Which edition of a document is ready (see ``Document.edition``), and the scope's revision that made it so."""

    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How things stand at one moment: the scope's *revision*, a number that grows, and which *editions* are ready, by document."""

    revision: int = 0
    editions: Mapping[str, Edition] = field(default_factory=dict)


class Documents(Protocol):
    """The list of documents: what is in it and ready can be found. Raises ``StoreUnavailable`` while the store cannot be reached.

    A document that is changed is in it twice for a while: the one that is ready, and another edition that is not, or not any more.
    """

    async def begin(self, document: Document) -> None:
        """Note that *document* is being taken in, in place of whatever of it is unfinished; the one that is ready stays ready."""
        ...

    async def ready(self, document: Document) -> None:
        """*document*, with its number of passages, is in all stores: from now on it is the one that is ready.

        The edition that was ready before is unfinished now, until ``settled``.
        """
        ...

    async def settled(self, scope: Scope, id: str) -> None:
        """No store has anything of a document but the edition that is ready."""
        ...

    async def left(self, scope: Scope, id: str) -> list[Document]:
        """The editions of a document that stores may have something of, and that are not ready."""
        ...

    async def standing(self, scope: Scope, ids: Sequence[str]) -> Standing:
        """Which editions of the documents *ids* are ready, as far as any is, all at the same moment."""
        ...

    async def leaving(self, scope: Scope, id: str) -> Document | None:
        """Note that a document is being removed: it is ready no more; it, if it is there."""
        ...

    async def gone(self, scope: Scope, id: str) -> None:
        """A document is in no store any more, in no edition."""
        ...

    async def find(self, scope: Scope, id: str) -> Document | None:
        """A document that is ready."""
        ...

    async def same(self, scope: Scope, digest: str) -> Document | None:
        """A document that is ready and has the content with this *digest*."""
        ...

    async def listed(self, scope: Scope, limit: int, after: str = "") -> list[Document]:
        """Documents that are ready, by id, at most *limit* behind *after*."""
        ...

    async def unfinished(self) -> list[Document]:
        """What was begun, was replaced or is leaving, and did not come to an end."""
        ...

    async def scopes(self) -> list[Scope]:
        """Every scope that has a document."""
        ...

    async def aclose(self) -> None:
        """Let its connections go."""
        ...


# --- usage ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens that one *branch* of a turn took of *expert*, for *tenant*, at *when* (with its time zone)."""

    tenant: str
    expert: str
    prompt_tokens: int
    completion_tokens: int
    when: datetime
    turn: str
    branch: str = "main"


@dataclass(frozen=True, slots=True)
class SpentDay:
    """What *expert* did for *tenant* on *day* (UTC): *answers* counts branches."""

    day: date
    tenant: str
    expert: str
    answers: int
    prompt_tokens: int
    completion_tokens: int


class UsageLog(Protocol):
    """Usage as time series. Raises ``StoreUnavailable`` while the store cannot be reached."""

    async def record(self, *spent: Spent) -> None:
        """Keep *spent*; what was kept of the same branch at the same time is not kept twice."""
        ...

    async def by_day(self, since: datetime, until: datetime, tenant: str | None = None) -> list[SpentDay]:
        """The days from *since* to before *until*, of *tenant* or of all, by day, tenant and expert."""
        ...

    async def aclose(self) -> None:
        """Let its connections go."""
        ...


# --- the durable output of a turn ----------------------------------------------------------------------------


class Answer(Protocol):
    """A branch of a turn that this process alone may write to, until somebody else takes it over."""

    @property
    def said(self) -> Sequence[Output]:
        """What an owner before us wrote, in order."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked the turn to stop."""
        ...

    async def write(self, *outputs: Output) -> None:
        """Queue *outputs*, which leave together; raises ``LeaseLost`` as soon as anybody else owns the branch, and ``TooLarge``."""
        ...

    async def finish(self, *outputs: Output) -> None:
        """Write the last *outputs* of this owner, and wait until all is stored."""
        ...

    def until_cancelled(self) -> AbstractAsyncContextManager[None]:
        """Run a block; when somebody asks the turn to stop, the block is left at once and silently."""
        ...


class Answers(Protocol):
    """Where answers are written."""

    def open(self, turn: str, branch: str) -> AbstractAsyncContextManager[Answer]:
        """Take the branch over; raises ``LeaseLost`` when a race for it is lost."""
        ...

    async def erased(self, turn: str) -> bool:
        """Whether *turn* was erased, so that nobody may say or keep anything of it; raises ``BrokerUnavailable``."""
        ...

    async def stopping(self, turn: str) -> bool:
        """Whether somebody asked *turn* to stop; raises ``BrokerUnavailable``."""
        ...

    async def begun(self, turn: str, branch: str) -> int:
        """How many attempts at *branch* were begun, as far as they have come to write; raises ``BrokerUnavailable``."""
        ...

    async def ended(self, turn: str, branch: str) -> bool:
        """Whether the last that was said there is final; raises ``BrokerUnavailable``."""
        ...


# --- the door's view of turns --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Output events of one stored message, as lines; *sequence* is the id to resume after."""

    sequence: int
    lines: tuple[bytes, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored message: where it is kept, *when* it was stored (seconds since the epoch), and all of it."""

    stream: str
    sequence: int
    when: float
    subject: str
    headers: Mapping[str, str]
    data: bytes

    @property
    def turn(self) -> str:
        """Whose message it is."""
        return self.subject.split(".")[2]


@dataclass(frozen=True)
class Identity:
    """Who asks: a *principal* that acts for a *tenant*."""

    principal: str
    tenant: str


#: Takes a batch at once, without waiting; false: not now.
Take = Callable[[Batch], bool]


class Feed(Protocol):
    """A turn's output: each batch once and in order, to the final one; waits for more. Closing it early lets all go."""

    def __aiter__(self) -> AsyncIterator[Sequence[Batch]]: ...

    def tap(self, take: Take) -> None:
        """While the reader waits, *take* may get batches as they arrive, instead of waking the reader with them."""
        ...

    async def aclose(self) -> None:
        """Read no more."""
        ...


Reply = TypeVar("Reply", bound=Part)


class Turns(Protocol):
    """Opening, following and stopping turns."""

    def rely_on(self, consumers: Sequence[Consumer]) -> None:
        """A turn can be served while somebody takes work of each of these *consumers*."""
        ...

    async def open(
        self, command: RouteTurn | IngestDocument, identity: Identity, deadline: float, *, attended: bool = False, recalled: bool = False
    ) -> Feed:
        """Publish *command*, then follow its output; raises ``QueueFull`` or ``BrokerUnavailable`` if nothing was accepted.

        An *attended* turn is stopped when nobody has read it for a while; one that may be *recalled* later ends at its deadline even
        if nobody is there then. The same command again is done once.
        """
        ...

    async def follow(self, turn: str, after: int = 0) -> Feed:
        """The output after sequence *after*; who has all there is gets the last of it again, and so learns whether that was the end.

        Raises ``TurnGone`` when some of it is no longer kept. Who follows an attended turn attends it.
        """
        ...

    async def claim(self, key: str, digest: str, turn: str, deadline: float) -> tuple[str, float]:
        """The turn that *key* (a hash) stands for, and its deadline: *turn*, unless it stood for one with the same *digest* of the request.

        A turn whose deadline has passed before anything came of it stands aside. Raises ``KeyReused`` when the key stood for another
        digest, and ``BrokerUnavailable``.
        """
        ...

    async def exists(self, turn: str) -> bool:
        """Whether anything is known of *turn*."""
        ...

    async def known(self, turn: str) -> bool:
        """Whether output of *turn* is stored, or somebody may still make some; raises ``BrokerUnavailable``."""
        ...

    async def cancel(self, turn: str, reason: str) -> None:
        """Stop *turn* wherever it is."""
        ...

    async def erase(self, turn: str) -> int:
        """Stop *turn* and remove every trace of it: how many messages these were. Raises ``BrokerUnavailable`` if nobody can do it now."""
        ...

    async def preview(self, turn: str, request: ChatRequest) -> Decision:
        """Who would answer *request*, and why; *turn* is an id of its own. Raises ``BrokerUnavailable``."""
        ...

    async def deposit(self, turn: str, data: AsyncIterable[bytes], most: int) -> tuple[int, int]:
        """Keep a document's *data* for *turn*, which is opened next: its size in bytes and in pieces.

        Raises ``TooLarge`` above *most* bytes, ``QueueFull`` and ``BrokerUnavailable``, and whatever *data* raises.
        """
        ...

    async def ask(self, request: Request, reply: type[Reply], *, seconds: float, nobody: str) -> Reply:
        """The *reply* to *request*.

        Raises ``BrokerUnavailable`` when none comes in time, with the words *nobody* if nobody is there, and ``Refused``.
        """
        ...

    async def reports(self) -> list[dict[str, Any]]:
        """What each worker's process told of itself last: ``{worker, process, since, at, facts}``; none while the broker is away."""
        ...

    async def ready(self) -> dict[str, str]:
        """What is not ready yet, by name, and why; empty when a turn can be served."""
        ...

    async def record(self, turn: str) -> Sequence[Entry]:
        """All that is kept of *turn*, in the order in which it was stored; raises ``TurnUnknown`` and ``BrokerUnavailable``."""
        ...

    def newest(self, *, since: float = 0.0) -> AsyncIterator[Entry]:
        """What each turn that is kept began with, the newest first, down to *since* (seconds since the epoch); of all tenants.

        Raises ``BrokerUnavailable``.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Counters for ``/stats``."""
        ...
