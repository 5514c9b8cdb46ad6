"""Who consumes what and may emit what. The README's diagram, AsyncAPI and the broker's permissions are held against this table."""

from dataclasses import dataclass

from topics.chat import CallExpert, CancelTurn, EraseTurn, ExpertCalled, PreviewRoute, RouteTurn, TurnFailed, TurnRouted
from topics.grounding import (
    CheckStores,
    DocumentIngested,
    IngestDocument,
    ListDocuments,
    PartDone,
    RemoveDocument,
    RetrieveSources,
    SearchKnowledge,
    SourcesRetrieved,
)
from topics.message import Command, Event, Message, Request, Signal
from topics.output import (
    Cited,
    Continued,
    Done,
    Failed,
    Ingested,
    Loading,
    Output,
    Queued,
    Reset,
    Routed,
    SourcesFound,
    Token,
    ToolCalled,
    Usage,
    Waiting,
)
from topics.usage import ReadUsage

EDGE = "edge"


@dataclass(frozen=True)
class Hop:
    """One worker on the map: what it takes, what it may emit, what it may show to the client, which requests it replies to.

    A command or a signal asks for work on a turn; an event is a fact that the log keeps, of which nobody waits to hear more.
    """

    worker: str
    consumes: type[Command] | type[Signal] | type[Event]
    emits: tuple[type[Message], ...] = ()
    shows: tuple[type[Output], ...] = ()
    serves: tuple[type[Request], ...] = ()

    @property
    def takes_facts(self) -> bool:
        """Whether it takes what others told the log."""
        return issubclass(self.consumes, Event)

    @property
    def speaks(self) -> tuple[type[Message], ...]:
        """Everything it may publish."""
        return (*self.emits, *self.shows)


FLOW = (
    Hop(
        "router",
        RouteTurn,
        (CallExpert, RetrieveSources, TurnRouted, TurnFailed),
        (Routed, Queued, Waiting, Failed),
        serves=(PreviewRoute,),
    ),
    Hop(
        "retriever",
        RetrieveSources,
        (CallExpert, PartDone, SourcesRetrieved, TurnFailed),
        (SourcesFound, Queued, Waiting, Failed),
        serves=(SearchKnowledge, ListDocuments, RemoveDocument),
    ),
    Hop(
        "caller",
        CallExpert,
        (CallExpert, ExpertCalled, TurnFailed),
        (Token, ToolCalled, Continued, Reset, Waiting, Loading, Cited, Usage, Done, Failed),
    ),
    Hop("ingester", IngestDocument, (DocumentIngested, TurnFailed), (Ingested, Waiting, Done, Failed), serves=(CheckStores,)),
    Hop("undertaker", CancelTurn, (CancelTurn, TurnFailed), (Waiting, Usage, Done, Failed), serves=(EraseTurn,)),
    Hop("accountant", ExpertCalled, serves=(ReadUsage,)),
)

#: Workers that are another one with other needs: an expert host is a caller of engines that it starts itself.
VARIANTS = {"host": "caller"}
NAMES = (*(each.worker for each in FLOW), *VARIANTS)

#: What the door itself publishes; it listens to nothing but output.
DOOR: tuple[type[Message], ...] = (
    RouteTurn,
    PreviewRoute,
    IngestDocument,
    SearchKnowledge,
    ListDocuments,
    RemoveDocument,
    ReadUsage,
    CancelTurn,
    EraseTurn,
)

#: What only operators ask for, by hand.
OPERATOR: tuple[type[Message], ...] = (CheckStores,)


def hop(worker: str) -> Hop:
    """The hop of *worker*; raises ``KeyError``."""
    return {each.worker: each for each in FLOW}[worker]


def kind(name: str) -> str:
    """The worker of the map that *name* is: its module, and its role at the broker."""
    return VARIANTS.get(name, name)


def mermaid(flow: tuple[Hop, ...] = FLOW) -> str:
    """The flow as a Mermaid diagram: commands are arrows between workers, output and facts are grouped by worker."""
    consumer: dict[type[Message], str] = {each.consumes: each.worker for each in flow if not each.takes_facts}
    consumer |= {request: each.worker for each in flow for request in each.serves}
    arrows = [f"    {EDGE} -- {message.__name__} --> {consumer[message]}" for message in DOOR if message in consumer]
    for each in flow:
        arrows += [f"    {each.worker} -- {m.__name__} --> {consumer[m]}" for m in each.emits if m in consumer]
        if each.shows:
            arrows.append(f"    {each.worker} -. {', '.join(m.__name__ for m in each.shows)} .-> {EDGE}")
        if facts := [m.__name__ for m in each.emits if m not in consumer]:
            arrows.append(f"    {each.worker} -. {', '.join(facts)} .-> log[(log)]")
        if each.takes_facts:
            arrows.append(f"    log[(log)] -- {each.consumes.__name__} --> {each.worker}")
    return "\n".join(["flowchart LR", *arrows])
