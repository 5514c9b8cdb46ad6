"""Messages worth recording: optional fields are there in some, and left out in others."""

from collections.abc import Iterator
from datetime import date

from pydantic import BaseModel

from topics.chat import (
    CallExpert,
    CancelTurn,
    ChatMessage,
    ChatRequest,
    Decision,
    Erased,
    EraseTurn,
    ExpertCalled,
    FunctionCall,
    ImagePart,
    ImageUrl,
    PreviewRoute,
    RouteTurn,
    Sampling,
    TextPart,
    ToolCall,
    TurnFailed,
    TurnRouted,
)
from topics.flow import DOOR, FLOW
from topics.grounding import (
    Checked,
    CheckStores,
    Disagreement,
    DocumentFacts,
    DocumentIngested,
    Found,
    IngestDocument,
    ListDocuments,
    Listing,
    PartDone,
    Removed,
    RemoveDocument,
    RetrieveSources,
    SearchKnowledge,
    SourcesRetrieved,
)
from topics.knowledge import Passage, Source
from topics.message import Message, Refusal
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
    SourceShown,
    Token,
    ToolCalled,
    Usage,
    Waiting,
)
from topics.plan import Plan, Step
from topics.usage import ReadUsage, UsageDay, UsageListing

TURN = "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F"
BEGAN = 1785585600.25

PLAIN = ChatRequest(messages=(ChatMessage(role="user", content="¿Qué tal, capibara? 🦫"),))
_CALL = ToolCall(id="call_7", function=FunctionCall(name="weather", arguments='{"city": "Bogotá"'))
_WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
FULL = ChatRequest(
    messages=(
        ChatMessage(role="system", content="Answer in one sentence.\nNever guess."),
        ChatMessage(role="user", content="Does it rain in Bogotá?", name="ana"),
        ChatMessage(role="assistant", tool_calls=(_CALL,)),
        ChatMessage(role="tool", content='{"rain": true}', tool_call_id="call_7"),
        ChatMessage(
            role="user",
            content=(
                TextPart(text="And here?"),
                ImagePart(image_url=ImageUrl(url="data:image/png;base64,iVBORw0KGgo=", detail="low")),
            ),
        ),
    ),
    model="paint",
    sampling=Sampling(
        temperature=0.2,
        top_p=0.9,
        top_k=-1,
        max_tokens=256,
        repeat_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        seed=-(2**63),
        stop=("\n\n", "END"),
    ),
    tools=(_WEATHER,),
    tool_choice={"type": "function", "function": {"name": "weather"}},
    response_format={"type": "json_object"},
)
_DECISION = Decision(model_id="scripted", route_name="default", complexity="simple", confidence=0.5, reasoning="no route comes near it")
_LEARNT = Decision(
    model_id="qwen2.5-coder:1.5b", route_name="programming", complexity="very_complex", confidence=0.9731, reasoning="near to its examples"
)
_PLAN = Plan(steps=(Step(stage="retriever"), Step(stage="caller", expert="scripted")))
_PASSAGE = Passage(
    id="7d0c:2",
    document="7d0c",
    number=2,
    text="El carpincho es el roedor más grande.",
    start=120,
    end=157,
    headings=("Fauna", "Roedores"),
    title="Fauna de los Llanos",
    address="https://example.com/fauna",
    language="es",
    updated=BEGAN,
)
_SOURCES = (
    Source(n=1, passage=_PASSAGE, score=0.82, parts={"bm25": 0.5, "vector": 0.32}),
    Source(n=2, passage=Passage(id="7d0c:3", document="7d0c", number=3, text="", start=157, end=157), score=0.1),
)
_NOT_NOW = Refusal(title="store unavailable", detail="the store does not answer", status=503, retryable=True)
_FACTS = DocumentFacts(id="7d0c", title="Fauna", address="fauna.md", language="es", digest="0" * 64, updated=BEGAN, passages=4)
_USED = UsageDay(day=date(2026, 8, 1), tenant="acme", expert="scripted", answers=2, prompt_tokens=24, completion_tokens=80)
_ATTEMPT = {"turn": TURN, "branch": "main", "started": BEGAN + 0.02, "ended": BEGAN + 2.5}

COMMANDS: tuple[Message, ...] = (
    RouteTurn(turn=TURN, request=PLAIN),
    RouteTurn(turn=TURN, request=FULL),
    RouteTurn(turn=TURN, request=PLAIN.model_copy(update={"grounded": True}), bucket=12, priority="high"),
    CallExpert(turn=TURN, expert="scripted", bucket=7, request=PLAIN.model_copy(update={"model": "scripted"})),
    CallExpert(
        turn=TURN,
        expert="qwen2_5-coder_1_5b",
        bucket=15,
        branch="second",
        request=FULL,
        alternatives=("scripted", "paint"),
        passed=2,
        plan=_PLAN,
    ),
    CallExpert(turn=TURN, expert="scripted", bucket=0, request=PLAIN, sources=_SOURCES),
    RetrieveSources(turn=TURN, call=CallExpert(turn=TURN, expert="scripted", bucket=7, request=PLAIN), until=BEGAN + 30),
    RetrieveSources(
        turn=TURN,
        collection="docs-2026",
        call=CallExpert(turn=TURN, expert="scripted", bucket=7, request=FULL),
        step=1,
        parts=("retriever", "web"),
        until=BEGAN + 2.5,
    ),
    IngestDocument(turn=TURN, name="fauna.md", size=2048, pieces=1),
    IngestDocument(
        turn=TURN,
        collection="docs",
        name="fauna.pdf",
        address="https://example.com/fauna.pdf",
        title="Fauna",
        media_type="application/pdf",
        size=9_000_000,
        pieces=18,
    ),
    SearchKnowledge(turn=TURN, tenant="acme", query="¿qué come el carpincho?"),
    SearchKnowledge(turn=TURN, tenant="acme", collection="docs", query="capybara", limit=3),
    CheckStores(turn=TURN),
    CheckStores(turn=TURN, repair=True),
    ListDocuments(turn=TURN, tenant="acme"),
    ListDocuments(turn=TURN, tenant="acme", collection="docs", limit=5, after="7d0c", document="7d0d"),
    RemoveDocument(turn=TURN, tenant="acme", document="7d0c"),
    ReadUsage(turn=TURN, since=BEGAN - 86400, until=BEGAN),
    ReadUsage(turn=TURN, tenant="acme", since=0, until=BEGAN),
    CancelTurn(turn=TURN),
    CancelTurn(turn=TURN, reason="expired"),
    EraseTurn(turn=TURN),
    PreviewRoute(turn=TURN, request=PLAIN),
    PreviewRoute(turn=TURN, request=FULL),
)
EVENTS: tuple[Message, ...] = (
    TurnRouted(turn=TURN, decision=_DECISION, plan=Plan(), started=BEGAN, ended=BEGAN + 0.001),
    TurnRouted(turn=TURN, decision=_LEARNT, plan=_PLAN, started=BEGAN, ended=BEGAN + 0.015, version="0.2.0", configuration="0ba39e4757c9"),
    SourcesRetrieved(turn=TURN, collection="default", sources=("7d0c:2", "7d0c:3"), started=BEGAN, ended=BEGAN + 0.02),
    SourcesRetrieved(turn=TURN, collection="docs", sources=(), problem="the store does not answer", started=BEGAN, ended=BEGAN + 2),
    DocumentIngested(turn=TURN, document="7d0c", how="created", passages=4, started=BEGAN, ended=BEGAN + 1.5),
    ExpertCalled(
        **_ATTEMPT,
        expert="scripted",
        attempt=1,
        outcome="stop",
        prompt_tokens=12,
        completion_tokens=40,
        burnt_tokens=40,
        first_token=BEGAN + 0.3,
    ),
    ExpertCalled(**_ATTEMPT, expert="scripted", attempt=2, outcome="length", continued="prefill", completion_tokens=9, burnt_tokens=12),
    ExpertCalled(**_ATTEMPT, expert="paint", attempt=3, outcome="passed on: engine unreachable", continued="reset"),
    ExpertCalled(**_ATTEMPT, expert="paint", attempt=1, outcome="cancelled", continued="skip", cached=True, first_token=BEGAN + 0.1),
    TurnFailed(
        turn=TURN, stage="caller", title="bad request", detail="the engine refuses it", body=COMMANDS[2].model_dump_json(exclude_none=True)
    ),
    TurnFailed(turn=TURN, stage="router", title="bad request", detail="a message that cannot be understood", body='{"turn": "cut \ufffd'),
)
SHARES: tuple[Message, ...] = (
    PartDone(turn=TURN, step=0, part="retriever", gives={"sources": []}),
    PartDone(turn=TURN, step=1, part="web", problem="nobody answers"),
)
OUTPUTS: tuple[Output, ...] = (
    Queued(turn=TURN, expert="scripted", position=3, eta_s=4.5),
    Queued(turn=TURN, expert="scripted", position=1),
    SourcesFound(turn=TURN, sources=tuple(map(SourceShown.of, _SOURCES))),
    SourcesFound(turn=TURN, sources=(), problem="the store does not answer"),
    Cited(turn=TURN, cited=(1,)),
    Cited(turn=TURN, cited=(), unknown=(7,)),
    Ingested(turn=TURN, document="7d0c", how="created", title="Fauna", passages=4),
    Routed.of(TURN, _DECISION, Plan()),
    Routed.of(TURN, _LEARNT, _PLAN),
    Token(turn=TURN, text="¿Qué tal,\n capibara? 🦫"),
    Token(turn=TURN, text="", reasoning="They greet me."),
    ToolCalled(turn=TURN, index=0, id="call_7", name="weather", arguments='{"city":'),
    ToolCalled(turn=TURN, index=0, arguments=' "Bogotá"}'),
    Reset(turn=TURN, reason="the answer starts anew after a fault"),
    Continued(turn=TURN, how="prefill", expert="scripted", attempt=2),
    Continued(turn=TURN, how="skip", expert="paint", attempt=3),
    Waiting(turn=TURN, stage="caller", title="engine busy", reason="503 from the engine", attempt=1),
    Waiting(turn=TURN, stage="router", reason="no connection", attempt=4),
    Loading(turn=TURN, expert="scripted", eta_s=12.5),
    Loading(turn=TURN, expert="scripted"),
    Usage(turn=TURN, prompt_tokens=12, completion_tokens=40, burnt_tokens=44, attempts=2),
    Usage(turn=TURN),
    Done(turn=TURN, finish_reason="stop", model_id="scripted", timings={"total_seconds": 2.48, "first_token_seconds": 0.28}),
    Done(turn=TURN, finish_reason="tool_calls", model_id="paint", cached=True),
    Failed(turn=TURN, title="turn expired", status=504, detail="the turn's deadline has passed", retryable=True),
    Failed(turn=TURN, type="https://example.com/problems/refused", title="bad request", status=400, detail="the engine refuses it"),
)
_TORN = Disagreement(
    tenant="acme", collection="docs", document="7d0c", address="a.md", why="a change of it was not finished", repair="trim"
)
_KNOWN = (
    Found(sources=_SOURCES, seconds=0.02),
    Found(refused=_NOT_NOW),
    Listing(documents=(_FACTS,)),
    Listing(refused=_NOT_NOW),
    Checked(findings=(_TORN,), more=2),
    Checked(refused=_NOT_NOW),
    Removed(removed=True),
    Removed(refused=_NOT_NOW),
    UsageListing(days=(_USED,), waiting=3, more=True),
    UsageListing(refused=_NOT_NOW),
)
REPLIES: tuple[BaseModel, ...] = (_DECISION, _LEARNT, Erased(messages=17), Plan(), _PLAN, *_KNOWN)

#: What a release has to have recorded: all that the map has, and the parts that travel by themselves.
CLASSES = {message for hop in FLOW for message in (hop.consumes, *hop.serves, *hop.speaks)} | {
    *DOOR,
    Decision,
    Erased,
    Plan,
    Checked,
    Found,
    Listing,
    Removed,
    UsageListing,
}


def examples() -> Iterator[tuple[str, bytes]]:
    """The name of its class and the line of each message, as the code of today writes it to the broker."""
    for each in (*COMMANDS, *EVENTS, *SHARES, *OUTPUTS, *REPLIES):
        whole = isinstance(each, CancelTurn | TurnFailed)  # these are written with all their fields
        line = each.line() if isinstance(each, Output) else each.model_dump_json(exclude_none=not whole).encode()
        yield type(each).__name__, line
