"""Erasing turns: afterwards no stream has anything of them, whoever worked on them; other turns are as they were."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from capibara_flow.errors import BadRequest, BrokerUnavailable, LeaseLost, TurnUnknown
from capibara_flow.ports import Batch, Feed
from capibara_flow.runtime import brokers, erasing
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.erasing import erase
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import Rig, line
from tests.waiting import until
from topics.chat import CancelTurn, Decision, RouteTurn, TurnRouted
from topics.output import Done, Token
from topics.plan import Plan
from topics.streams import LANES, REPORTS, Layout, piece_subject, reader_key, undertaker_consumer
from workers import undertaker

pytestmark = pytest.mark.slow  # it waits until all is quiet for as long as somebody may sleep

STREAMS = [stream.name for stream in Layout().streams]
DONE = Done(turn="T1", finish_reason="cancelled", model_id="phi")


async def kept(rig: Rig, turn: str) -> dict[str, list[str]]:
    """What every stream of the broker has with *turn* in its subject."""
    found = {}
    for info in await rig.admin.streams_info():
        subjects = (await rig.admin.stream_info(info.config.name, subjects_filter=">")).state.subjects or {}
        if mine := [subject for subject in subjects if turn in subject.split(".")]:
            found[info.config.name] = mine
    return found


async def everywhere(rig: Rig, turn: str) -> None:
    """Something of *turn* in every stream, each said by who says such things."""
    edge, router, retriever, caller = [await rig.client(role) for role in ("edge", "router", "retriever", "caller")]
    done = DONE.model_copy(update={"turn": turn}).line()
    for client, subject, body in (
        (edge, f"cf.work.{turn}.router", b"{}"),
        (edge, reader_key(turn), b"{}"),
        (edge, f"$KV.CF_KEYS.abc123.{turn}", b"{}"),
        (edge, f"cf.ctl.{turn}.cancel", CancelTurn(turn=turn).model_dump_json().encode()),
        (edge, f"cf.work.{turn}.ingester", b"{}"),
        (edge, piece_subject(turn, 0), b"secret"),
        (router, f"cf.work.{turn}.retriever", b"{}"),
        (retriever, f"cf.join.{turn}.0.retriever", b"{}"),
        (router, f"cf.work.{turn}.call.phi.3", b"{}"),
        (router, f"cf.log.{turn}.router", b"{}"),
        (caller, f"cf.out.{turn}.lease.main", b"somebody"),
        (caller, f"cf.out.{turn}.data.main", Token(turn=turn, text="secret").line()),
        (caller, f"cf.out.{turn}.data.main", done),
        (caller, f"cf.dead.{turn}.caller", b"{}"),
    ):
        await client.jetstream().publish(subject, body)


@pytest.mark.parametrize("role", ["undertaker", "provisioner"])
async def test_nothing_of_a_turn_is_left_in_any_stream_and_all_of_another_one_is(rig: Rig, role: str):
    await everywhere(rig, "T1")
    await everywhere(rig, "T2")
    others = await kept(rig, "T2")
    assert sorted(await kept(rig, "T1")) == sorted(set(STREAMS) - {LANES, REPORTS})  # which tell nothing of turns
    gone = await erase(await rig.client(role), "T1", STREAMS)
    assert await kept(rig, "T1") == {}
    assert await kept(rig, "T2") == others
    assert gone == 17  # the fourteen but the signal, and the four copies of work in the log


async def test_a_turn_that_waits_in_a_queue_never_begins(rig: Rig):
    await rig.ask("T1")
    await rig.ask("T2")
    await erase(await rig.client("undertaker"), "T1", STREAMS)
    begun = []

    def build(stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            begun.append(command.turn)

        return handle

    async with rig.routing(build):
        await until(lambda: begun)
    assert begun == ["T2"]
    assert await kept(rig, "T1") == {}


def streaming(
    rig: Rig, ends: list[str], *, deaf_seconds: float = 0, first_seconds: float = 0, last_seconds: float = 0
) -> Callable[[Stage], Callable[[RouteTurn], Awaitable[None]]]:
    """A worker that speaks until it is stopped, says so and leaves a fact in the log; or says that its lease was taken from it.

    *deaf_seconds* pass before it takes its lease, *first_seconds* before its first word, *last_seconds* before its last one.
    """

    async def speak(stage: Stage, turn: str) -> None:
        async with stage._answers.open(turn, "main") as answer:
            await asyncio.sleep(first_seconds)
            async with answer.until_cancelled():
                for number in range(100_000):
                    await answer.write(Token(turn=turn, text=f"{number} "))
                    await asyncio.sleep(0.005)
            ends.append("stopped")
            await asyncio.sleep(last_seconds)
            await answer.finish(DONE)

    def build(stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            ends.append("began")
            await asyncio.sleep(deaf_seconds)
            try:
                await speak(stage, command.turn)
            except LeaseLost:
                ends.append("fenced off")
                raise
            await asyncio.sleep(0.05)
            decision = Decision(model_id="phi", route_name="r", complexity="simple", confidence=1, reasoning="")
            await stage.say(TurnRouted(turn=command.turn, decision=decision, plan=Plan(), started=0, ended=0))
            ends.append("ended")

        return handle

    return build


async def read(feed: Feed) -> list[Batch]:
    return [batch async for batches in feed for batch in batches]


async def test_a_turn_in_mid_stream_is_stopped_and_whoever_reads_it_hears_the_end(rig: Rig):
    ends: list[str] = []
    turns = NatsTurns(await rig.client("edge"), ())
    async with rig.routing(streaming(rig, ends, last_seconds=0.4)):
        await rig.ask("T1")
        await until(lambda: rig.tokens("T1"))
        feed = await turns.follow("T1")
        reading = asyncio.create_task(read(feed))
        await until(lambda: turns.facts()["streams_open"])
        gone = await erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=0.5)
        assert ends == ["began", "stopped", "ended"]
    heard = await asyncio.wait_for(reading, 40)
    assert heard[-1].final
    assert gone > 3
    assert await kept(rig, "T1") == {}


@pytest.mark.parametrize("first_seconds", [0, 0.6])  # in the second case the lease is swept up before the first word
async def test_who_paused_when_the_turn_was_stopped_finds_it_stopped_and_leaves_nothing(rig: Rig, first_seconds: float):
    ends: list[str] = []
    async with rig.routing(streaming(rig, ends, deaf_seconds=2.5, first_seconds=first_seconds)):
        await rig.ask("T1")
        await until(lambda: ends)
        await erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=1.5)
        assert ends in (["began", "stopped", "ended"], ["began", "stopped", "fenced off"])
    assert await kept(rig, "T1") == {}


async def test_who_heard_nothing_cannot_write_another_word(rig: Rig):
    deaf = await line(rig, "caller")
    hub = await rig.answers(deaf)
    deaf.overhear = lambda subject, headers, data, ear: None if subject.startswith(b"cf.ctl") else ear(subject, headers, data)
    async with hub.open("T1", "main") as answer:
        await answer.write(Token(turn="T1", text="secret"))
        await answer.finish()
        await erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=0)
        with pytest.raises(LeaseLost):
            await answer.finish(Token(turn="T1", text="more"), DONE)
    await flushed(deaf)
    assert await kept(rig, "T1") == {}


async def test_a_reader_who_renews_his_lease_while_we_erase_leaves_none(rig: Rig):
    await everywhere(rig, "T1")
    edge = await rig.client("edge")
    erasure = asyncio.create_task(erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=0.5))
    for _ in range(5):
        await edge.jetstream().publish(reader_key("T1"), b"{}")
        await asyncio.sleep(0.15)
    await erasure
    assert await kept(rig, "T1") == {}


async def test_dead_letters_go_too(rig: Rig):
    def build(stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            raise BadRequest("never")

        return handle

    async def letters() -> bool:
        return "CF_DEAD" in await kept(rig, "T1")

    async with rig.routing(build):
        await rig.ask("T1")
        await until(letters)
        await erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=0.2)
    assert await kept(rig, "T1") == {}


async def test_erasing_twice_or_what_never_was_is_fine(rig: Rig):
    client = await rig.client("undertaker")
    await everywhere(rig, "T1")
    assert await erase(client, "T1", STREAMS, retry_seconds=0) > 0
    assert await erase(client, "T1", STREAMS) == 0
    assert await kept(rig, "T1") == {}


async def test_without_a_log_there_is_only_less_to_erase(rig: Rig):
    await everywhere(rig, "T1")
    await rig.admin.delete_stream("CF_LOG")
    await erase(await rig.client("undertaker"), "T1", STREAMS, retry_seconds=0)
    assert await kept(rig, "T1") == {}


@pytest.mark.parametrize("turn", ["", "*", ">", "T1.>", "T*", "T 1"])
async def test_a_wildcard_erases_nobody(rig: Rig, turn: str):
    await everywhere(rig, "T1")
    before = await kept(rig, "T1")
    with pytest.raises(TurnUnknown):
        await erase(await rig.client("undertaker"), turn, STREAMS)
    assert await kept(rig, "T1") == before


async def test_a_turn_that_goes_on_coming_is_no_success(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(erasing, "_LIMIT", 1.0)
    edge, client = await rig.client("edge"), await rig.client("undertaker")

    async def stubborn() -> None:
        while True:
            await edge.jetstream().publish(reader_key("T1"), b"{}")
            await asyncio.sleep(0.02)

    reading = asyncio.create_task(stubborn())
    with pytest.raises(BrokerUnavailable, match="erase it again"):
        await erase(client, "T1", STREAMS)
    reading.cancel()


async def test_a_broker_that_is_away_is_told(rig: Rig):
    client = await rig.client("undertaker")
    await asyncio.to_thread(rig.broker.kill)
    with pytest.raises(BrokerUnavailable):
        await erase(client, "T1", STREAMS)
    await asyncio.to_thread(rig.broker.restart)


@asynccontextmanager
async def undertaking(rig: Rig) -> AsyncIterator[None]:
    """An undertaker at work for the length of a block."""
    broker, client = brokers.broker(rig.settings, "undertaker"), await rig.client("undertaker")
    hub = await rig.answers(client)
    undertaker.build(broker, answers=hub, erase=partial(erase, client, streams=STREAMS), consumer=undertaker_consumer(), grace_seconds=0.8)
    await broker.start()
    try:
        yield
    finally:
        await broker.stop()
        await hub.stop()


@pytest.mark.parametrize("ended", [True, False])
async def test_the_undertaker_who_is_just_told_to_stop_a_turn_does_not_bring_it_back(rig: Rig, ended: bool):
    async with undertaking(rig):
        if ended:
            await everywhere(rig, "T1")  # with a signal, that he looks after a moment later
            await rig.admin.purge_stream("CF_WORK_ROUTER")
            await rig.admin.purge_stream("CF_WORK_CALL")
        else:
            await rig.ask("T1")
        await erase(await rig.client("provisioner"), "T1", STREAMS, retry_seconds=0.5)
    # He stopped in order: whatever he had begun to do is done.
    assert await kept(rig, "T1") == {}
