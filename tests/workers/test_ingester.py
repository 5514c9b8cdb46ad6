"""The ingester on a real broker: a document in pieces is put together, taken in once, and what became of it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from capibara_flow import wiring
from capibara_flow.domain.ingesting import Finding
from capibara_flow.domain.refusing import Refused
from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import BadRequest, CannotStart, DocumentRefused, StoreUnavailable, TooLarge
from capibara_flow.runtime import brokers
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.depositing import PIECE, Deposit
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.ingesting import File, Taken
from capibara_flow.runtime.requests import replied
from capibara_flow.settings import WorkerSettings
from tests.conftest import settings_for
from tests.waiting import until
from topics.grounding import Checked, CheckStores, Disagreement, DocumentIngested, IngestDocument
from topics.knowledge import Document, Scope
from topics.output import Done, Failed, Ingested, Output, parse
from topics.streams import ingester_consumer
from workers import ingester

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="acme")
BYTES = bytes(range(256)) * 3000  # three pieces


async def chunks(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@dataclass
class Library:
    """Whatever takes documents in."""

    errors: list[Exception] = field(default_factory=list)
    hangs: bool = False
    uploads: list[tuple[Scope, File]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    async def check(self, repair: bool) -> list[Finding]:
        if self.errors:
            raise self.errors.pop(0)
        found = list(self.findings)
        if repair:
            self.findings.clear()
        return found

    async def ingest(self, scope: Scope, file: File) -> Taken:
        self.uploads.append((scope, file))
        if self.hangs:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop(0)
        now = datetime.now(UTC)
        return Taken("created", Document("d1", scope, "Capibaras", file.address, "0", "es", now, passages=7))


@dataclass
class Stand:
    """An ingester at work, and everything that was published."""

    client: Client
    deposit: Deposit
    own: Deposit
    library: Library
    heard: list[Msg] = field(default_factory=list)

    async def send(self, data: bytes = BYTES, **more: object) -> None:
        size, pieces = await self.deposit.put(TURN, chunks(data), 10_000_000)
        facts = {"name": "capibaras.md", "address": "docs/capibaras.md", "size": size, "pieces": pieces, **more}
        command = IngestDocument(turn=TURN, **facts)
        headers = {"Cf-Tenant": "acme", "Cf-Principal": "ann"}
        await self.client.jetstream().publish(command.subject, command.model_dump_json().encode(), headers=headers)

    @property
    def outputs(self) -> list[Output]:
        lines = [line for each in self.heard if each.subject.startswith("cf.live.") for line in each.data.split(b"\n")]
        return [parse(line) for line in lines]

    async def end(self) -> Done | Failed:
        """How it ended."""
        return await until(lambda: next((each for each in self.outputs if isinstance(each, Done | Failed)), None))

    async def nothing_waits(self) -> bool:
        return not await self.own.waits(TURN)


@pytest.fixture
async def stand(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[Stand]:
    file = tmp_path / "fleet.toml"
    file.write_text('[[experts]]\nname = "phi"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.01, patience_seconds=20))
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:
        observer = await stack.enter_async_context(wiring.connected(settings, "observer"))
        edge = await stack.enter_async_context(wiring.connected(settings, "edge"))
        own = await stack.enter_async_context(wiring.connected(settings, "ingester"))
        provisioner = await stack.enter_async_context(wiring.connected(settings, "provisioner"))
        stand = Stand(provisioner, Deposit(edge), Deposit(own), Library())

        async def hear(message: Msg) -> None:
            stand.heard.append(message)

        await observer.subscribe("cf.>", cb=hear)
        await flushed(observer)
        answers = FencedAnswers(own, "ingester@test")
        await answers.start()
        stack.push_async_callback(answers.stop)
        nats = brokers.broker(settings, "ingester")
        await nats.connect()
        needs = {"answers": answers, "consumer": ingester_consumer(), "deposit": Deposit(own), "check": stand.library.check}
        await ingester.build(nats, ingest=stand.library.ingest, **needs, retry_seconds=0.01, patience_seconds=20).start()
        stack.push_async_callback(nats.stop)
        yield stand


async def test_a_document_is_put_together_taken_in_and_told(stand: Stand) -> None:
    await stand.send()
    assert await stand.end() == Done(turn=TURN, finish_reason="ingested", model_id="", timings=(await stand.end()).timings)
    assert stand.outputs[0] == Ingested(turn=TURN, document="d1", how="created", title="Capibaras", passages=7)
    [upload] = stand.library.uploads
    assert upload == (Scope("acme"), File(BYTES, "capibaras.md", "docs/capibaras.md", owner="ann"))
    fact = DocumentIngested.read((await until(lambda: [m for m in stand.heard if m.subject == f"cf.log.{TURN}.ingester"]))[0].data)
    assert (fact.document, fact.how, fact.passages) == ("d1", "created", 7)
    await until(stand.nothing_waits)


async def checked(stand: Stand, *, repair: bool = False) -> Checked:
    return await replied(stand.client, CheckStores(turn=TURN, repair=repair), Checked, seconds=20, nobody="nobody")


async def test_where_the_stores_do_not_agree_is_told_and_mended(stand: Stand) -> None:
    stand.library.findings = [Finding(Scope("acme", "docs"), f"d{number}", "trim", "torn", "a.md") for number in range(5003)]
    told = await checked(stand)
    assert (len(told.findings), told.more) == (5000, 3)
    where = {"tenant": "acme", "collection": "docs", "document": "d0", "address": "a.md"}
    assert told.findings[0] == Disagreement(**where, why="torn", repair="trim")
    assert await checked(stand, repair=True) == told
    assert await checked(stand) == Checked()


async def test_what_keeps_the_stores_shut_is_told(stand: Stand) -> None:
    stand.library.errors = [CannotStart("documents need pymilvus: `pip install 'capibara-flow[rag]'` brings it")]
    with pytest.raises(Refused) as told:
        await checked(stand)
    refused = told.value.refusal
    assert (refused.title, refused.status, refused.retryable) == ("cannot start", 503, False)
    assert "pip install" in refused.detail


async def test_an_empty_document_is_one(stand: Stand) -> None:
    await stand.send(b"")
    await stand.end()
    assert stand.library.uploads[0][1].data == b""


async def test_a_store_that_is_away_is_waited_for(stand: Stand) -> None:
    stand.library.errors = [StoreUnavailable("away"), StoreUnavailable("away")]
    await stand.send()
    assert isinstance(await stand.end(), Done)
    assert len(stand.library.uploads) == 3


async def test_a_document_that_cannot_be_read_ends_with_the_reason(stand: Stand) -> None:
    stand.library.errors = [DocumentRefused("no text in this PDF")]
    await stand.send()
    end = await stand.end()
    assert isinstance(end, Failed)
    assert (end.title, end.status, end.detail) == ("document refused", 422, "no text in this PDF")
    await until(stand.nothing_waits)


async def test_pieces_that_are_not_all_there_are_refused(stand: Stand) -> None:
    await stand.send(pieces=4)
    end = await stand.end()
    assert isinstance(end, Failed)
    assert "send it again" in end.detail
    assert not stand.library.uploads


async def test_whoever_stops_it_has_it_stopped(stand: Stand) -> None:
    stand.library.hangs = True
    await stand.send()
    await until(lambda: stand.library.uploads)
    await stand.client.publish(f"cf.ctl.{TURN}.cancel", b"{}")
    end = await stand.end()
    assert isinstance(end, Done)
    assert end.finish_reason == "cancelled"


async def test_a_document_that_is_sent_twice_is_taken_in_once(stand: Stand) -> None:
    await stand.send()
    await stand.end()
    await stand.send()
    await until(stand.nothing_waits)
    assert len(stand.library.uploads) == 1


async def test_more_than_is_allowed_is_refused_before_all_of_it_came(stand: Stand) -> None:
    asked = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            asked.append(1)
            yield bytes(PIECE)

    with pytest.raises(TooLarge):
        await stand.deposit.put(TURN, endless(), 4 * PIECE)
    assert len(asked) == 5


async def test_what_is_no_longer_there_cannot_be_fetched(stand: Stand) -> None:
    with pytest.raises(BadRequest):
        await stand.own.fetch(TURN, 1, 1)
