"""What becomes of a work message: on a real broker, with the roles of nats.conf."""

import asyncio
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from faststream.nats.subscriber.usecases import PullStreamSubscriber
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError
from structlog.testing import capture_logs

from capibara_flow.errors import BadRequest, EngineBusy, LeaseLost
from capibara_flow.runtime import brokers
from capibara_flow.runtime.erasing import erase
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.pump import Pump
from capibara_flow.runtime.work import attempt, carried, deliveries, tenant, tries
from tests.runtime.rig import EXPERT, QUESTION, Rig
from tests.waiting import until
from topics.chat import CallExpert, ChatRequest, RouteTurn, TurnFailed
from topics.flow import hop
from topics.message import DEADLINE, PRINCIPAL, TENANT, TRACE
from topics.output import Done, Failed, Output, Reset, Routed, Token, Waiting
from topics.streams import Layout, caller_consumer, router_consumer

Deed = Callable[[Stage, RouteTurn], Awaitable[None]]


@dataclass
class Work:
    """A handler that does *deed*, and what it saw."""

    deed: Deed
    attempts: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def build(self, stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            self.attempts.append(attempt())
            self.times.append(time.monotonic())
            await self.deed(stage, command)

        return handle


async def nothing(stage: Stage, command: RouteTurn) -> None:
    """The work that is done at once."""


def raising(error: Exception, *, until_attempt: int = 99) -> Deed:
    async def deed(stage: Stage, command: RouteTurn) -> None:
        if attempt() < until_attempt:
            raise error

    return deed


async def outputs(rig: Rig, turn: str) -> list[Output]:
    return [output for batch in await rig.said(turn) for output in batch]


async def settled(rig: Rig) -> None:
    """Wait until the queue is empty."""

    async def empty() -> bool:
        return await rig.waiting() == 0

    await until(empty)


async def test_success_acknowledges(rig: Rig):
    work = Work(nothing)
    async with rig.routing(work.build):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1]
    assert await outputs(rig, "T1") == []
    assert await rig.dead("T1") == []


async def test_a_transient_error_brings_the_message_back_after_the_delay(rig: Rig):
    work = Work(raising(EngineBusy("later"), until_attempt=3))
    async with rig.routing(work.build, retry_seconds=0.3):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1, 2, 3]
    assert all(later - earlier >= 0.29 for earlier, later in zip(work.times, work.times[1:], strict=False))
    assert await outputs(rig, "T1") == []


def within(seconds: float) -> dict[str, str]:
    """The header of a turn that has so many seconds left."""
    return {DEADLINE: f"{time.time() + seconds:.3f}"}


async def test_with_time_left_a_transient_error_is_tried_again_here_and_costs_no_delivery(rig: Rig):
    seen: list[tuple[int, int]] = []

    async def deed(stage: Stage, command: RouteTurn) -> None:
        seen.append((deliveries(), tries()))
        if len(seen) < 8:
            raise EngineBusy("later")

    async with rig.routing(Work(deed).build, retry_seconds=0.05, max_deliver=2):
        await rig.ask("T1", headers=within(600))
        await settled(rig)
    assert seen == [(1, number) for number in range(8)]
    waits = [output for output in await outputs(rig, "T1") if isinstance(output, Waiting)]
    assert [(each.reason, each.attempt) for each in waits] == [("later", number) for number in range(3, 9)]  # the first try was at once
    assert await rig.dead("T1") == []


async def test_each_delivery_has_its_share_of_the_time_and_the_last_one_tells_the_reason(rig: Rig):
    seen: list[int] = []

    async def deed(stage: Stage, command: RouteTurn) -> None:
        seen.append(deliveries())
        raise EngineBusy("still busy")

    async with rig.routing(Work(deed).build, retry_seconds=0.1, max_deliver=2):
        await rig.ask("T1", headers=within(2))
        await settled(rig)
    assert set(seen) == {1, 2}
    assert min(seen.count(1), seen.count(2)) > 1
    failed = (await outputs(rig, "T1"))[-1]
    assert isinstance(failed, Failed)
    assert (failed.title, failed.detail) == ("engine busy", "still busy")


async def test_whoever_has_no_patience_leaves_the_next_try_to_others(rig: Rig):
    work = Work(raising(EngineBusy("later"), until_attempt=4))
    async with rig.routing(work.build, retry_seconds=0.05, patience_seconds=0):
        await rig.ask("T1", headers=within(600))
        await settled(rig)
    assert work.attempts == [1, 2, 3, 4]
    assert await outputs(rig, "T1") == []


async def test_a_lost_lease_is_not_fought_for(rig: Rig):
    work = Work(raising(LeaseLost("somebody else")))
    async with rig.routing(work.build):
        await rig.ask("T1", headers=within(600))
        await until(lambda: work.attempts)
    assert work.attempts == [1]


async def test_a_terminal_error_ends_the_turn(rig: Rig):
    work = Work(raising(BadRequest("no such thing")))
    async with rig.routing(work.build):
        await rig.ask("T1", headers={TENANT: "acme"})
        await settled(rig)
    assert work.attempts == [1]
    assert await outputs(rig, "T1") == [Failed(turn="T1", title="bad request", status=400, detail="no such thing")]
    [dead] = map(TurnFailed.read, await rig.dead("T1"))
    assert (dead.stage, dead.detail) == ("router", "no such thing")
    assert RouteTurn.model_validate_json(dead.body).request == QUESTION


NONSENSE = [b"{ no json", b"\xff\xfe", b"0", b'"text"', b"", b'{"turn": "T1"}', b'{"turn": "T1", "request": {}, "more": 1}', b"[]"]


@pytest.mark.parametrize("body", NONSENSE)
async def test_a_message_that_cannot_be_understood_ends_the_turn_and_never_reaches_the_handler(rig: Rig, body: bytes):
    work = Work(nothing)
    async with rig.routing(work.build):
        await rig.ask("T1", body)
        await settled(rig)
    assert work.attempts == []
    [failed] = await outputs(rig, "T1")
    assert isinstance(failed, Failed)
    assert (failed.status, failed.retryable) == (400, False)
    assert len(await rig.dead("T1")) == 1


async def test_an_unexpected_fault_is_tried_again_and_then_ends_the_turn(rig: Rig):
    work = Work(raising(RuntimeError("secret detail")))
    async with rig.routing(work.build, max_deliver=3, retry_seconds=0.05):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1, 2, 3]
    [failed] = await outputs(rig, "T1")
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.detail


async def test_a_fault_inside_a_handler_is_not_taken_for_a_bad_message(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        ChatRequest.model_validate({})

    work = Work(deed)
    async with rig.routing(work.build, max_deliver=2, retry_seconds=0.05):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1, 2]
    assert [output.status for output in await outputs(rig, "T1") if isinstance(output, Failed)] == [500]


async def test_the_last_transient_error_is_told_as_it_is(rig: Rig):
    work = Work(raising(EngineBusy("all seats are taken")))
    async with rig.routing(work.build, max_deliver=2, retry_seconds=0.05):
        await rig.ask("T1")
        await settled(rig)
    assert await outputs(rig, "T1") == [Failed(turn="T1", title="engine busy", status=503, detail="all seats are taken", retryable=True)]


async def test_a_message_that_kills_its_workers_ends_the_turn(rig: Rig):
    # Whoever takes it dies without a word: to the broker that is silence for longer than ack_wait.
    puller = await rig.client("router")
    work = Work(nothing)
    async with rig.routing(work.build, ack_wait=1, max_deliver=2):
        pass
    await rig.ask("T1")
    subscription = await puller.jetstream().pull_subscribe_bind("router", "CF_WORK_ROUTER")
    for _ in range(2):
        await subscription.fetch(1, timeout=20)
    async with rig.routing(work.build, ack_wait=1, max_deliver=2):
        await settled(rig)
    assert work.attempts == []
    [failed] = await outputs(rig, "T1")
    assert isinstance(failed, Failed)


async def test_whoever_lost_the_lease_leaves_the_message_to_the_new_owner(rig: Rig):
    work = Work(raising(LeaseLost("overtaken"), until_attempt=2))
    async with rig.routing(work.build, ack_wait=2, retry_seconds=0.01):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1, 2]
    assert work.times[1] - work.times[0] > 1.9  # not when it was lost, but when the new owner was silent for too long
    assert await outputs(rig, "T1") == []


@pytest.mark.parametrize("blocks", [True, False])
async def test_a_deadline_in_the_past_ends_the_turn(rig: Rig, blocks: bool):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        if blocks:
            await asyncio.sleep(60)

    work = Work(deed)
    async with rig.routing(work.build):
        await rig.ask("T1", headers={DEADLINE: f"{time.time() - 1:.3f}"})
        await settled(rig)
    [failed] = await outputs(rig, "T1")
    assert isinstance(failed, Failed)
    assert failed.status == 504
    assert work.attempts == []


async def test_a_deadline_cuts_work_short(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        await asyncio.sleep(60)

    work = Work(deed)
    async with rig.routing(work.build):
        await rig.ask("T1", headers={DEADLINE: f"{time.time() + 0.5:.3f}"})
        await settled(rig)
    assert work.attempts == [1]
    [failed] = await outputs(rig, "T1")
    assert isinstance(failed, Failed)
    assert failed.status == 504


async def test_a_timeout_of_the_work_itself_is_no_deadline(rig: Rig):
    work = Work(raising(TimeoutError("of something else"), until_attempt=2))
    async with rig.routing(work.build):
        await rig.ask("T1", headers={DEADLINE: f"{time.time() + 60:.3f}"})
        await settled(rig)
    assert work.attempts == [1, 2]


async def test_work_that_outlasts_ack_wait_is_done_once(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        await asyncio.sleep(2.5)

    work = Work(deed)
    async with rig.routing(work.build, ack_wait=1):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1]


async def test_say_refuses_what_the_map_does_not_list(rig: Rig):
    refused = []

    async def deed(stage: Stage, command: RouteTurn) -> None:
        for message in (Token(turn=command.turn, text="a"), Reset(turn=command.turn, reason="b"), command):
            try:
                await stage.say(message)
            except TypeError as error:
                refused.append(str(error))

    async with rig.routing(Work(deed).build):
        await rig.ask("T1")
        await settled(rig)
    assert len(refused) == 3
    assert "router may not say Token" in refused[0]


async def test_the_next_hop_is_stored_once_though_the_handler_runs_twice(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        await stage.say(CallExpert(turn=command.turn, expert="phi", bucket=1, request=command.request))
        if attempt() == 1:
            raise EngineBusy("after the deed")

    work = Work(deed)
    async with rig.routing(work.build):
        await rig.ask("T1")
        await settled(rig)
    assert work.attempts == [1, 2]
    assert await rig.waiting("CF_WORK_CALL") == 1


async def test_what_concerns_the_turn_is_carried_to_the_next_message(rig: Rig):
    given = {TENANT: "acme", PRINCIPAL: "ana", DEADLINE: f"{time.time() + 60:.3f}", TRACE: "00-a-b-01"}
    seen: dict[str, str] = {}

    async def deed(stage: Stage, command: RouteTurn) -> None:
        seen.update(carried(), tenant=tenant())
        await stage.say(CallExpert(turn=command.turn, expert="phi", bucket=1, request=command.request))

    async with rig.routing(Work(deed).build):
        await rig.ask("T1", headers={**given, "other": "stays behind"})
        await settled(rig)
    assert seen == {**given, "tenant": "acme"}
    message = await rig.admin.get_last_msg("CF_WORK_CALL", "cf.work.T1.call.phi.1")
    headers = message.headers or {}
    assert given.items() <= headers.items()
    assert "other" not in headers
    assert json.loads(message.data or b"")["request"]["messages"][0]["content"] == "hola"


async def test_a_full_queue_behind_us_is_told_at_once(rig: Rig):
    info = await rig.admin.stream_info("CF_WORK_CALL")
    info.config.max_msgs = 1
    await rig.admin.update_stream(info.config)
    await rig.call("T0")

    async def deed(stage: Stage, command: RouteTurn) -> None:
        await stage.say(CallExpert(turn=command.turn, expert="phi", bucket=1, request=command.request))

    work = Work(deed)
    async with rig.routing(work.build, max_deliver=2):
        await rig.ask("T1", headers=within(600))
        await settled(rig)
    assert work.attempts == [1]
    (failed,) = await outputs(rig, "T1")
    assert isinstance(failed, Failed)
    assert (failed.title, failed.status, failed.retryable) == ("queue full", 503, True)


async def test_what_opens_an_answer_is_not_said_into_one(rig: Rig):
    routed = Routed(turn="T1", model_id="phi", route_name="r", complexity="simple", confidence=1, reasoning="why")
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        await answer.finish(Done(turn="T1", finish_reason="cancelled", model_id=""))

    async def deed(stage: Stage, command: RouteTurn) -> None:
        await stage.say(routed.model_copy(update={"turn": command.turn}))

    async with rig.routing(Work(deed).build):
        await rig.ask("T1")
        await rig.ask("T2")
        await settled(rig)
    await hub.stop()
    assert [type(output) for output in await outputs(rig, "T1")] == [Done]
    assert [type(output) for output in await outputs(rig, "T2")] == [Routed]


@pytest.mark.parametrize("seconds", [600, 1.5])
async def test_whoever_slept_while_his_turn_was_erased_says_nothing_more(rig: Rig, seconds: float):
    undertaker, tried = await rig.client("undertaker"), 0

    async def deed(stage: Stage, command: RouteTurn) -> None:
        nonlocal tried
        tried += 1
        if tried == 2:
            await erase(undertaker, "T1", [stream.name for stream in Layout().streams], retry_seconds=0)
        await asyncio.sleep(max(0, 2 - seconds))  # till after the deadline, if that is soon
        raise EngineBusy("later")

    async with rig.routing(Work(deed).build, retry_seconds=0.05):
        await rig.ask("T1", headers=within(seconds))
        await until(lambda: tried == 2)
        await settled(rig)
    assert tried == 2
    assert await outputs(rig, "T1") == []
    assert await rig.dead("T1") == []


async def test_words_stay_out_of_the_log(rig: Rig):
    words = "-".join(["my", "secret", "words"])

    async def deed(stage: Stage, command: RouteTurn) -> None:
        RouteTurn.model_validate({"turn": "T1", "request": {"messages": words}})

    with capture_logs() as entries:
        async with rig.routing(Work(deed).build, max_deliver=1):
            await rig.ask("T1")
            await settled(rig)
    (entry,) = (each for each in entries if each["event"] == "work_failed")
    told = entry["error"] + "".join(traceback.format_exception(entry["exc_info"]))
    assert "validation error" in told
    assert words not in told


async def test_a_command_too_large_for_the_next_hop_ends_the_turn_without_harm_to_others(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        message = command.request.messages[0].model_copy(update={"content": "x" * (8 * 1024 * 1024 - 250)})
        await stage.say(CallExpert(turn=command.turn, expert="phi", bucket=1, request=ChatRequest(messages=(message,))))

    work = Work(deed)
    async with rig.routing(work.build) as stage:
        await rig.ask("T1")
        await settled(rig)
        assert stage._broker.config.connection_state.connection.stats["reconnects"] == 0
    assert work.attempts == [1]
    assert [output.status for output in await outputs(rig, "T1") if isinstance(output, Failed)] == [413]


async def test_giving_up_a_large_message_works_too(rig: Rig):
    work = Work(raising(BadRequest("too much")))
    body = RouteTurn(turn="T1", request=ChatRequest(messages=(QUESTION.messages[0].model_copy(update={"content": "\x01" * 160_000}),)))
    async with rig.routing(work.build):
        await rig.ask("T1", body.model_dump_json().encode())
        await settled(rig)
    assert work.attempts == [1]
    assert len(await outputs(rig, "T1")) == 1
    assert len(await rig.dead("T1")) == 1


async def test_stopping_hands_late_work_to_another_worker_at_once(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        if len(work.attempts) == 1:
            await asyncio.sleep(600)

    work = Work(deed)
    async with rig.routing(work.build, ack_wait=60):
        await rig.ask("T1")
        await until(lambda: work.attempts)
    async with rig.routing(work.build, ack_wait=60), asyncio.timeout(20):
        await settled(rig)
    assert work.attempts == [1, 2]


async def test_stopping_lets_work_finish(rig: Rig):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        await asyncio.sleep(0.5)

    work = Work(deed)
    async with rig.routing(work.build):
        await rig.ask("T1")
        await until(lambda: work.attempts)
    await settled(rig)
    assert work.attempts == [1]


async def test_the_private_hooks_of_faststream_are_still_there(rig: Rig):
    # Our pump takes the place of FastStream's own loop: when this fails, FastStream changed and `_pump_instead` must follow.
    assert callable(PullStreamSubscriber._create_subscription)
    broker = brokers.broker(rig.settings, "router")
    stage = Stage(broker, hop("router"), await rig.answers())

    async def handle(command: RouteTurn) -> None:
        pass

    stage.takes(router_consumer(), permits=3)(handle)
    [subscriber] = broker.subscribers
    assert type(subscriber) is PullStreamSubscriber
    assert (
        subscriber._create_subscription.__func__ is not PullStreamSubscriber._create_subscription
        if hasattr(subscriber._create_subscription, "__func__")
        else True
    )
    await broker.start()
    try:
        assert isinstance(subscriber.subscription, Pump)
        assert subscriber.running
        assert not subscriber.tasks
    finally:
        await broker.stop()
    assert subscriber.subscription is None


@pytest.mark.parametrize("logged", [True, False])
async def test_a_queue_that_disappears_comes_back_as_this_installation_wants_it(rig: Rig, logged: bool):
    work = Work(nothing)
    async with rig.routing(work.build, layout=Layout(log=logged)):
        await rig.admin.delete_stream("CF_WORK_ROUTER")

        async def back() -> StreamConfig | None:
            with suppress(NotFoundError):
                return (await rig.admin.stream_info("CF_WORK_ROUTER")).config
            return None

        config = await until(back)
    assert (config.republish is not None) == logged


@pytest.mark.parametrize("lost", ["CF_OUT", "CF_CTL"])
async def test_a_turn_whose_output_has_no_stream_waits_until_there_is_one(rig: Rig, lost: str):
    async def deed(stage: Stage, command: RouteTurn) -> None:
        async with (await rig.answers()).open(command.turn, "main") as answer:
            await answer.finish(Done(turn=command.turn, finish_reason="stop", model_id="phi"))

    work = Work(deed)
    await rig.admin.delete_stream(lost)
    async with rig.routing(work.build, retry_seconds=0.05):
        await rig.ask("T1")
        await settled(rig)
        assert [type(each) for each in await outputs(rig, "T1")] == [Done]
    assert work.attempts == ([1, 2] if lost == "CF_OUT" else [1])


# --- whom to take from, while running -----------------------------------------------------------------------------------


async def test_a_running_stage_takes_from_others_and_finishes_what_it_had(rig: Rig):
    first, second = EXPERT, caller_consumer("other")
    done: list[str] = []
    held, begun = asyncio.Event(), asyncio.Event()

    async def call(command: CallExpert) -> None:
        begun.set()
        if command.turn == "T1":
            await held.wait()
        done.append(f"{command.turn} {command.expert}")

    broker = brokers.broker(rig.settings, "caller")
    stage = Stage(broker, hop("caller"), await rig.answers(), retry_seconds=0)
    stage.takes(first, permits=1)(call)
    await broker.start()
    try:
        await rig.call("T1")
        await begun.wait()
        changing = asyncio.create_task(stage.take_only({second: 2}, lambda _: None, call))
        await rig.call("T3")
        await rig.call("T2", "other")
        await until(lambda: done == ["T2 other"])  # the new one is served while the old one ends
        held.set()
        await changing
        await until(lambda: done == ["T2 other", "T1 phi"])
        await stage.take_only({first: 1, second: 2}, lambda _: None, call)
        await until(lambda: done[2:] == ["T3 phi"])
        await stage.take_only({first: 1, second: 2}, lambda _: None, call)  # nothing changes
        await rig.call("T4", "other")
        await until(lambda: done[3:] == ["T4 other"])
    finally:
        held.set()
        await broker.stop()
