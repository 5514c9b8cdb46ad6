"""The accountant on a real broker: facts are written down once, whatever happens in between, and told on request."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from nats.js import JetStreamContext

from capibara_flow import wiring
from capibara_flow.domain.refusing import Refused
from capibara_flow.errors import BrokerUnavailable, CannotStart, StoreUnavailable
from capibara_flow.ports import Spent, UsageLog
from capibara_flow.runtime import accounting, brokers
from capibara_flow.runtime.accounting import Backlog, Books, Habits
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.requests import replied
from capibara_flow.settings import KnowledgeSettings, LogSettings, Settings
from tests.conftest import settings_for
from tests.fakes_usage import FakeUsage
from tests.waiting import until
from topics.chat import PASSED_ON, ExpertCalled
from topics.message import TENANT
from topics.streams import LOG, Layout, accountant_consumer
from topics.usage import ReadUsage, UsageListing
from workers import accountant

NEVER = Habits(due=1e9, kept=3600, look=3600, linger=0)


@dataclass
class Stand:
    """An accountant at work with *store* behind its books, and clients to tell and to ask."""

    settings: Settings
    admin: JetStreamContext
    caller: TokenClient
    edge: TokenClient
    own: TokenClient
    stack: AsyncExitStack
    store: FakeUsage = field(default_factory=FakeUsage)
    wanted: bool = False
    trouble: Exception | None = None
    opened: int = 0
    books: Books = field(init=False)
    told: list[dict[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def opening(self) -> AsyncIterator[UsageLog]:
        if self.trouble:
            raise self.trouble
        self.opened += 1
        yield self.store

    async def start(self, habits: Habits = NEVER, *, always: bool = False) -> None:
        consumer = replace(accountant_consumer(), ack_wait=1.0)
        backlog = Backlog(self.own, consumer, Layout())
        self.books = Books(self.opening, backlog, habits, always=always, wanted=lambda: self.wanted)
        await self.books.start()
        self.stack.push_async_callback(self.books.stop)
        broker = brokers.broker(self.settings, "accountant")
        needs: dict[str, Any] = {"record": self.books.record, "by_day": self.books.by_day, "gate": self.books.gate}
        await accountant.build(broker, **needs, consumer=consumer, retry_seconds=0.05).start()
        self.stack.push_async_callback(broker.stop)

    async def tell(self, turn: str, tenant: str = "acme", **more: Any) -> None:
        """Let a caller tell the log that a call of *turn* ended."""
        now = time.time()
        facts = {"expert": "one", "branch": "main", "attempt": 1, "outcome": "stop", "started": now - 1, "ended": now}
        fact = ExpertCalled(turn=turn, **facts | {"prompt_tokens": 3, "completion_tokens": 5} | more)
        await self.say(fact.subject, fact.model_dump_json().encode(), tenant)

    async def say(self, subject: str, body: bytes, tenant: str = "acme") -> None:
        await self.caller.jetstream().publish(subject, body, headers={TENANT: tenant})

    async def ask(self, tenant: str | None = None, *, hours: float = 1) -> UsageListing:
        now = time.time()
        asked = ReadUsage(turn="R", tenant=tenant, since=now - hours * 3600, until=now + 60)
        return await replied(self.edge, asked, UsageListing, seconds=20, nobody="nobody is there")

    async def waiting(self) -> int:
        info = await self.admin.consumer_info(LOG, "accountant")
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)

    async def done(self) -> bool:
        return await self.waiting() == 0

    @property
    def turns(self) -> list[str]:
        return sorted(each.turn for each in self.store.kept.values())


@pytest.fixture
async def stand(broker: EmbeddedBroker, fleet_file: Path) -> AsyncIterator[Stand]:
    settings = settings_for(broker, fleet_file)
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:
        roles = ("provisioner", "caller", "edge", "accountant")
        admin, *clients = [await stack.enter_async_context(wiring.connected(settings, role)) for role in roles]
        yield Stand(settings, admin.jetstream(), *clients, await stack.enter_async_context(AsyncExitStack()))


@pytest.fixture
def logged() -> Any:
    with structlog.testing.capture_logs() as lines:
        yield lines


def said(logged: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in logged if line["event"] == event]


async def test_answers_are_summed_by_tenant_and_expert_and_those_who_gave_up_do_not_count(stand: Stand):
    await stand.start(always=True)
    await stand.tell("T1")
    await stand.tell("T2", expert="two", completion_tokens=7)
    await stand.tell("T2", outcome=f"{PASSED_ON}engine busy", completion_tokens=100)
    await stand.tell("T3", tenant="umbrella")
    every = await stand.ask()
    rows = [(day.tenant, day.expert, day.answers, day.prompt_tokens, day.completion_tokens) for day in every.days]
    assert rows == [("acme", "one", 1, 3, 5), ("acme", "two", 1, 3, 7), ("umbrella", "one", 1, 3, 5)]
    assert (every.waiting, every.more, every.refused) == (0, False, None)
    assert [day.tenant for day in (await stand.ask("umbrella")).days] == ["umbrella"]
    assert (await stand.ask("nobody")).days == ()


async def test_a_fact_that_comes_again_is_written_once(stand: Stand):
    stand.store.lost = 1
    await stand.start(always=True)
    await stand.tell("T1")
    await until(stand.done)
    assert (len(stand.store.statements), stand.turns) == (2, ["T1"])
    await stand.admin.delete_consumer(LOG, "accountant")  # and so the broker forgets what was acknowledged
    await until(lambda: len(stand.store.statements) > 2)
    await until(stand.done)
    assert stand.turns == ["T1"]


async def test_a_store_that_is_away_loses_nothing(stand: Stand, logged: list[dict[str, Any]]):
    stand.store.away = True
    await stand.start(always=True)
    for number in range(20):
        await stand.tell(f"T{number}")
    await until(lambda: said(logged, "fact_not_kept_yet"))
    assert (await stand.waiting(), stand.turns) == (20, [])
    stand.store.away = False
    await until(stand.done)
    assert len(stand.turns) == 20


async def test_who_asks_while_the_store_is_away_is_told(stand: Stand):
    stand.store.away = True
    await stand.start(replace(NEVER, drain=0.1))
    await stand.tell("T1")
    with pytest.raises(Refused) as told:
        await stand.ask()
    refused = told.value.refusal
    assert (refused.title, refused.status, refused.retryable) == ("store unavailable", 503, True)


async def test_what_waits_is_written_before_it_is_read_and_nothing_is_opened_for_it_until_then(stand: Stand):
    await stand.start()
    for number in range(300):
        await stand.tell(f"T{number}")
    await stand.books.look()
    assert (stand.opened, stand.turns, stand.books.facts()["waiting"]) == (0, [], 300)
    listing = await stand.ask()
    assert ([day.answers for day in listing.days], listing.waiting, stand.opened) == ([300], 0, 1)
    assert max(stand.store.statements) > 1, "many facts are one statement"
    await stand.tell("T300")
    assert [day.answers for day in (await stand.ask()).days] == [301]
    assert stand.opened == 1


async def test_the_store_is_opened_for_what_is_due_and_shut_when_nobody_needs_it(stand: Stand, logged: list[dict[str, Any]]):
    await stand.start(replace(NEVER, due=60))
    await stand.tell("T1")
    await stand.books.look()
    assert stand.opened == 0
    await stand.tell("T0", ended=time.time() - 3600)
    await stand.books.look()
    assert stand.opened == 0, "the one that came first counts"
    await stand.admin.purge_stream(LOG)
    await stand.tell("T2", ended=time.time() - 3000)
    await stand.books.look()
    assert stand.opened == 1
    assert [line["facts"] for line in said(logged, "usage_soon_forgotten")] == [1]
    await until(stand.done)
    await stand.books.look()
    assert (stand.turns, stand.books.facts()) == (["T2"], {"open": False, "waiting": 0, "written": 1})
    await stand.tell("T3")
    await stand.books.look()
    assert (stand.opened, await stand.waiting()) == (1, 1)


async def test_while_others_have_the_store_open_facts_are_written_at_once(stand: Stand):
    await stand.start()
    stand.wanted = True
    await stand.books.look()
    await stand.tell("T1")
    await until(lambda: stand.turns == ["T1"])
    await stand.books.look()
    assert stand.books.facts()["open"]
    stand.wanted = False
    await until(stand.done)
    await stand.books.look()
    assert not stand.books.facts()["open"]


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b'{"turn": "T", "prompt_tokens": "many"}'])
async def test_what_cannot_be_read_is_told_once_and_does_not_come_again(stand: Stand, logged: list[dict[str, Any]], body: bytes):
    await stand.start(replace(NEVER, due=60))
    await stand.say("cf.log.T1.caller", body)
    await stand.books.look()
    assert stand.opened == 1, "nobody knows how long it has waited"
    await stand.tell("T2")
    await until(stand.done)
    assert stand.turns == ["T2"]
    assert [line["subject"] for line in said(logged, "fact_rejected")] == ["cf.log.T1.caller"]


async def test_one_that_cannot_be_kept_spoils_no_other(stand: Stand, logged: list[dict[str, Any]]):
    await stand.start()
    await stand.tell("T1")
    await stand.tell("T2", completion_tokens=-1)
    await stand.tell("T3", expert="nul\0")
    await stand.tell("T4")
    listing = await stand.ask()
    assert ([day.answers for day in listing.days], listing.waiting, stand.turns) == ([2], 0, ["T1", "T4"])
    assert sorted(line["subject"] for line in said(logged, "fact_rejected")) == ["cf.log.T2.caller", "cf.log.T3.caller"]


async def test_what_the_log_forgot_meanwhile_is_told(stand: Stand, logged: list[dict[str, Any]]):
    await stand.start()
    for number in range(3):
        await stand.tell(f"T{number}")
    await stand.books.look()
    await stand.admin.purge_stream(LOG, subject="cf.log.T1.caller")
    await stand.books.look()
    assert [line["facts"] for line in said(logged, "usage_gone")] == [1]


async def test_a_store_that_cannot_be_opened_is_told_to_who_asks_and_tried_again(stand: Stand, logged: list[dict[str, Any]]):
    stand.trouble = CannotStart("the folder is not ours")
    await stand.start(replace(NEVER, due=0, look=0.01))
    await stand.tell("T1", ended=time.time() - 10)
    with pytest.raises(Refused) as told:
        await stand.ask()
    refused = told.value.refusal
    assert refused.detail == "the folder is not ours"
    await until(lambda: len(said(logged, "usage_waits")) > 1)
    stand.trouble = None
    await until(lambda: stand.turns == ["T1"])


async def test_who_still_writes_at_the_end_is_told_and_what_was_not_written_waits_for_the_next(stand: Stand):
    stand.store.away = True
    await stand.start(always=True)
    await stand.tell("T1")
    await stand.stack.aclose()
    assert await stand.waiting() == 1
    assert not stand.books.gate.is_open
    with pytest.raises(StoreUnavailable, match="not open"):
        await stand.books.record(Spent("a", "one", 1, 1, datetime.now(UTC), "T"))


async def test_the_end_comes_although_a_look_misses_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accounting, "LONG", 0.05)
    at_work = asyncio.Event()

    class Deaf(Backlog):
        def __init__(self) -> None:
            self.missed = 0

        async def count(self) -> int:
            at_work.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self.missed:
                    raise
                self.missed += 1
            return 0

    backlog = Deaf()
    books = Books(lambda: nullcontext(FakeUsage()), backlog, replace(NEVER, look=0))
    await books.start()
    await at_work.wait()
    await books.stop()
    assert (backlog.missed, books._looking is not None and books._looking.cancelled()) == (1, True)


async def test_a_broker_that_is_away_is_told(stand: Stand):
    backlog = Backlog(stand.own, accountant_consumer(), Layout())
    await stand.own.close()
    with pytest.raises(BrokerUnavailable):
        await backlog.count()


async def test_a_consumer_that_is_gone_is_made_anew_so_that_nothing_is_passed_over(stand: Stand):
    await stand.admin.delete_consumer(LOG, "accountant")
    await stand.tell("T1")
    assert await Backlog(stand.own, accountant_consumer(), Layout()).count() == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "usage has no place"),
        ({"knowledge": KnowledgeSettings(folder=Path("x")), "log": LogSettings(enabled=False)}, "CAPIBARA_LOG__ENABLED"),
        ({"knowledge": KnowledgeSettings(postgres="postgresql://h/d")}, ""),
        ({"knowledge": KnowledgeSettings(folder=Path("x"))}, ""),
    ],
)
async def test_where_no_usage_can_be_counted_it_is_said_why(
    broker: EmbeddedBroker, fleet_file: Path, settings: dict[str, Any], why: str
) -> None:
    chosen = settings_for(broker, fleet_file, **settings)
    told = wiring.uncounted(chosen)
    assert why in told
    assert bool(told) is bool(why)
    if why:
        with pytest.raises(CannotStart, match=why):
            async with wiring.worker_needs("accountant", chosen):
                await asyncio.sleep(0)
