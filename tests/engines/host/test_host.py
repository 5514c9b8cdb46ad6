"""The host with engines that are real processes, small and faulty on demand."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import prometheus_client
import pytest
from structlog.testing import capture_logs

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.host import ExpertHost, build_host, launch
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy, EngineUnreachable
from capibara_flow.ports import Finish, Load, Piece, Text
from capibara_flow.settings import HostSettings
from tests.engines.host.rig import ASKED, FAKE, Rig, gone, loads
from tests.engines.listening import heard, text_in
from tests.waiting import until


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@asynccontextmanager
async def serving(rig: Rig, *experts: Expert, **settings: Any) -> AsyncIterator[ExpertHost]:
    """A host; at the end nothing of it is left."""
    host = rig.host(*experts, **settings)
    try:
        yield host
    finally:
        await host.aclose()
    assert all(gone(pid) for pid in rig.pids())


def phase(host: ExpertHost, name: str) -> str:
    return str(host.facts()["experts"][name]["phase"])


def figure(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0


async def begun(host: ExpertHost, expert: Expert) -> tuple[Any, list[Piece]]:
    """A stream that has said its first word."""
    stream = host.engine(expert).stream(ASKED)
    pieces = [await anext(stream)]
    while not isinstance(pieces[-1], Text):
        pieces.append(await anext(stream))
    return stream, pieces


async def rest_of(stream: Any) -> list[Piece]:
    return [piece async for piece in stream]


# --- loading ----------------------------------------------------------------------------------------------------


async def test_nothing_is_loaded_before_it_is_asked_for_and_then_whoever_waits_is_told(rig: Rig) -> None:
    expert = rig.expert("one")
    async with serving(rig, expert) as host:
        engine = host.engine(expert)
        await engine.health()
        assert rig.pids() == []
        pieces = await heard(engine, ASKED)
        assert isinstance(pieces[0], Load)
        assert text_in(pieces) == "one says 0 1 2 3 4"
        assert pieces[-1] == Finish("stop")
        again = await heard(engine, ASKED)
        assert loads(again) == []
        assert len(rig.pids()) == 1


async def test_many_at_once_wait_for_one_load(rig: Rig) -> None:
    expert = rig.expert("one", load_seconds=0.3)
    async with serving(rig, expert) as host:
        answers = await asyncio.gather(*(heard(host.engine(expert), ASKED) for _ in range(8)))
        assert {text_in(each) for each in answers} == {"one says 0 1 2 3 4"}
        assert len(rig.pids()) == 1
        assert host.facts()["experts"]["one"]["loads"] == 1


async def test_the_estimate_is_the_operators_then_what_was_measured(rig: Rig) -> None:
    expert = rig.expert("one").model_copy(update={"launch": rig.expert("one").launch.model_copy(update={"load_seconds": 40.0})})  # type: ignore[union-attr]
    async with serving(rig, expert) as host:
        first = await heard(host.engine(expert), ASKED)
        eta = loads(first)[0].eta_s
        assert eta is not None
        assert 39 < eta <= 40
        assert host.facts()["experts"]["one"]["load_seconds"] < 40


async def test_a_waiting_stream_that_is_closed_leaves_the_load_to_the_others(rig: Rig) -> None:
    gate = rig.folder / "gate"
    expert = rig.expert("one", gate=str(gate))
    async with serving(rig, expert) as host:
        leaving, staying = host.engine(expert).stream(ASKED), host.engine(expert).stream(ASKED)
        assert isinstance(await anext(leaving), Load)
        assert isinstance(await anext(staying), Load)
        assert host.facts()["queued"] == 2
        await leaving.aclose()
        assert host.facts()["queued"] == 1
        gate.touch()
        assert text_in(await rest_of(staying)) == "one says 0 1 2 3 4"


async def test_a_load_that_nobody_waits_for_any_more_finishes(rig: Rig) -> None:
    gate = rig.folder / "gate"
    expert = rig.expert("one", gate=str(gate))
    async with serving(rig, expert) as host:
        leaving = host.engine(expert).stream(ASKED)
        await anext(leaving)
        await leaving.aclose()
        gate.touch()
        await until(lambda: phase(host, "one") == "warm")
        assert loads(await heard(host.engine(expert), ASKED)) == []


async def test_what_it_cannot_do_is_refused_without_a_load(rig: Rig) -> None:
    expert = rig.expert("one")
    asked = ASKED.model_copy(update={"tools": ({"type": "function"},)})
    async with serving(rig, expert) as host:
        assert host.engine(expert).abilities.prefill
        with pytest.raises(BadRequest, match="tools"):
            await heard(host.engine(expert), asked)
        assert rig.pids() == []


async def test_the_engine_gets_its_key_and_none_of_our_passwords(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_NATS__PASSWORDS__CALLER", "hush")
    expert = rig.expert("one")
    async with serving(rig, expert) as host:
        await heard(host.engine(expert), ASKED)
    [environment], [argv] = rig.lines("environment"), rig.lines("argv")
    assert environment["LLAMA_API_KEY"]
    assert environment["LLAMA_API_KEY"] not in argv
    assert not [name for name in environment if name.startswith("CAPIBARA_")]


# --- loads that fail --------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_loading_is_out_of_reach_and_left_alone_for_a_while(rig: Rig) -> None:
    expert = rig.expert("one", dies_loading=True)
    async with serving(rig, expert, crash_base_s=300, crash_cap_s=300) as host:
        engine = host.engine(expert)
        with capture_logs() as logged, pytest.raises(EngineUnreachable, match="ended with exit code 1") as caught:
            await heard(engine, ASKED)
        assert "secret/path" not in str(caught.value)
        [failed] = [each for each in logged if each["event"] == "expert_load_failed"]
        assert "secret/path" in failed["said"]
        with pytest.raises(EngineUnreachable, match="tried again in"):
            await heard(engine, ASKED)
        with pytest.raises(EngineUnreachable, match="tried again in"):
            await engine.health()
        assert len(rig.pids()) == 1


async def test_after_its_pause_it_is_tried_again(rig: Rig) -> None:
    expert = rig.expert("one", dies_loading=True)
    async with serving(rig, expert, crash_base_s=0.05) as host:
        with pytest.raises(EngineUnreachable):
            await heard(host.engine(expert), ASKED)
        await until(lambda: not host.reason_against("one"))
        with pytest.raises(EngineUnreachable, match="exit code"):
            await heard(host.engine(expert), ASKED)
        assert len(rig.pids()) == 2


@pytest.mark.parametrize(("fault", "reason"), [("open", "is not its engine"), ("mute", "does not answer")])
async def test_ready_is_what_answers_a_question_and_knows_our_key(rig: Rig, fault: str, reason: str) -> None:
    expert = rig.expert("one", **{fault: True})
    async with serving(rig, expert) as host:
        with pytest.raises(EngineUnreachable, match=reason):
            await heard(host.engine(expert), ASKED)
        await until(lambda: all(gone(pid) for pid in rig.pids()))


async def test_a_load_takes_its_time_limit_at_most(rig: Rig) -> None:
    expert = rig.expert("one", gate=str(rig.folder / "never"))
    async with serving(rig, expert, load_timeout_s=0.5) as host:
        with pytest.raises(EngineUnreachable, match=r"within 0\.5 s"):
            await heard(host.engine(expert), ASKED)


@pytest.mark.parametrize("engine", ["llama_server", "vllm"])
async def test_programs_are_found_on_the_path_and_get_their_own_command_lines(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, engine: Literal["llama_server", "vllm"]
) -> None:
    """A fake of that name that remembers how it was called."""
    name = engine.replace("_", "-")
    program = rig.folder / "bin" / name
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, fake=str(FAKE), record=str(rig.record)), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    launched = {"engine": engine, "profiles": ["low_latency_batching"] if engine == "vllm" else []}
    expert = Expert.model_validate({"name": "one", "weights": "models/one", "launch": launched, "context_length": 512})
    host = build_host([expert], HostSettings(reserve_mib=0))
    try:
        answer = await heard(host.engine(expert), ASKED)
    finally:
        await host.aclose()
    assert text_in(answer) == "one says 0 1 2 3 4"
    [argv] = rig.lines("called")
    assert argv == list(launch.command(expert, launch.Place(int(argv[argv.index("--port") + 1]), "")).argv[1:])
    assert rig.lines("environment")[0]["LLAMA_API_KEY"]


#: Any engine's command line becomes the fake's.
PROGRAM = """#!{python}
import json, os, sys
with open({record!r}, "a") as file:
    file.write(json.dumps({{"called": sys.argv[1:]}}) + "\\n")
value = lambda *names: next(sys.argv[sys.argv.index(name) + 1] for name in names if name in sys.argv)
os.environ["LLAMA_API_KEY"] = os.environ.get("VLLM_API_KEY") or os.environ["LLAMA_API_KEY"]
arguments = ["--port", value("--port"), "--alias", value("--alias", "--served-model-name"), "--record", {record!r}]
os.execv({python!r}, [{python!r}, {fake!r}, *arguments])
"""


async def test_a_program_that_is_not_there_is_named_in_the_log(rig: Rig) -> None:
    launched = {"engine": "llama_server", "memory_mib": 1}
    expert = Expert.model_validate({"name": "one", "weights": "none.gguf", "launch": launched})
    host = build_host([expert], HostSettings(reserve_mib=0))
    with capture_logs() as logged, pytest.raises(EngineUnreachable, match="exit code 127"):
        await heard(host.engine(expert), ASKED)
    await host.aclose()
    assert any("llama-server: No such file" in each.get("said", "") for each in logged)


# --- room -------------------------------------------------------------------------------------------------------


async def test_turns_alternate_between_more_experts_than_there_is_room_for(rig: Rig) -> None:
    one, two = rig.expert("one"), rig.expert("two")
    before = figure("capibara_expert_evictions_total", expert="one")
    async with serving(rig, one, two, max_loaded=1) as host:
        for expert in (one, two, one, two):
            assert text_in(await heard(host.engine(expert), ASKED)) == f"{expert.name} says 0 1 2 3 4"
            assert sum(not gone(pid) for pid in rig.pids()) == 1
        assert host.facts()["experts"]["one"]["evictions"] == 2
        assert figure("capibara_expert_evictions_total", expert="one") == before + 2
        assert figure("capibara_expert_loaded", expert="one") == 0
        assert figure("capibara_expert_loaded", expert="two") == 1
    assert figure("capibara_expert_loaded", expert="two") == 0


async def test_one_in_use_is_not_evicted_the_other_waits(rig: Rig) -> None:
    one, two = rig.expert("one", words=40, pace=0.02), rig.expert("two")
    async with serving(rig, one, two, max_loaded=1) as host:
        stream, pieces = await begun(host, one)
        waiting = asyncio.create_task(heard(host.engine(two), ASKED))
        await until(lambda: host.facts()["queued"])
        pieces += await rest_of(stream)
        assert pieces[-1] == Finish("stop")
        answer = await waiting
        assert loads(answer)[0] == Load(None)
        assert text_in(answer) == "two says 0 1 2 3 4"


async def test_more_than_the_queue_holds_are_sent_away(rig: Rig) -> None:
    gate = rig.folder / "gate"
    one = rig.expert("one", gate=str(gate))
    async with serving(rig, one, queue_size=2) as host:
        waiting = [asyncio.create_task(heard(host.engine(one), ASKED)) for _ in range(2)]
        await until(lambda: host.facts()["queued"] == 2)
        with pytest.raises(EngineBusy, match="2 requests wait"):
            await heard(host.engine(one), ASKED)
        gate.touch()
        await asyncio.gather(*waiting)


async def test_what_can_never_fit_is_refused_and_says_so(rig: Rig) -> None:
    large = rig.expert("large", memory_mib=9000)
    async with serving(rig, large, free_mib=8000, reserve_mib=500) as host:
        with pytest.raises(EngineUnreachable, match=r"needs 9000 MiB of memory.*would be 7500"):
            await heard(host.engine(large), ASKED)
        assert rig.pids() == []


async def test_the_idle_are_unloaded_after_a_while(rig: Rig) -> None:
    expert = rig.expert("one")
    async with serving(rig, expert, auto_unload_after_s=0.4) as host:
        await heard(host.engine(expert), ASKED)
        await until(lambda: phase(host, "one") == "cold")
        assert all(gone(pid) for pid in rig.pids())
        assert host.facts()["experts"]["one"]["evictions"] == 0


async def test_an_engine_that_can_sleep_does_so_first_and_is_woken(rig: Rig) -> None:
    rig.sleeps = True
    one, two = rig.expert("one"), rig.expert("two")
    async with serving(rig, one, two, max_loaded=2, auto_unload_after_s=200) as host:
        await heard(host.engine(one), ASKED)
        rig.ahead = 101
        await heard(host.engine(two), ASKED)  # whatever happens makes the host look at all of them
        await until(lambda: rig.lines("told") == ["/sleep?level=1"])
        pieces = await heard(host.engine(one), ASKED)
        assert pieces[0] == Load(None)
        assert rig.lines("told") == ["/sleep?level=1", "/wake_up"]
        assert len(rig.pids()) == 2


async def test_an_expert_that_is_released_finishes_and_goes(rig: Rig) -> None:
    expert = rig.expert("one", words=20, pace=0.02)
    async with serving(rig, expert) as host:
        engine = host.engine(expert)
        stream, pieces = await begun(host, expert)
        await engine.aclose()
        with pytest.raises(EngineUnreachable, match="no longer served"):
            await heard(engine, ASKED)
        pieces += await rest_of(stream)
        assert pieces[-1] == Finish("stop")
        await until(lambda: all(gone(pid) for pid in rig.pids()))
        await until(lambda: host.facts()["experts"] == {})


async def test_a_changed_expert_is_loaded_anew(rig: Rig) -> None:
    async with serving(rig, rig.expert("one", words=1)) as host:
        assert text_in(await heard(host.engine(rig.expert("one", words=1)), ASKED)) == "one says 0"
        assert text_in(await heard(host.engine(rig.expert("one", words=2)), ASKED)) == "one says 0 1"
        assert len(rig.pids()) == 2


# --- crashes and ends -------------------------------------------------------------------------------------------


async def test_an_engine_killed_in_mid_answer_is_broken_and_comes_back(rig: Rig) -> None:
    expert = rig.expert("one", words=500, pace=0.02)
    async with serving(rig, expert, crash_base_s=0.05) as host:
        stream, _ = await begun(host, expert)
        os.kill(rig.pids()[0], signal.SIGKILL)
        with capture_logs() as logged:
            with pytest.raises(EngineBroke):
                await rest_of(stream)
            await until(lambda: host.facts()["experts"]["one"]["failures"] == 1)
        assert [(each["event"], each["code"]) for each in logged if each["event"].startswith("expert_")] == [("expert_crashed", 137)]
        await until(lambda: not host.reason_against("one"))
        stream, pieces = await begun(host, expert)
        assert text_in(pieces) == "one says"
        await stream.aclose()
        assert len(rig.pids()) == 2


async def test_an_engine_that_hangs_is_started_anew(rig: Rig) -> None:
    hang = rig.folder / "hang"
    expert = rig.expert("one", words=1, pace=60, answers=str(hang))
    expert = expert.model_copy(update={"timeouts": expert.timeouts.model_copy(update={"between_tokens_seconds": 0.3})})
    async with serving(rig, expert, ask_s=0.2) as host:
        stream, _ = await begun(host, expert)
        hang.touch()
        with pytest.raises(EngineBroke, match="silent"):
            await rest_of(stream)
        await until(lambda: gone(rig.pids()[0]))
        await until(lambda: host.facts()["experts"]["one"]["failures"] == 1)


async def test_one_that_does_not_want_to_end_is_killed_with_all_it_started(rig: Rig) -> None:
    expert = rig.expert("one", stubborn=True, offspring=True)
    async with serving(rig, expert, grace_s=0.3) as host:
        await heard(host.engine(expert), ASKED)
        assert len(rig.pids()) == 2


async def test_the_host_is_stopped_in_the_middle_of_a_load_and_of_an_answer(rig: Rig) -> None:
    one, two = rig.expert("one", words=500, pace=0.02), rig.expert("two", gate=str(rig.folder / "never"))
    host = rig.host(one, two, max_loaded=2)
    stream, _ = await begun(host, one)
    waiting = asyncio.create_task(heard(host.engine(two), ASKED))
    await until(lambda: len(rig.pids()) == 2)
    await host.aclose()
    with pytest.raises(EngineUnreachable, match="being stopped"):
        await waiting
    with pytest.raises(EngineBroke):
        await rest_of(stream)
    assert all(gone(pid) for pid in rig.pids())
    with pytest.raises(EngineUnreachable, match="being stopped"):
        await heard(host.engine(one), ASKED)


async def test_a_load_that_is_broken_off_leaves_no_engine_however_long_that_takes_to_end(rig: Rig) -> None:
    slow = rig.expert("one", gate=str(rig.folder / "never"), stubborn=True)
    host = rig.host(slow, grace_s=1.5)
    waiting = asyncio.create_task(heard(host.engine(slow), ASKED))
    await until(rig.pids)
    await host.aclose()
    assert all(gone(pid) for pid in rig.pids())
    with pytest.raises(EngineUnreachable, match="being stopped"):
        await waiting


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.engines.host.rig import ASKED, Rig
from tests.engines.listening import heard

async def main(folder):
    rig = Rig(Path(folder))
    one = rig.expert("one", stubborn=True, offspring=True)
    two = rig.expert("two", gate=str(rig.folder / "never"))
    host = rig.host(one, two, max_loaded=2, grace_s=0.3)
    await heard(host.engine(one), ASKED)
    await heard(host.engine(two), ASKED)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells nobody elsewhere")
async def test_nothing_stays_when_the_host_is_killed(rig: Rig) -> None:
    root = FAKE.parents[3]
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, str(rig.folder), cwd=root)
    await until(lambda: len(rig.pids()) == 3)  # the engine of one, its offspring, and that of two, which still loads
    parent.kill()
    await parent.wait()
    await until(lambda: all(gone(pid) for pid in rig.pids()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells nobody elsewhere")
async def test_the_engine_does_not_outlive_its_warden(rig: Rig) -> None:
    expert = rig.expert("one", stubborn=True)
    async with serving(rig, expert) as host:
        await heard(host.engine(expert), ASKED)
        [pid] = rig.pids()
        assert host.facts()["experts"]["one"]["pid"] == pid
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")  # noqa: ASYNC240  not a disk
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        await until(lambda: gone(pid))
        await until(lambda: host.facts()["experts"]["one"]["failures"] == 1)


@pytest.mark.slow
async def test_whatever_happens_everybody_is_served_and_never_too_many_are_loaded(rig: Rig) -> None:
    """Forty requests for four experts where two have room; some leave, and engines are killed meanwhile."""
    chance = random.Random(7)
    experts = [rig.expert(name, priority=priority) for priority, name in enumerate("abcd")]
    async with serving(rig, *experts, max_loaded=2, crash_base_s=0.05) as host:

        async def asking(delay: float, expert: Expert, leaves: bool) -> str:
            await asyncio.sleep(delay)
            while True:
                stream = host.engine(expert).stream(ASKED)
                try:
                    if leaves:
                        await anext(stream)
                        await stream.aclose()
                        return ""
                    return text_in(await rest_of(stream))
                except EngineBroke:
                    pass  # killed in mid-answer: asked again
                except EngineUnreachable:
                    await asyncio.sleep(0.1)

        async def killing() -> None:
            for _ in range(4):
                await asyncio.sleep(0.7)
                living = [pid for pid in rig.pids() if not gone(pid)]
                assert len(living) <= 2
                if living:
                    os.kill(chance.choice(living), signal.SIGKILL)

        wishes = [(chance.random() * 3, chance.choice(experts), chance.random() < 0.25) for _ in range(40)]
        answers = await asyncio.gather(killing(), *(asking(*wish) for wish in wishes))
        assert answers[1:] == ["" if leaves else f"{expert.name} says 0 1 2 3 4" for _, expert, leaves in wishes]
        facts = host.facts()
        assert facts["queued"] == 0
        assert all(each["streams"] == each["waiting"] == 0 for each in facts["experts"].values())


async def test_closing_a_stream_reaches_the_engine_and_frees_the_expert(rig: Rig) -> None:
    expert = rig.expert("one", words=500, pace=0.02)
    async with serving(rig, expert) as host:
        async with aclosing(host.engine(expert).stream(ASKED)) as stream:
            async for piece in stream:
                if isinstance(piece, Text):
                    break
        assert host.facts()["experts"]["one"]["streams"] == 0
        assert host.facts()["experts"]["one"]["memory_mib"] > 10
