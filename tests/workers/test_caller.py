"""The caller on a real broker, with an engine and answers that remember."""

import asyncio
import gc
import json
import time
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
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy, EngineUnreachable
from capibara_flow.ports import Abilities, Finish, Text, ToolFragment
from capibara_flow.runtime import brokers
from capibara_flow.runtime.cache import AnswerCache
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.output import stored
from capibara_flow.runtime.recalling import Recall
from capibara_flow.settings import AnswersSettings, Settings, WorkerSettings
from tests.conftest import settings_for
from tests.fakes import FakeAnswer, FakeAnswers, FakeEngine, spoken
from tests.waiting import until
from topics.chat import CallExpert, ChatRequest, Sampling
from topics.message import DEADLINE, TENANT
from topics.output import Continued, Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage
from workers import caller
from workers.caller import handed_over

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
REQUEST = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], "model": "ex.pert"})
COMMAND = CallExpert(turn=TURN, expert="ex_pert", bucket=0, request=REQUEST)
HALF = Token(turn=TURN, text="half")
TOMORROW = {DEADLINE: f"{time.time() + 86_400:.3f}"}
ROUTED = Routed(turn=TURN, model_id="ex.pert", route_name="r", complexity="simple", confidence=1, reasoning="why")

KEPT = AnswersSettings(age_seconds=60)

pytestmark = pytest.mark.timeout(60)


@dataclass
class Stand:
    """A caller at work, and everything that is published around it."""

    settings: Settings
    client: Client
    stop: Callable[[], Awaitable[None]]
    heard: list[Msg] = field(default_factory=list)

    async def call(self, command: CallExpert = COMMAND, **headers: str) -> None:
        """Give the command; it is stored when this returns."""
        await self.client.jetstream().publish(command.subject, command.model_dump_json().encode(), headers=headers or None)

    async def until(self, subject: str) -> list[dict[str, Any]]:
        """The bodies published on subjects that begin so, once there are any."""
        return await until(lambda: [json.loads(each.data) for each in self.heard if each.subject.startswith(subject)])

    async def logged(self) -> list[dict[str, Any]]:
        """The facts that the log keeps of calls."""
        async with wiring.connected(self.settings, "observer") as observer:
            return [json.loads(each.data) for each in await stored(observer, f"cf.log.{TURN}.caller", 0, "CF_LOG")]

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
    experts = [f'[[experts]]\nname = "{name}"\nurls = ["http://127.0.0.1:9"]\n' for name in ("ex.pert", "other")]
    file.write_text("".join(experts), encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.01, max_deliver=3, graceful_seconds=1), answers=KEPT)
    await wiring.apply_streams(settings)
    async with AsyncExitStack() as stack:

        async def started(
            engine: FakeEngine,
            answers: FakeAnswers,
            expert: str = "ex_pert",
            others: dict[str, FakeEngine] | None = None,
            retry_seconds: float = 0.01,
            *,
            cache: bool = False,
        ) -> Stand:
            observer = await stack.enter_async_context(wiring.connected(settings, "observer"))
            nats = brokers.broker(settings, "caller")
            stand = Stand(settings, await stack.enter_async_context(wiring.connected(settings, "router")), nats.stop)

            async def hear(message: Msg) -> None:
                stand.heard.append(message)

            await observer.subscribe("cf.log.>", cb=hear)
            await observer.subscribe("cf.dead.>", cb=hear)
            await observer.subscribe("cf.out.>", cb=hear)
            await flushed(observer)
            await nats.connect()
            needs = {"answers": answers, "consumers": wiring.expert_consumers(settings), "retry_seconds": retry_seconds}
            if cache:
                kept = AnswerCache(await stack.enter_async_context(wiring.connected(settings, "caller")))
                needs["recall"] = Recall(kept, settings.experts.find, warmest=0.1)
            await caller.build(nats, engines={expert: engine, **(others or {})}, clock=lambda: 5.0, **needs).start()
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


@pytest.mark.parametrize("headers", [{}, TOMORROW], ids=["delivered again", "tried again"])
@pytest.mark.parametrize("after", [0, 1, 2])
async def test_after_a_fault_an_engine_that_repeats_itself_is_heard_once(start: Start, after: int, headers: dict[str, str]) -> None:
    engine = FakeEngine(spoken("a", "b"), error=EngineBroke("broke"), fails_after=after, times=1)
    answers = FakeAnswers([ROUTED])
    stand = await start(engine, answers)
    await stand.call(**headers)
    await stand.until_settled()
    outputs = answers.outputs
    assert len(answers.opened) == engine.closings == 2
    assert all(answer.finished for answer in answers.opened)  # what was made before the fault is not lost
    assert not any(isinstance(output, Reset) for output in outputs)
    assert [output.how for output in outputs if isinstance(output, Continued)] == (["skip"] if after else [])
    assert texts(outputs) == ["a", "b"]
    usage = outputs[-2]
    assert isinstance(usage, Usage)
    assert (usage.attempts, usage.completion_tokens, usage.burnt_tokens) == (2, 2, 2 + after)
    assert isinstance(outputs[-1], Done)


async def test_an_engine_that_can_goes_on_from_the_very_words(start: Start) -> None:
    engine, answers = FakeEngine(spoken(" an", " answer"), abilities=Abilities(prefill=True, max_tokens=9)), FakeAnswers([ROUTED, HALF])
    stand = await start(engine, answers)
    await stand.call()
    (event,) = await stand.until(f"cf.log.{TURN}.caller")
    assert [(message.role, message.text) for message in engine.requests[0].messages] == [("user", "hello"), ("assistant", "half")]
    assert engine.requests[0].sampling.max_tokens == 8
    assert answers.outputs[:2] == [Continued(turn=TURN, how="prefill", expert="ex.pert", attempt=2), Token(turn=TURN, text=" an")]
    assert (event["continued"], event["completion_tokens"], event["burnt_tokens"]) == ("prefill", 3, 3)


async def test_an_answer_as_long_as_it_may_be_needs_no_engine_to_end(start: Start) -> None:
    engine, answers = FakeEngine(abilities=Abilities(prefill=True, max_tokens=1)), FakeAnswers([ROUTED, HALF])
    stand = await start(engine, answers)
    await stand.call()
    await stand.until_settled()
    done = answers.outputs[-1]
    assert isinstance(done, Done)
    assert (engine.requests, texts(answers.outputs), done.finish_reason) == ([], [], "length")


async def test_an_engine_that_refuses_to_go_on_says_all_again(start: Start) -> None:
    engine = FakeEngine(
        spoken("half", " an"), abilities=Abilities(prefill=True), error=BadRequest("prefill is incompatible with thinking"), times=1
    )
    answers = FakeAnswers([ROUTED, HALF])
    stand = await start(engine, answers)
    await stand.call()
    await stand.until_settled()
    assert [len(request.messages) for request in engine.requests] == [2, 1]
    assert [type(output) for output in answers.outputs] == [Continued, Token, Usage, Done]
    assert texts(answers.outputs) == [" an"]


def passing(command: CallExpert) -> tuple[str, str | None, tuple[str, ...], int]:
    return command.expert, command.request.model, command.alternatives, command.passed


def test_a_call_goes_round() -> None:
    first = COMMAND.model_copy(update={"alternatives": ("other one", "third")})
    second = caller.passed_on(first)
    assert passing(second) == ("other_one", "other one", ("third", "ex.pert"), 1)
    assert passing(caller.passed_on(caller.passed_on(second))) == ("ex_pert", "ex.pert", ("other one", "third"), 3)
    assert second.dedupe != first.dedupe


async def test_the_next_expert_goes_on_when_one_is_out_of_reach(start: Start) -> None:
    down = FakeEngine(spoken("half"), error=EngineUnreachable("down"), fails_after=1)
    up, answers = FakeEngine(spoken("half", " an"), abilities=Abilities()), FakeAnswers([ROUTED])
    stand = await start(down, answers, others={"other": up})
    await stand.call(COMMAND.model_copy(update={"alternatives": ("other",)}), **TOMORROW)
    await until(lambda: answers.outputs and answers.outputs[-1].final)
    await stand.until_settled()
    assert (len(down.requests), len(up.requests), up.requests[0].model) == (1, 1, "other")
    assert texts(answers.outputs) == ["half", " an"]
    done = answers.outputs[-1]
    assert isinstance(done, Done)
    assert done.model_id == "other"
    events = await stand.logged()
    assert [(event["expert"], event["outcome"]) for event in events] == [("ex.pert", "passed on: engine unreachable"), ("other", "stop")]
    assert [event["attempt"] for event in events] == [1, 2]


async def test_experts_that_are_all_out_of_reach_are_asked_in_turn_and_the_client_told(start: Start) -> None:
    engines = [FakeEngine(error=EngineUnreachable(f"{name} is down")) for name in ("ex.pert", "other")]
    answers = FakeAnswers([ROUTED])
    stand = await start(engines[0], answers, others={"other": engines[1]}, retry_seconds=0.3)
    await stand.call(COMMAND.model_copy(update={"alternatives": ("other",)}), **{DEADLINE: f"{time.time() + 4:.3f}"})
    await stand.until(f"cf.dead.{TURN}")
    assert min(len(engine.requests) for engine in engines) > 1
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert failed.title == "engine unreachable"
    reasons = {json.loads(each.data)["reason"] for each in stand.heard if each.subject == f"cf.out.{TURN}.data.main"}
    assert reasons <= {"ex.pert is down", "other is down"}
    assert reasons
    attempts = [event["attempt"] for event in await stand.logged()]
    assert attempts == list(range(1, len(attempts) + 1))


async def test_an_engine_that_comes_back_before_the_deadline_is_waited_for(start: Start) -> None:
    engine, answers = FakeEngine(spoken("a"), error=EngineUnreachable("it is down"), times=5), FakeAnswers([ROUTED])
    stand = await start(engine, answers)
    await stand.call(**TOMORROW)
    await stand.until_settled()
    assert len(engine.requests) == 6
    assert texts(answers.outputs) == ["a"]
    told = [json.loads(each.data) for each in stand.heard if each.subject == f"cf.out.{TURN}.data.main"]
    assert {(each["event"], each["reason"]) for each in told} == {("waiting", "it is down")}


async def test_an_engine_that_does_not_come_back_ends_the_turn_before_the_deadline(start: Start) -> None:
    engine, answers = FakeEngine(error=EngineUnreachable("it is down")), FakeAnswers()
    stand = await start(engine, answers, retry_seconds=1)
    await stand.call(**{DEADLINE: f"{time.time() + 4:.3f}"})
    await stand.until(f"cf.dead.{TURN}.caller")
    failed = answers.outputs[-1]
    assert isinstance(failed, Failed)
    assert (failed.title, failed.detail) == ("engine unreachable", "it is down")


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


async def test_a_predecessor_that_said_something_else_is_taken_back(start: Start) -> None:
    answers = FakeAnswers([ROUTED, HALF])
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
    assert engine.requests == []


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
    assert (failed.status, failed.detail) == (404, "ex.pert is not served any more")


class Blocked(FakeAnswer):
    """Takes *most* outputs; whoever writes more waits for ever."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.full = asyncio.Event()
        self._most = most

    async def write(self, *outputs: Output) -> None:
        if len(self.outputs) == self._most:
            self.full.set()
            await asyncio.Event().wait()
        await super().write(*outputs)


def account() -> Account:
    return Account(turn=TURN, branch="main", expert="ex.pert", attempt=1, started=0.0)


@pytest.mark.parametrize("most", [0, 1, 100])
async def test_a_relay_that_is_cancelled_closes_the_engine_s_stream(most: int) -> None:
    engine, answer = FakeEngine(spoken("a", "b", "c"), hangs_after=3), Blocked(most)
    relay = asyncio.create_task(caller.relay(engine.stream(REQUEST), account(), answer, lambda: 5.0))
    await (engine.silent if most == 100 else answer.full).wait()
    assert engine.closings == 0
    relay.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay
    assert engine.closings == 1
    assert texts(answer.outputs) == ["a", "b", "c"][:most]


async def test_a_relay_that_is_cancelled_before_it_begins_asks_nobody(recwarn: pytest.WarningsRecorder) -> None:
    engine = FakeEngine()
    relay = asyncio.create_task(caller.relay(engine.stream(REQUEST), account(), FakeAnswer(), lambda: 5.0))
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


# --- answers that are given again ---------------------------------------------------------------------------------------


def cold(turn: str = TURN, *, tools: bool = False, temperature: float = 0.0) -> CallExpert:
    tool = {"type": "function", "function": {"name": "clock"}}
    update = {"sampling": Sampling(temperature=temperature), "tools": (tool,) if tools else ()}
    return COMMAND.model_copy(update={"turn": turn, "request": REQUEST.model_copy(update=update)})


def another(tenant: str = "t") -> str:
    return turn_id(milliseconds=2, entropy=bytes(10), tenant=tenant)


async def test_the_same_question_again_is_answered_without_the_engine_and_marked(start: Start) -> None:
    engine, answers = FakeEngine(spoken("Hello", " there")), FakeAnswers()
    stand = await start(engine, answers, cache=True)
    for turn in (TURN, another()):
        await stand.call(cold(turn), **{TENANT: "acme"})
        await stand.until_settled()
    first, second = (answer.outputs for answer in answers.opened)
    assert len(engine.requests) == 1
    assert "".join(texts(second)) == "".join(texts(first)) == "Hello there"
    (_, once), (usage, done) = first[-2:], second[-2:]
    assert isinstance(once, Done)
    assert once.cached is None
    assert isinstance(done, Done)
    assert (done.cached, done.finish_reason) == (True, "stop")
    assert isinstance(usage, Usage)
    assert (usage.completion_tokens, usage.burnt_tokens) == (2, 0)
    told = [json.loads(each.data)["cached"] for each in stand.heard if each.subject.startswith("cf.log.") and "caller" in each.subject]
    assert told == [False, True]


@pytest.mark.parametrize(
    ("again", "tenant"),
    [(cold(another()), "other"), (cold(another(), tools=True), "acme"), (cold(another(), temperature=0.5), "acme")],
    ids=["another tenant", "tools", "too warm"],
)
async def test_what_is_not_the_same_or_may_differ_is_asked_anew(start: Start, again: CallExpert, tenant: str) -> None:
    engine = FakeEngine(spoken("Hello"), abilities=Abilities(tools=True))
    stand = await start(engine, FakeAnswers(), cache=True)
    await stand.call(cold(), **{TENANT: "acme"})
    await stand.until_settled()
    await stand.call(again, **{TENANT: tenant})
    await stand.until_settled()
    assert len(engine.requests) == 2


async def test_an_answer_that_broke_or_was_cut_is_not_kept(start: Start) -> None:
    engine = FakeEngine((Text("Hel"), Finish("length")))
    stand = await start(engine, FakeAnswers(), cache=True)
    for turn in (TURN, another()):
        await stand.call(cold(turn), **{TENANT: "acme"})
        await stand.until_settled()
    assert len(engine.requests) == 2


async def test_without_a_cache_the_engine_is_asked_each_time(start: Start) -> None:
    engine = FakeEngine(spoken("Hello"))
    stand = await start(engine, FakeAnswers())
    for turn in (TURN, another()):
        await stand.call(cold(turn))
        await stand.until_settled()
    assert len(engine.requests) == 2


# --- a fleet that changes -----------------------------------------------------------------------------------------------


async def test_what_waits_for_an_expert_that_is_gone_goes_to_the_next_and_never_back(start: Start) -> None:
    engine, answers = FakeEngine(spoken("Hello")), FakeAnswers()
    stand = await start(engine, answers, expert="other")
    await stand.call(COMMAND.model_copy(update={"alternatives": ("other", "third")}))
    (event,) = await stand.until(f"cf.log.{TURN}.caller")
    assert (event["expert"], event["outcome"]) == ("other", "stop")
    assert handed_over(COMMAND.model_copy(update={"alternatives": ("other", "third")})).alternatives == ("third",)
