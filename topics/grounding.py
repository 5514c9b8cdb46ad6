"""Grounding: the commands and events that bring documents in, and sources to an answer.

Taking a document in is a turn as well: it has an id, a deadline, output with an end, and is erased like any other.
"""

from typing import Any, ClassVar

from pydantic import Field

from topics.chat import CallExpert, Token
from topics.knowledge import DEFAULT_COLLECTION, Collection, Source
from topics.message import Command, Event, Part, Refusable, Request, Share


class RetrieveSources(Command):
    """Find what *call* can be grounded in, then let the expert be called.

    *parts* are the workers that do their part of this step at the same time; whoever finishes last says *call*, with all that they found.
    Until *until* (seconds since the epoch) it waits for the others.
    """

    pattern: ClassVar[str] = "cf.work.{turn}.retriever"
    collection: Collection = DEFAULT_COLLECTION
    call: CallExpert
    step: int = Field(default=0, ge=0)
    parts: tuple[Token, ...] = ("retriever",)
    until: float


class PartDone(Share):
    """What one worker *gives* to the call that follows a step that several do at the same time: fields of ``CallExpert`` by name.

    A *problem* says why it gives less than it should.
    """

    pattern: ClassVar[str] = "cf.join.{turn}.{step}.{part}"
    step: int = Field(ge=0)
    part: Token
    gives: dict[str, Any] = {}
    problem: str = ""

    @property
    def dedupe(self) -> str:
        """One word for each part of a step."""
        return f"{self.turn}:join:{self.step}:{self.part}"


class SourcesRetrieved(Event):
    """What the retriever found, by passages' ids, and how long it took."""

    pattern: ClassVar[str] = "cf.log.{turn}.retriever"
    collection: str
    sources: tuple[str, ...]
    problem: str = ""
    started: float
    ended: float


class IngestDocument(Command):
    """Take a document in, whose *size* bytes wait in *pieces* under ``cf.doc.{turn}.*``."""

    pattern: ClassVar[str] = "cf.work.{turn}.ingester"
    collection: Collection = DEFAULT_COLLECTION
    name: str = Field(max_length=1024)
    address: str = Field(default="", max_length=4096)
    title: str = Field(default="", max_length=1024)
    media_type: str = Field(default="", max_length=255)
    size: int = Field(ge=0)
    pieces: int = Field(ge=0)


class DocumentIngested(Event):
    """What became of a document: ``created``, ``replaced``, ``unchanged``, or ``same`` as another one that is there already."""

    pattern: ClassVar[str] = "cf.log.{turn}.ingester"
    document: str
    how: str
    passages: int
    started: float
    ended: float


class SearchKnowledge(Request):
    """Find sources for *query*; the reply is ``Found``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.search"
    tenant: str
    collection: Collection = DEFAULT_COLLECTION
    query: str = Field(min_length=1, max_length=20_000)
    limit: int = Field(default=10, ge=1, le=100)


class Found(Refusable):
    """The sources that were found, the best first, and how long that took (seconds); whether a chat would rest on them (*related*)."""

    sources: tuple[Source, ...] = ()
    seconds: float = 0.0
    related: bool = True


class ListDocuments(Request):
    """Tell which documents are there, by id, behind *after*; the reply is ``Listing``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.documents"
    tenant: str
    collection: Collection = DEFAULT_COLLECTION
    limit: int = Field(default=100, ge=1, le=1000)
    after: str = ""
    #: Only this one.
    document: str = ""


class DocumentFacts(Part):
    """A document as it is listed; *updated* is in seconds since the epoch."""

    id: str
    title: str
    address: str
    language: str
    digest: str
    updated: float
    passages: int


class Listing(Refusable):
    """Documents, by id."""

    documents: tuple[DocumentFacts, ...] = ()


class RemoveDocument(Request):
    """Remove a document from every store; the reply is ``Removed``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.remove"
    tenant: str
    collection: Collection = DEFAULT_COLLECTION
    document: str


class Removed(Refusable):
    """Whether there was such a document."""

    removed: bool = False


class CheckStores(Request):
    """Tell where the stores do not agree, of all tenants, and mend it with *repair*; the reply is ``Checked``. Operators ask for it."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.check"
    repair: bool = False


class Disagreement(Part):
    """A document of which the stores do not agree, *why*, and the *repair* that mends it, or did: ``remove``, ``relink`` or ``trim``."""

    tenant: str
    collection: str
    document: str
    address: str
    why: str
    repair: str


class Checked(Refusable):
    """Where the stores did not agree, and how many *more* there are than one reply takes."""

    findings: tuple[Disagreement, ...] = ()
    more: int = 0
