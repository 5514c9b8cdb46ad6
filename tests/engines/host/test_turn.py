"""Turns through a caller whose experts are hosted, on a real broker."""

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from capibara_flow import wiring
from capibara_flow.domain.turns import turn_id
from capibara_flow.engines.host import ExpertHost
from capibara_flow.runtime import brokers
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import WorkerSettings
from tests.conftest import settings_for
from tests.engines.host.rig import Rig, gone
from tests.fakes import FakeAnswers
from tests.waiting import until
from topics.chat import CallExpert, ChatRequest
from topics.message import DEADLINE
from topics.output import Continued, Done, Loading, Output, Token
from workers import caller

TURN = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
FLEET = "".join(f'[[experts]]\nname = "{name}"\nweights = "none.gguf"\nlaunch = {{engine = "llama_server"}}\n' for name in ("one", "two"))


def command(turn: str, expert: str) -> CallExpert:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], "model": expert})
    return CallExpert(turn=turn, expert=expert, bucket=0, request=request)


@asynccontextmanager
async def calling(broker: EmbeddedBroker, folder: Path, host: ExpertHost, rig: Rig, answers: FakeAnswers) -> AsyncIterator[TokenClient]:
    """A caller with the experts of *host*; gives a connection to ask it by."""
    file = folder / "fleet.toml"
    file.write_text(FLEET, encoding="utf-8")
    settings = settings_for(broker, file, worker=WorkerSettings(retry_seconds=0.1, graceful_seconds=1))
    await wiring.apply_streams(settings)
    async with wiring.connected(settings, "router") as client:
        nats = brokers.broker(settings, "caller")
        await nats.connect()
        engines = {name: host.engine(rig.expert(name, words=30, pace=0.02)) for name in ("one", "two")}
        consumers = wiring.expert_consumers(settings)
        await caller.build(nats, engines=engines, answers=answers, consumers=consumers, retry_seconds=0.1).start()
        try:
            yield client
        finally:
            await nats.stop()
            await host.aclose()


async def ask(client: TokenClient, asked: CallExpert) -> None:
    headers = {DEADLINE: f"{time.time() + 600:.3f}"}
    await client.jetstream().publish(asked.subject, asked.model_dump_json().encode(), headers=headers)


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, Token))


async def test_a_turn_tells_that_it_waits_and_goes_on_when_its_engine_is_killed(broker: EmbeddedBroker, tmp_path: Path) -> None:
    rig, answers = Rig(tmp_path), FakeAnswers()
    host = rig.host(crash_base_s=0.05)
    async with calling(broker, tmp_path, host, rig, answers) as client:
        await ask(client, command(TURN, "one"))
        await until(lambda: sum(isinstance(each, Token) for each in answers.outputs) >= 4)
        os.kill(rig.pids()[0], signal.SIGKILL)
        done = await until(lambda: [each for each in answers.outputs if isinstance(each, Done)])
    assert answers.outputs[0] == Loading(turn=TURN, expert="one")
    assert text(answers.outputs) == "one says" + "".join(f" {number}" for number in range(30))
    assert [each.how for each in answers.outputs if isinstance(each, Continued)] == ["prefill"]
    # Killed, it was loaded again, and that was told as well, in the middle of the text.
    begun = next(place for place, each in enumerate(answers.outputs) if isinstance(each, Token))
    assert any(isinstance(each, Loading) for each in answers.outputs[begun:])
    assert [(each.finish_reason, each.model_id) for each in done] == [("stop", "one")]
    assert all(gone(pid) for pid in rig.pids())


async def test_turns_of_two_experts_take_turns_where_one_has_room(broker: EmbeddedBroker, tmp_path: Path) -> None:
    rig, answers = Rig(tmp_path), FakeAnswers()
    host = rig.host(max_loaded=1)
    turns = {turn_id(milliseconds=1, entropy=bytes([number] * 10), tenant="t"): name for number, name in enumerate(["one", "two"] * 2)}
    async with calling(broker, tmp_path, host, rig, answers) as client:
        for turn, name in turns.items():
            await ask(client, command(turn, name))
        await until(lambda: sum(isinstance(each, Done) for each in answers.outputs) == len(turns))
    for turn, name in turns.items():
        said = [each for each in answers.outputs if each.turn == turn]
        assert text(said) == f"{name} says" + "".join(f" {number}" for number in range(30))
    assert {each.expert for each in answers.outputs if isinstance(each, Loading)} == {"one", "two"}
    assert 2 <= len(rig.pids()) <= len(turns)
