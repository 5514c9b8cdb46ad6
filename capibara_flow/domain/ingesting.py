"""Taking documents in: what they are called in the stores, what has to be done with each, and how the stores are made to agree. Pure.

A document comes in as an edition, whose passages lie beside those of the one before until it is ready, in one stroke; whoever searches
goes by what is ready, and sees the one or the other. The order of deeds makes every crash harmless. In: begun, passages, graph, ready,
then the passages and the graph of the edition before, settled. Out: leaving, passages, graph, gone. Whatever may have left something in a
store is listed as unfinished, so an edition is either ready and whole, or known to be neither.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from capibara_flow.domain.chunking import Chunk
from capibara_flow.domain.entities import names_of_title
from topics.knowledge import Document, Passage, Scope

How = Literal["created", "replaced", "unchanged", "same"]
Repair = Literal["remove", "relink", "trim"]
#: Stands between the parts of what editions are called in the stores.
_OF = "."


def document_id(scope: Scope, address: str) -> str:
    """The id of the document of *scope* that comes from *address*: SHA-256 of the three, which are kept apart by their lengths."""
    parts = (scope.tenant, scope.collection, address)
    return sha256("".join(f"{len(part)}:{part}" for part in parts).encode(errors="surrogatepass")).hexdigest()


def digest_of(data: bytes) -> str:
    """The digest of a file's content: SHA-256 in hex."""
    return sha256(data).hexdigest()


def edition_of(document: Document, chunks: Sequence[Chunk]) -> str:
    """The edition of *document* that is cut into *chunks*: 64 bits of a hash of all that its passages say, and of its content."""
    hashed = sha256(repr((document.digest, document.title, document.language)).encode())
    for each in chunks:
        hashed.update(repr((each.text, each.start, each.end, each.headings)).encode())
    return hashed.hexdigest()[:16]


def passage_id(document: Document, number: int) -> str:
    """The id of a passage, which tells its document and its edition."""
    if document.edition:
        return _OF.join((document.id, document.edition, str(number)))
    return sha256(f"{document.id}:{document.digest}:{number}".encode()).hexdigest()[:40]  # as a release before editions named it


def passage_ids(document: Document) -> list[str]:
    """The ids of all passages that *document* should have."""
    return [passage_id(document, number) for number in range(document.passages)]


def edition_in(passage: str) -> tuple[str, str] | None:
    """The document and the edition that the id of a passage tells; ``None`` where a release before there were editions took it in."""
    document, *rest = passage.rsplit(_OF, 2)
    return (document, rest[0]) if len(rest) == 2 else None


def linked_as(document: Document) -> str:
    """What *document*, in its edition, is called in the graph."""
    return f"{document.id}{_OF}{document.edition}" if document.edition else document.id


def owner(linked: str) -> str:
    """The id of the document that is called *linked* in the graph."""
    return linked.rpartition(_OF)[0] or linked


def passages_of(document: Document, chunks: Sequence[Chunk]) -> list[Passage]:
    """The passages of *document*, which is cut into *chunks*."""
    return [
        Passage(
            id=passage_id(document, number),
            document=document.id,
            number=number,
            text=chunk.text,
            start=chunk.start,
            end=chunk.end,
            headings=chunk.headings,
            title=document.title,
            address=document.address,
            language=document.language,
            updated=document.updated.timestamp(),
        )
        for number, chunk in enumerate(chunks)
    ]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a document, and the one that stands for it when nothing has to be done (*how* is ``unchanged`` or ``same``)."""

    how: How
    stands: Document | None = None


def decide(id: str, digest: str, title: str, ready: Document | None, same: Document | None) -> Decision:
    """What to do with content of this *digest* under *id*, *title* as far as it was given.

    *ready* is the document that is there under the id, *same* one with the same content. The same content under another address is
    not taken in twice: the first stands for it, until it is removed.
    """
    if ready is not None and ready.digest == digest and title in ("", ready.title):
        return Decision("unchanged", ready)
    if same is not None and same.id != id and (ready is None or ready.digest != digest):
        return Decision("same", same)
    return Decision("created" if ready is None else "replaced")


@dataclass(frozen=True, slots=True)
class Stock:
    """What the stores of one scope say, by document: how many *passages* each has in all editions; what is *ready* and *unfinished*.

    *linked* is how many passages the graph knows, by what the document is called there (see ``linked_as``).
    """

    ready: Mapping[str, Document] = field(default_factory=dict)
    unfinished: Mapping[str, Document] = field(default_factory=dict)
    passages: Mapping[str, int] = field(default_factory=dict)
    linked: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """A *document* of which the stores do not agree, *why*, and what mends it.

    ``remove`` takes what is left of it out of all stores, so that it can be taken in again from its *address*; ``relink`` reads its
    passages for the graph again; ``trim`` keeps the edition that is ready and nothing else.
    """

    scope: Scope
    document: str
    repair: Repair
    why: str
    address: str = ""


def findings(scope: Scope, stock: Stock, busy: Collection[str] = ()) -> list[Finding]:
    """Where the stores do not agree, by document; those that are *busy*, because somebody is at work on them, are left out."""
    linked: dict[str, dict[str, int]] = {}
    for name, count in stock.linked.items():
        linked.setdefault(owner(name), {})[name] = count
    everything = sorted({*stock.ready, *stock.unfinished, *stock.passages, *linked} - set(busy))
    found = (_finding(scope, id, stock, linked.get(id, {})) for id in everything)
    return [each for each in found if each]


def _finding(scope: Scope, id: str, stock: Stock, linked: Mapping[str, int]) -> Finding | None:
    passages, document, left = stock.passages.get(id, 0), stock.ready.get(id), stock.unfinished.get(id)
    if document is None:
        return Finding(
            scope, id, "remove", "it was not finished" if left else "it is in no list of documents", left.address if left else ""
        )
    if passages < document.passages:
        return Finding(
            scope, id, "remove", f"{document.passages - passages} of its {document.passages} passages are lost", document.address
        )
    if why := _besides(document, passages, left, linked):
        return Finding(scope, id, "trim", why, document.address)
    known = linked.get(linked_as(document), 0)
    if known > passages or (known == 0 and names_of_title(document.title)):
        return Finding(scope, id, "relink", f"the graph knows {known} of its {passages} passages", document.address)
    return None


def _besides(document: Document, passages: int, left: Document | None, linked: Mapping[str, int]) -> str:
    """What there is besides the edition that is ready; empty when there is nothing."""
    if left:
        return "a change of it was not finished"
    if passages > document.passages:
        return f"it has {passages} passages instead of {document.passages}"
    return "the graph knows another edition of it" if set(linked) - {linked_as(document)} else ""


def confirmed(first: Iterable[Finding], second: Iterable[Finding]) -> list[Finding]:
    """What two looks at the stores agree on: what was being worked on while they were read has changed in between."""
    seen = set(first)
    return [finding for finding in second if finding in seen]
