"""The undertaker on a real broker: it ends what nobody else ends, and tells when turns are abandoned."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capibara_flow import wiring
from capibara_flow.domain.turns import turn_id
from capibara_flow.runtime import brokers
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.client import TokenClient, flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.output import last_message, stored
from capibara_flow.settings import Settings
from tests.conftest import settings_for
from tests.waiting import until
from topics.chat import EXPIRED, CancelTurn, EraseTurn
from topics.output import Done, Failed, Output, Token, Usage, parse
from topics.streams import READERS, Layout, reader_key
from workers import undertaker

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
WORD = Token(turn=TURN, text="word")

pytestmark = pytest.mark.timeout(60)


@dataclass
class Stand:
    """A provisioned broker and its clients."""

    settings: Settings
    stack: AsyncExitStack
    edge: TokenClient

    async def undertaker(self, **needs: Any) -> AsyncExitStack:
        """One undertaker; close what is returned to stop it."""
        stack = AsyncExitStack()
        nats = brokers.broker(self.settings, "undertaker")
        own = await stack.enter_async_context(wiring.worker_needs("undertaker", self.settings))
        await undertaker.build(nats, **own | needs).start()
        stack.push_async_callback(nats.stop)
        self.stack.push_async_callback(stack.aclose)
        return stack

    @asynccontextmanager
    async def answers(self) -> AsyncIterator[FencedAnswers]:
        """A caller's pen."""
        async with wiring.connected(self.settings, "caller") as client:
            hub = FencedAnswers(client, "test")
            await hub.start()
            yield hub
            await hub.stop()

    async def cancel(self, reason: str = "asked") -> None:
        """Let the door stop the turn."""
        signal = CancelTurn(turn=TURN, reason=reason)
        await self.edge.jetstream().publish(signal.subject, signal.model_dump_json().encode())

    async def said(self) -> list[Output]:
        """All output of the turn."""
        return [parse(line) for each in await stored(self.edge, f"cf.out.{TURN}.data.main", 0) for line in each.data.split(b"\n")]

    async def until_ended(self) -> list[Output]:
        """All output of the turn, once its last word has been said."""

        async def ended() -> list[Output]:
            said = await self.said()
            return said if said and said[-1].final else []

        return await until(ended)

    async def settled(self) -> None:
        """Return when undertakers have nothing left to look at."""
        async with wiring.connected(self.settings, "observer") as observer:
            jetstream = observer.jetstream()

            async def idle() -> bool:
                found = [await jetstream.consumer_info(stream, "undertaker") for stream in ("CF_CTL", READERS)]
                return all(not info.num_pending and not info.num_ack_pending for info in found)

            await until(idle)

    async def reads(self, seconds: int) -> None:
        """Let a door say that somebody reads the turn."""
        await self.edge.publish(reader_key(TURN), b"", headers={"Nats-TTL": f"{seconds}s"})
        await flushed(self.edge)

    async def gone(self) -> None:
        """Return when the broker has marked that nobody reads the turn."""

        async def marked() -> bool:
            found = await last_message(self.edge, reader_key(TURN), READERS)
            return found is not None and b"Nats-Marker-Reason" in found.headers

        await until(marked)


@pytest.fixture
async def stand(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[Stand]:
    file = tmp_path / "fleet.toml"
    file.write_text('[[experts]]\nname = "phi"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    settings = settings_for(broker, file)
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:
        yield Stand(settings, stack, await stack.enter_async_context(wiring.connected(settings, "edge")))


async def test_a_cancelled_turn_that_nobody_works_on_is_ended(stand: Stand) -> None:
    await stand.undertaker()
    await stand.cancel()
    usage, done = await stand.until_ended()
    assert isinstance(usage, Usage)
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"


async def test_a_turn_whose_time_is_up_fails(stand: Stand) -> None:
    await stand.undertaker()
    await stand.cancel(EXPIRED)
    (failed,) = await stand.until_ended()
    assert isinstance(failed, Failed)
    assert failed.status == 504


async def test_a_cancellation_that_came_before_the_undertaker_is_heard(stand: Stand) -> None:
    await stand.cancel()
    await stand.undertaker()
    await stand.until_ended()


async def test_whoever_ends_his_turn_himself_is_left_in_peace(stand: Stand) -> None:
    await stand.undertaker(grace_seconds=3)
    async with stand.answers() as answers, answers.open(TURN, "main") as answer:
        asked = asyncio.create_task(stand.cancel())
        async with answer.until_cancelled():
            await asyncio.Event().wait()
        await asked
        await answer.finish(WORD, Done(turn=TURN, finish_reason="cancelled", model_id="himself"))
    await stand.settled()
    last = (await stand.said())[-1]
    assert isinstance(last, Done)
    assert last.model_id == "himself"


async def test_whoever_does_not_hear_is_fenced_off(stand: Stand) -> None:
    async with stand.answers() as answers, answers.open(TURN, "main") as answer:
        await answer.finish(WORD)
        await stand.undertaker(grace_seconds=0)
        await stand.cancel()
        word, usage, done = await stand.until_ended()
        assert word == WORD
        assert isinstance(usage, Usage)
        assert usage.completion_tokens == 1
        with pytest.raises(Exception, match="taken over"):
            await answer.finish(WORD)
    assert (await stand.said())[-1] == done


async def test_an_end_is_the_end_though_something_was_said_behind_it(stand: Stand) -> None:
    async with stand.answers() as answers, answers.open(TURN, "main") as answer:
        await answer.finish(Done(turn=TURN, finish_reason="stop", model_id="phi"))
        await answers.client.jetstream().publish(f"cf.out.{TURN}.data.main", WORD.line())  # as a router does that was paused
    await stand.undertaker(grace_seconds=0)
    await stand.cancel()
    await stand.settled()
    assert [type(output) for output in await stand.said()] == [Done, Token]


async def test_a_turn_that_nobody_reads_any_more_is_stopped(stand: Stand) -> None:
    await stand.undertaker()
    await stand.reads(1)
    await stand.until_ended()


async def test_readers_that_left_while_no_undertaker_was_there_are_missed_later(stand: Stand) -> None:
    await stand.reads(1)
    await stand.gone()
    await stand.undertaker()
    await stand.until_ended()


async def test_a_reader_that_stays_or_comes_back_is_no_absence(stand: Stand) -> None:
    first = await stand.undertaker()
    await stand.reads(60)
    await stand.settled()
    await first.aclose()
    await stand.reads(1)
    await stand.gone()
    await stand.reads(60)
    await stand.undertaker()
    await stand.settled()
    async with wiring.connected(stand.settings, "observer") as observer:
        assert (await observer.jetstream().stream_info("CF_CTL")).state.messages == 0


async def test_a_signal_that_is_gone_was_of_an_erased_turn(stand: Stand) -> None:
    await stand.undertaker(grace_seconds=2)
    await stand.cancel()
    async with wiring.connected(stand.settings, "provisioner") as operator:
        await operator.jetstream().purge_stream("CF_CTL", subject=f"cf.ctl.{TURN}.cancel")
    await stand.settled()
    assert await stand.said() == []


async def test_a_request_to_erase_is_replied_to_by_one(stand: Stand) -> None:
    erased: list[str] = []

    async def erase(turn: str) -> int:
        erased.append(turn)
        return 7

    for _ in range(2):
        await stand.undertaker(erase=erase)
    request = EraseTurn(turn=TURN)
    reply = await stand.edge.request(
        request.subject, request.model_dump_json().encode(), timeout=10, headers={"content-type": "application/json"}
    )
    assert json.loads(reply.data) == {"messages": 7}
    assert erased == [TURN]


def test_its_streams_are_in_every_layout() -> None:
    names = {stream.name for stream in Layout(log=False).streams}
    assert {"CF_CTL", READERS} <= names
