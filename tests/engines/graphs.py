"""What the suites of the graph stores share: mentions at random, and a store's answers in an order that can be compared."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from capibara_flow.ports import GraphStore
from topics.knowledge import Mention, Scope

SCOPES = (Scope("ana"), Scope("ana", "other"), Scope("berta"), Scope("an", "adefault"))
DOCUMENTS = ("d1", "d2", "d3")
ENTITIES = ("madrid", "ángel o'brien", 'the "quoted" \\ one', "北京 $name {x}", "n" * 3000)
PASSAGES = {document: tuple(f"{document}:{number}'" for number in range(3)) for document in DOCUMENTS}
#: Anything that UTF-8 can encode: control characters and quotes come as well.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def mentions_of(draw: st.DrawFn, document: str) -> list[Mention]:
    """Mentions of *document*'s passages, each pair of passage and entity once."""
    pairs = draw(st.lists(st.tuples(st.sampled_from(PASSAGES[document]), st.sampled_from(ENTITIES)), unique=True, max_size=6))
    return [Mention(passage, entity, draw(names), draw(st.booleans())) for passage, entity in pairs]


@dataclass(frozen=True)
class Deed:
    """A change of a graph: what a document mentions (none: it is deleted)."""

    scope: Scope
    document: str
    mentions: list[Mention] | None

    async def do(self, graph: GraphStore) -> None:
        if self.mentions is None:
            await graph.delete(self.scope, self.document)
        else:
            await graph.put(self.scope, self.document, self.mentions)


@st.composite
def deeds(draw: st.DrawFn) -> Deed:
    document = draw(st.sampled_from(DOCUMENTS))
    return Deed(draw(st.sampled_from(SCOPES)), document, draw(st.none() | mentions_of(document)))


async def told(graph: GraphStore, limit: int = 2) -> list[Any]:
    """All that *graph* answers about what the strategies name."""
    passages = [each for some in PASSAGES.values() for each in some]
    return [
        (
            await graph.degrees(scope, [*ENTITIES, "nobody"]),
            await graph.mentioning(scope, [*ENTITIES, "nobody"], limit),
            sorted(await graph.mentioned(scope, [*passages, "none"]), key=repr),
            await graph.documents(scope),
        )
        for scope in SCOPES
    ]
