"""What the tests of documents and search share: sources, forms, and outputs of a document that was taken in."""

from aiohttp import FormData

from topics.grounding import DocumentFacts
from topics.knowledge import Passage, Source
from topics.output import Done, Ingested, Output

ID = "ab" * 32
FACTS = DocumentFacts(id=ID, title="Leave", address="https://h/leave", language="en", digest="d" * 64, updated=1.7e9, passages=3)
DONE = Done(turn="T", finish_reason="ingested", model_id="")


def ingested(how: str = "created") -> tuple[tuple[Output, ...], ...]:
    """What an ingester says of a document."""
    return ((Ingested(turn="T", document=ID, how=how, title="Leave", passages=3), DONE),)


def source(n: int, **more: str) -> Source:
    """The *n*-th source."""
    said = {"title": f"Title, {n}", "address": f"https://h/{n}", "text": f'Words "{n}": a, b\n- c'} | more
    passage = Passage(id=f"p{n}", document=ID, number=n, start=n, end=n + 10, headings=("Head",), language="en", updated=1.7e9, **said)
    return Source(n=n, passage=passage, score=1 / n, parts={"vector": 0.5, "graph": 0.25} if n % 2 else {"vector": 1.0})


def form(*files: tuple[str, bytes]) -> FormData:
    """A form of *files*."""
    data = FormData(quote_fields=False)
    for name, content in files:
        data.add_field("files", content, filename=name, content_type="text/plain")
    return data
