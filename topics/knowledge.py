"""What a turn can be grounded in: documents, the passages that they are cut into, and what these mention. Pure."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

DEFAULT_COLLECTION = "default"
#: A part of a tenant's knowledge, as people name it.
Collection = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose knowledge, and which part of it: nothing is ever looked for outside one scope."""

    tenant: str
    collection: str = DEFAULT_COLLECTION


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a scope: *id* is derived from tenant, collection and *address*, *digest* from its content (both SHA-256, in hex).

    *address* is where it came from (a path, a URL, a name); *language* is an ISO 639-1 code, empty where it cannot be told.
    *updated* is when its content was last changed, as far as its source tells, else when it came. *edition* names what it is made of and
    how that was cut; it is empty where a release before there were editions took it in.
    """

    id: str
    scope: Scope
    title: str
    address: str
    digest: str
    language: str
    updated: datetime
    owner: str = ""
    passages: int = 0
    edition: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document that can be found and cited: *start* and *end* are offsets (characters) in the document's text."""

    id: str
    document: str
    number: int
    text: str
    start: int
    end: int
    headings: tuple[str, ...] = ()
    title: str = ""
    address: str = ""
    language: str = ""
    updated: float = 0.0


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, by id, with what its finder thinks of it: higher is better."""

    passage: str
    score: float


@dataclass(frozen=True, slots=True)
class Mention:
    """*passage* names the entity *entity* (its folded name), or is *about* it: the entity is what its document is called."""

    passage: str
    entity: str
    name: str
    about: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A passage as it grounds an answer: its number *n* in the answer's citations, and the parts of its *score* by name."""

    n: int
    passage: Passage
    score: float
    parts: dict[str, float] = field(default_factory=dict)
