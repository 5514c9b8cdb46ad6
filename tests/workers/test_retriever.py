"""The retriever on a real broker: what it finds, what it says when it finds nothing in time, and how a step of several is joined."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from capibara_flow import wiring
from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import EmbedderMismatch, StoreUnavailable
from capibara_flow.runtime import brokers, work
from capibara_flow.runtime.client import TokenClient, flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.joining import Join
from capibara_flow.settings import WorkerSettings
from tests.conftest import settings_for
from tests.fakes import FakeAnswers
from tests.waiting import until
from topics.chat import CallExpert, ChatMessage, ChatRequest
from topics.grounding import Found, ListDocuments, PartDone, RetrieveSources, SearchKnowledge, SourcesRetrieved
from topics.knowledge import Document, Passage, Scope, Source
from topics.output import SourcesFound, parse
from topics.streams import retriever_consumer
from workers import retriever

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="acme")
PASSAGE = Passage("p1", "d1", 0, "Los capibaras nadan.", 0, 20, ("Agua",), "Capibaras", "capibaras.md", "es", 86400.0)
SOURCES = (Source(1, PASSAGE, 0.9, {"vector": 0.8}),)


@dataclass
class Library:
    """Whatever the retriever asks for."""

    found: Sequence[Source] = SOURCES
    errors: list[Exception] = field(default_factory=list)
    hangs: bool = False
    takes: bool = True
    asked: list[tuple[Scope, str, int]] = field(default_factory=list)

    async def search(self, scope: Scope, query: str, limit: int) -> Sequence[Source]:
        self.asked.append((scope, query, limit))
        if self.hangs:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop(0)
        return self.found

    def written(self, found: Sequence[Source], question: str) -> tuple[Sequence[Source], str]:
        return (found, f"{len(found)} sources") if found and self.takes else ((), "")

    async def documents(self, command: ListDocuments) -> list[Document]:
        raise StoreUnavailable("no documents now")

    async def remove(self, scope: Scope, document: str) -> bool:
        return document == "d1"


@dataclass
class Stand:
    """A retriever at work, and everything that was published."""

    client: Client
    edge: Client
    own: TokenClient
    library: Library
    heard: list[Msg] = field(default_factory=list)

    async def ask(self, *words: str, seconds: float = 20, parts: tuple[str, ...] = ("retriever",)) -> None:
        request = ChatRequest(messages=tuple(ChatMessage(role="user", content=each) for each in words), model="phi")
        call = CallExpert(turn=TURN, expert="phi", bucket=0, request=request)
        command = RetrieveSources(turn=TURN, call=call, parts=parts, until=time.time() + seconds)
        await self.client.jetstream().publish(command.subject, command.model_dump_json().encode(), headers={"Cf-Tenant": "acme"})

    async def called(self) -> CallExpert:
        """The call that followed."""
        return CallExpert.read((await until(lambda: self.on(".call.")))[0].data)

    async def shown(self) -> SourcesFound:
        """What the client was shown."""
        output = parse((await until(lambda: self.on("cf.out.")))[0].data)
        assert isinstance(output, SourcesFound)
        return output

    def on(self, part: str) -> list[Msg]:
        return [each for each in self.heard if part in each.subject]


@pytest.fixture
async def stand(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[Stand]:
    file = tmp_path / "fleet.toml"
    file.write_text('[[experts]]\nname = "phi"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.01))
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:
        observer = await stack.enter_async_context(wiring.connected(settings, "observer"))
        provisioner = await stack.enter_async_context(wiring.connected(settings, "provisioner"))
        edge = await stack.enter_async_context(wiring.connected(settings, "edge"))
        own = await stack.enter_async_context(wiring.connected(settings, "retriever"))
        stand = Stand(provisioner, edge, own, Library())

        async def hear(message: Msg) -> None:
            stand.heard.append(message)

        await observer.subscribe("cf.>", cb=hear)
        await flushed(observer)
        nats = brokers.broker(settings, "retriever")
        await nats.connect()
        library = {
            "written": stand.library.written,
            "search": stand.library.search,
            "documents": stand.library.documents,
            "remove": stand.library.remove,
        }
        needs = {"answers": FakeAnswers(), "consumer": retriever_consumer(), "join": Join(own), "limit": 3}
        await retriever.build(nats, **library, **needs).start()
        stack.push_async_callback(nats.stop)
        yield stand


async def test_sources_are_shown_kept_and_given_to_the_call(stand: Stand) -> None:
    await stand.ask("¿Nadan los capibaras del Paraná en invierno también?")
    call = await stand.called()
    assert (call.sources, call.context) == (SOURCES, "1 sources")
    shown = (await stand.shown()).sources[0]
    assert (shown.n, shown.title, shown.url, shown.date, shown.offsets) == (1, "Capibaras › Agua", "capibaras.md", "1970-01-02", (0, 20))
    fact = SourcesRetrieved.read((await until(lambda: stand.on(f"cf.log.{TURN}.retriever")))[0].data)
    assert (fact.sources, fact.problem) == (("p1",), "")
    assert stand.library.asked == [(Scope("acme"), "¿Nadan los capibaras del Paraná en invierno también?", 3)]


async def test_a_short_question_is_looked_for_with_the_one_before(stand: Stand) -> None:
    await stand.ask("¿Dónde viven los capibaras?", "¿Y qué comen?")
    await stand.called()
    assert stand.library.asked[0][1] == "¿Dónde viven los capibaras?\n¿Y qué comen?"


async def test_a_store_that_is_away_for_a_moment_is_asked_again(stand: Stand) -> None:
    stand.library.errors = [StoreUnavailable("away"), StoreUnavailable("away")]
    await stand.ask("¿Nadan?")
    assert (await stand.called()).sources == SOURCES


@pytest.mark.parametrize(
    ("library", "seconds", "problem"),
    [
        (Library(errors=[StoreUnavailable("away")] * 1000), 0.5, "away"),
        (Library(hangs=True), 0.5, "in time"),
        (Library(), -1, "in time"),
        (Library(errors=[EmbedderMismatch("embedded by another model")]), 20, "another model"),
    ],
    ids=["away", "hangs", "late", "refused"],
)
async def test_a_turn_goes_on_without_sources_and_says_why(stand: Stand, library: Library, seconds: float, problem: str) -> None:
    stand.library.errors, stand.library.hangs = list(library.errors), library.hangs
    await stand.ask("¿Nadan?", seconds=seconds)
    assert (await stand.called()).sources == ()
    assert problem in ((await stand.shown()).problem or "")


async def test_nothing_found_is_no_problem(stand: Stand) -> None:
    stand.library.found = ()
    await stand.ask("¿Nadan?")
    assert (await stand.called()).sources == ()
    assert (await stand.shown()).problem is None


async def test_a_step_of_two_waits_for_the_other_part(stand: Stand) -> None:
    await stand.ask("¿Nadan?", parts=("retriever", "enricher"))
    await until(lambda: stand.on(f"cf.join.{TURN}.0.retriever"))
    assert not stand.on(".call.")
    work.begin(stand.heard[0])
    other = Join(stand.own)
    both = await other.joined(PartDone(turn=TURN, step=0, part="enricher"), ("retriever", "enricher"), time.time() + 20)
    assert [each.part for each in both] == ["retriever", "enricher"]
    assert (await stand.called()).sources == SOURCES


async def test_a_part_that_never_comes_is_waited_for_no_longer_than_the_step_may_take(stand: Stand) -> None:
    await stand.ask("¿Nadan?", parts=("retriever", "enricher"), seconds=1)
    assert (await stand.called()).sources == SOURCES


async def test_a_part_that_cannot_be_read_holds_nobody_up(stand: Stand) -> None:
    await stand.own.jetstream().publish(f"cf.join.{TURN}.0.enricher", b"no part")
    await stand.ask("¿Nadan?", parts=("retriever", "enricher"), seconds=60)
    assert (await stand.called()).sources == SOURCES


async def test_two_who_see_all_parts_make_one_call(stand: Stand) -> None:
    await stand.ask("¿Nadan?")
    await stand.ask("¿Nadan?")
    await until(lambda: len(stand.on(f"cf.log.{TURN}.retriever")) == 2)
    info = await stand.client.jetstream().stream_info("CF_WORK_CALL")
    assert info.state.messages == 1


async def test_requests_are_replied_to_also_when_they_fail(stand: Stand) -> None:
    asked = SearchKnowledge(turn=TURN, tenant="acme", query="nadan", limit=2)
    reply = await _asked(stand.edge, asked.subject, asked.model_dump_json())
    found = Found.model_validate(reply)
    assert (found.sources, found.related) == (SOURCES, True)
    listing = ListDocuments(turn=TURN, tenant="acme")
    reply = await _asked(stand.edge, listing.subject, listing.model_dump_json())
    assert reply["refused"] == {"title": "store unavailable", "detail": "no documents now", "status": 503, "retryable": True}


async def test_what_a_prompt_would_not_take_is_listed_and_said_to_be_unrelated(stand: Stand) -> None:
    stand.library.takes = False
    await stand.ask("¿Nadan los capibaras del Paraná en invierno también?")
    call = await stand.called()
    assert (call.sources, call.context) == ((), "")
    shown = await stand.shown()
    assert (shown.sources, shown.problem) == ((), None)
    asked = SearchKnowledge(turn=TURN, tenant="acme", query="nadan", limit=2)
    found = Found.model_validate(await _asked(stand.edge, asked.subject, asked.model_dump_json()))
    assert (found.sources, found.related) == (SOURCES, False)


async def _asked(client: Client, subject: str, body: str) -> dict[str, object]:
    return dict(json.loads((await client.request(subject, body.encode(), timeout=10)).data))
