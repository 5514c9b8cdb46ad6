"""Taking documents in: what they are called in the stores, what has to be done with each, and how the stores are made to agree. Pure.

The order of deeds makes every crash harmless. In: begun, passages, graph, ready. Out: leaving, passages, graph, gone. What was begun or
is leaving is listed as unfinished, so a document is either ready and whole, or known to be neither.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from capibara_flow.domain.chunking import Chunk
from capibara_flow.domain.entities import names_of_title
from topics.knowledge import Document, Passage, Scope

How = Literal["created", "replaced", "unchanged", "same"]
Repair = Literal["remove", "relink", "rewrite"]


def document_id(scope: Scope, address: str) -> str:
    """The id of the document of *scope* that comes from *address*: SHA-256 of the three, which are kept apart by their lengths."""
    parts = (scope.tenant, scope.collection, address)
    return sha256("".join(f"{len(part)}:{part}" for part in parts).encode(errors="surrogatepass")).hexdigest()


def digest_of(data: bytes) -> str:
    """The digest of a file's content: SHA-256 in hex."""
    return sha256(data).hexdigest()


def passage_id(document: str, digest: str, number: int) -> str:
    """The id of a passage: known from the document alone, and another one as soon as the document's content is another."""
    return sha256(f"{document}:{digest}:{number}".encode()).hexdigest()[:40]


def passage_ids(document: Document) -> list[str]:
    """The ids of all passages that *document* should have."""
    return [passage_id(document.id, document.digest, number) for number in range(document.passages)]


def passages_of(document: Document, chunks: Sequence[Chunk]) -> list[Passage]:
    """The passages of *document*, which is cut into *chunks*."""
    return [
        Passage(
            id=passage_id(document.id, document.digest, number),
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


def resumable(wanted: Sequence[Passage], there: Mapping[str, Passage]) -> bool:
    """Whether what is *there* of the *wanted* passages was cut in the same way, so that a broken-off ingestion can go on behind it."""
    kept = [(passage, there[passage.id]) for passage in wanted if passage.id in there]
    return bool(kept) and all(_form(one) == _form(other) for one, other in kept)


def _form(passage: Passage) -> tuple[object, ...]:
    return passage.text, passage.start, passage.end, passage.title, passage.address, tuple(passage.headings), passage.language


@dataclass(frozen=True, slots=True)
class Stock:
    """What the stores of one scope say, by document: how many *passages* each has, and how many of them the graph knows (*linked*)."""

    ready: Mapping[str, Document] = field(default_factory=dict)
    unfinished: Mapping[str, Document] = field(default_factory=dict)
    passages: Mapping[str, int] = field(default_factory=dict)
    linked: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """A *document* of which the stores do not agree, *why*, and what mends it.

    ``remove`` takes what is left of it out of all stores, so that it can be taken in again from its *address*; ``relink`` reads its
    passages for the graph again; ``rewrite`` keeps its own passages and nothing else.
    """

    scope: Scope
    document: str
    repair: Repair
    why: str
    address: str = ""


def findings(scope: Scope, stock: Stock, busy: Collection[str] = ()) -> list[Finding]:
    """Where the stores do not agree, by document; those that are *busy*, because somebody is at work on them, are left out."""
    everything = sorted({*stock.ready, *stock.unfinished, *stock.passages, *stock.linked} - set(busy))
    found = (_finding(scope, id, stock) for id in everything)
    return [each for each in found if each]


def _finding(scope: Scope, id: str, stock: Stock) -> Finding | None:
    passages, linked = stock.passages.get(id, 0), stock.linked.get(id, 0)
    if left := stock.unfinished.get(id):
        return Finding(scope, id, "remove", "it was not finished", left.address)
    document = stock.ready.get(id)
    if document is None:
        return Finding(scope, id, "remove", "it is in no list of documents")
    if passages < document.passages:
        return Finding(
            scope, id, "remove", f"{document.passages - passages} of its {document.passages} passages are lost", document.address
        )
    if passages > document.passages:
        return Finding(scope, id, "rewrite", f"it has {passages} passages instead of {document.passages}", document.address)
    if linked > passages or (linked == 0 and names_of_title(document.title)):
        return Finding(scope, id, "relink", f"the graph knows {linked} of its {passages} passages", document.address)
    return None


def confirmed(first: Iterable[Finding], second: Iterable[Finding]) -> list[Finding]:
    """What two looks at the stores agree on: what was being worked on while they were read has changed in between."""
    seen = set(first)
    return [finding for finding in second if finding in seen]
