"""The caller on a real broker, with an engine and answers that remember."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from capibara_flow import wiring
from capibara_flow.domain.answering import Account
from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy
from capibara_flow.ports import Finish, Text, ToolFragment
from capibara_flow.runtime import connection
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import Settings, WorkerSettings
from tests.conftest import settings_for
from tests.fakes import FakeAnswer, FakeAnswers, FakeEngine, spoken
from tests.waiting import until
from topics.chat import CallExpert, ChatRequest
from topics.output import Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage
from workers import caller

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
REQUEST = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], "model": "ex.pert"})
COMMAND = CallExpert(turn=TURN, expert="ex_pert", bucket=1, request=REQUEST)
ROUTED = Routed(turn=TURN, model_id="ex.pert", route_name="r", complexity="simple", confidence=1, reasoning="why")

pytestmark = pytest.mark.timeout(60)


@dataclass
class Stand:
    """A caller at work, and everything that is published around it."""

    settings: Settings
    client: Client
    stop: Callable[[], Awaitable[None]]
    heard: list[Msg] = field(default_factory=list)

    async def call(self, **headers: str) -> None:
        """Give the command; it is stored when this returns."""
        await self.client.jetstream().publish(COMMAND.subject, COMMAND.model_dump_json().encode(), headers=headers or None)

    async def until(self, subject: str) -> list[dict[str, Any]]:
        """The bodies published on subjects that begin so, once there are any."""
        return await until(lambda: [json.loads(each.data) for each in self.heard if each.subject.startswith(subject)])

    async def waiting(self) -> int:
        """How many messages the queue holds: work queues drop what was settled."""
        async with wiring.connected(self.settings, "observer") as observer:
            return (await observer.jetstream().stream_info("CF_WORK_CALL")).state.messages

    async def until_settled(self) -> None:
        """Return when the queue is empty."""

        async def settled() -> bool:
            return await self.waiting() == 0

        await until(settled)


Start = Callable[..., Awaitable[Stand]]


@pytest.fixture
async def start(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a caller with an engine and answers."""
    file = tmp_path / "fleet.toml"
    file.write_text('[[experts]]\nname = "ex.pert"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.01, max_deliver=3, graceful_seconds=1))
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:

        async def started(engine: FakeEngine, answers: FakeAnswers, expert: str = "ex_pert") -> Stand:
            observer = await stack.enter_async_context(wiring.connected(settings, "observer"))
            nats = connection.broker(settings, "caller")
            stand = Stand(settings, await stack.enter_async_context(wiring.connected(settings, "router")), nats.stop)

            async def hear(message: Msg) -> None:
                stand.heard.append(message)

            await observer.subscribe("cf.log.>", cb=hear)
            await observer.subscribe("cf.dead.>", cb=hear)
            await observer.flush()
            await nats.connect()
            needs = {"answers": answers, "consumers": wiring.expert_consumers(settings), "retry_seconds": 0.01}
            await caller.build(nats, engines={expert: engine}, clock=lambda: 5.0, **needs).start()
            stack.push_async_callback(nats.stop)
            return stand

        yield started


def texts(outputs: list[Output]) -> list[str]:
    return [output.text for output in outputs if isinstance(output, Token)]


async def test_an_answer_is_written_word_by_word_and_accounted_for(start: Start) -> None:
    engine, answers = FakeEngine(spoken("Hello", " there")), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    (event,) = await stand.until(f"cf.log.{TURN}.caller")
    await stand.until_settled()
    assert engine.requests == [REQUEST]
    assert engine.closings == 1
    assert [type(output) for output in answers.outputs] == [Token, Token, Usage, Done]
    assert texts(answers.outputs) == ["Hello", " there"]
    done = answers.outputs[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.model_id) == ("stop", "ex.pert")
    assert (event["outcome"], event["expert"], event["attempt"], event["completion_tokens"]) == ("stop", "ex.pert", 1, 2)
    assert answers.opened[0].finished


async def test_tool_calls_and_reasoning_pass_unchanged(start: Start) -> None:
    said = (Text(reasoning="hm"), ToolFragment(0, "id", "name", "{"), ToolFragment(0, arguments="}"), Finish("tool_calls"))
    answers = FakeAnswers()
    stand = await start(FakeEngine(said), answers)
    await stand.call()
    await stand.until_settled()
    assert answers.outputs[:3] == [
        Token(turn=TURN, reasoning="hm"),
        ToolCalled(turn=TURN, index=0, id="id", name="name", arguments="{"),
        ToolCalled(turn=TURN, index=0, arguments="}"),
    ]


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_fault_is_tried_again_and_what_was_said_is_taken_back(start: Start, after: int) -> None:
    engine = FakeEngine(spoken("a", "b"), error=EngineBroke("broke"), fails_after=after, times=1)
    answers = FakeAnswers([ROUTED])
    stand = await start(engine, answers)
    await stand.call()
    await stand.until_settled()
    outputs = answers.outputs
    assert len(answers.opened) == engine.closings == 2
    assert sum(isinstance(output, Reset) for output in outputs) == (1 if after else 0)
    start_anew = next((n for n, output in enumerate(outputs) if isinstance(output, Reset)), -1) + 1
    assert texts(outputs[start_anew:]) == ["a", "b"]
    usage = outputs[-2]
    assert isinstance(usage, Usage)
    assert (usage.attempts, usage.burnt_tokens) == (2, after)
    assert isinstance(outputs[-1], Done)


async def test_a_lasting_fault_ends_the_turn_with_its_reason(start: Start) -> None:
    engine, answers = FakeEngine(error=EngineBusy("too many")), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    (dead,) = await stand.until(f"cf.dead.{TURN}.caller")
    await stand.until_settled()
    assert len(engine.requests) == 3
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert (failed.title, failed.status, failed.retryable, failed.detail) == ("engine busy", 503, True, "too many")
    assert CallExpert.read(dead["body"].encode()) == COMMAND


async def test_what_the_engine_refuses_is_not_tried_again(start: Start) -> None:
    engine, answers = FakeEngine(error=BadRequest("no such parameter")), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    await stand.until(f"cf.dead.{TURN}")
    assert len(engine.requests) == 1
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 400


async def test_an_unforeseen_fault_tells_the_client_nothing_of_our_insides(start: Start) -> None:
    engine, answers = FakeEngine(error=ZeroDivisionError("secret detail")), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    await stand.until(f"cf.dead.{TURN}")
    assert len(engine.requests) == 3
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert failed.status == 500
    assert "secret" not in failed.detail


async def test_an_answer_that_is_complete_is_not_given_twice(start: Start) -> None:
    engine = FakeEngine()
    answers = FakeAnswers([Token(turn=TURN, text="all"), Done(turn=TURN, finish_reason="stop", model_id="ex.pert")])
    stand = await start(engine, answers)
    await stand.call()
    await stand.until_settled()
    assert engine.requests == []
    assert answers.outputs == []


async def test_a_predecessor_that_died_in_mid_answer_is_taken_back(start: Start) -> None:
    answers = FakeAnswers([ROUTED, Token(turn=TURN, text="half an")])
    stand = await start(FakeEngine(spoken("whole")), answers)
    await stand.call()
    await stand.until_settled()
    assert isinstance(answers.outputs[0], Reset)
    assert texts(answers.outputs) == ["whole"]


async def test_whoever_lost_the_lease_stops_the_engine_and_ends_nothing(start: Start) -> None:
    engine, answers = FakeEngine(spoken("a", "b", "c")), FakeAnswers(lose_after=1)
    stand = await start(engine, answers)
    await stand.call()
    await until(lambda: engine.closings == 1)
    await stand.stop()
    assert texts(answers.outputs) == ["a"]
    assert len(answers.opened) == 1
    assert await stand.waiting() == 1  # the new owner settles it; should he die, it comes again


async def test_a_cancelled_turn_ends_at_once_with_what_was_said(start: Start) -> None:
    engine, answers = FakeEngine(spoken("a", "b"), hangs_after=1), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    await until(engine.silent.is_set)
    answers.opened[0].cancel()
    (event,) = await stand.until(f"cf.log.{TURN}.caller")
    assert event["outcome"] == "cancelled"
    assert engine.closings == 1
    assert [type(output) for output in answers.outputs] == [Token, Usage, Done]
    usage, done = answers.outputs[-2:]
    assert isinstance(usage, Usage)
    assert isinstance(done, Done)
    assert (usage.completion_tokens, done.finish_reason) == (1, "cancelled")


async def test_a_turn_that_was_cancelled_while_it_waited_says_nothing(start: Start) -> None:
    engine, answers = FakeEngine(), FakeAnswers(cancelled=True)
    stand = await start(engine, answers)
    await stand.call()
    await stand.until_settled()
    assert [type(output) for output in answers.outputs] == [Usage, Done]
    assert engine.closings == len(engine.requests)


async def test_a_silent_engine_does_not_outlive_the_deadline(start: Start) -> None:
    engine, answers = FakeEngine(hangs_after=0), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call(**{"Cf-Deadline": "1.0"})
    await stand.until(f"cf.dead.{TURN}")
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert (failed.title, failed.status) == ("turn expired", 504)
    assert engine.closings == len(engine.requests)


async def test_an_expert_that_is_not_served_here_is_named(start: Start) -> None:
    answers = FakeAnswers()
    stand = await start(FakeEngine(), answers, expert="other")
    await stand.call()
    await stand.until(f"cf.dead.{TURN}")
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert (failed.status, failed.detail) == (404, "this caller does not serve ex_pert")


class Blocked(FakeAnswer):
    """Takes *most* outputs; whoever writes more waits for ever."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.full = asyncio.Event()
        self._most = most

    async def write(self, output: Output) -> None:
        if len(self.outputs) == self._most:
            self.full.set()
            await asyncio.Event().wait()
        await super().write(output)


def account() -> Account:
    return Account(turn=TURN, branch="main", expert="ex.pert", attempt=1, started=0.0, burnt=0)


@pytest.mark.parametrize("most", [0, 1, 100])
async def test_a_relay_that_is_cancelled_closes_the_engine_s_stream(most: int) -> None:
    engine, answer = FakeEngine(spoken("a", "b", "c"), hangs_after=3), Blocked(most)
    relay = asyncio.create_task(caller._relay(engine.stream(REQUEST), account(), answer, lambda: 5.0))
    await (engine.silent if most == 100 else answer.full).wait()
    assert engine.closings == 0
    relay.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay
    assert engine.closings == 1
    assert texts(answer.outputs) == ["a", "b", "c"][:most]


async def test_a_relay_that_is_cancelled_before_it_begins_asks_nobody(recwarn: pytest.WarningsRecorder) -> None:
    engine = FakeEngine()
    relay = asyncio.create_task(caller._relay(engine.stream(REQUEST), account(), FakeAnswer(), lambda: 5.0))
    relay.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay
    gc.collect()
    assert (engine.requests, engine.closings) == ([], 0)
    assert not recwarn.list


async def test_a_worker_that_is_stopped_lets_the_engine_go_and_leaves_the_turn_to_another(start: Start) -> None:
    engine, answers = FakeEngine(spoken("a", "b"), hangs_after=1), FakeAnswers()
    stand = await start(engine, answers)
    await stand.call()
    await engine.silent.wait()
    await stand.stop()
    assert engine.closings == 1
    assert texts(answers.outputs) == ["a"]
    assert await stand.waiting() == 1
    other = FakeEngine(spoken("whole"))
    stand = await start(other, answers)
    await stand.until_settled()
    assert [type(output) for output in answers.outputs] == [Token, Reset, Token, Usage, Done]
    assert texts(answers.outputs) == ["a", "whole"]
