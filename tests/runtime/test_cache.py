"""Answers that are given again: found by their key, gone with the turn that made them, and never in anybody's way."""

import asyncio

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from capibara_flow.domain.caching import LARGEST, CachedAnswer
from capibara_flow.runtime import provision
from capibara_flow.runtime.cache import AnswerCache
from capibara_flow.runtime.erasing import erase
from tests.runtime.rig import Line, Rig, line
from tests.waiting import until
from topics.streams import ANSWERS, Layout, answer_key, every_stream

KEY, OTHER = "a" * 64, "b" * 64
ANSWER = CachedAnswer(text="Hola 🦫", reasoning="hm", finish_reason="stop", prompt_tokens=3, completion_tokens=2)
AGAIN = CachedAnswer(text="Hola otra vez", finish_reason="stop")


@pytest.fixture
async def kept(rig: Rig) -> None:
    """The broker keeps answers."""
    await provision.apply(rig.admin, Layout(answer_age=600), ())


@pytest.fixture
async def caller(rig: Rig, kept: None) -> Line:
    return await line(rig, "caller")


@pytest.fixture
def cache(caller: Line) -> AnswerCache:
    return AnswerCache(caller)


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"capibara_answer_cache_{name}_total") or 0.0


async def test_an_answer_is_found_by_its_key_alone(rig: Rig, cache: AnswerCache):
    hits, misses = counted("hits"), counted("misses")
    assert await cache.get(KEY) is None
    await cache.put(KEY, "T1", ANSWER)
    assert await AnswerCache(await rig.client("caller")).get(KEY) == ANSWER
    assert await cache.get(OTHER) is None
    assert (counted("hits") - hits, counted("misses") - misses) == (1, 2)


async def test_the_last_answer_under_a_key_counts(cache: AnswerCache):
    await cache.put(KEY, "T1", ANSWER)
    await cache.put(KEY, "T2", AGAIN)
    assert await cache.get(KEY) == AGAIN


async def test_an_answer_goes_with_the_turn_that_made_it(rig: Rig, cache: AnswerCache):
    await cache.put(KEY, "T1", ANSWER)
    await cache.put(OTHER, "T2", AGAIN)
    assert await erase(await rig.client("undertaker"), "T1", every_stream(), retry_seconds=0) == 1
    assert await cache.get(KEY) is None
    assert await cache.get(OTHER) == AGAIN


async def test_erasing_one_of_two_turns_leaves_what_the_other_said(rig: Rig, cache: AnswerCache):
    await cache.put(KEY, "T1", ANSWER)
    await cache.put(KEY, "T2", AGAIN)
    await erase(await rig.client("provisioner"), "T2", every_stream(), retry_seconds=0)
    assert await cache.get(KEY) == ANSWER


async def test_an_answer_is_forgotten_in_time(rig: Rig, cache: AnswerCache):
    await cache.put(KEY, "T1", ANSWER)
    await provision.apply(rig.admin, Layout(answer_age=1), ())

    async def forgotten() -> bool:
        return await cache.get(KEY) is None

    await until(forgotten)
    await cache.put(KEY, "T2", AGAIN)
    assert await cache.get(KEY) == AGAIN


async def test_a_full_cache_forgets_what_is_oldest(rig: Rig, cache: AnswerCache):
    info = await rig.admin.stream_info(ANSWERS)
    info.config.max_bytes = 3000
    await rig.admin.update_stream(info.config)
    large = AGAIN.model_copy(update={"text": "x" * 1000})
    for number in range(4):
        await cache.put(f"{number:064}", f"T{number}", large)
    assert await cache.get(f"{0:064}") is None
    assert await cache.get(f"{3:064}") == large


async def test_what_is_too_large_is_not_kept(rig: Rig, cache: AnswerCache):
    await cache.put(KEY, "T1", ANSWER.model_copy(update={"text": "x" * LARGEST}))
    assert await rig.waiting(ANSWERS) == 0


@pytest.mark.parametrize("body", [b"", b"{}", b"not json", b'{"text": 5, "finish_reason": "stop"}', b'{"v": 2, "text": "a"}', b"\xff\x00"])
async def test_what_is_no_answer_of_ours_is_none(caller: Line, cache: AnswerCache, body: bytes):
    await caller.jetstream().publish(answer_key(KEY, "T1"), body)
    assert await cache.get(KEY) is None
    await cache.put(KEY, "T2", ANSWER)
    assert await cache.get(KEY) == ANSWER


async def test_where_no_answers_are_kept_nothing_is_found_and_nothing_breaks(rig: Rig):
    cache = AnswerCache(await rig.client("caller"))
    with capture_logs() as logs:
        await cache.put(KEY, "T1", ANSWER)
    assert await cache.get(KEY) is None
    assert [each["event"] for each in logs] == ["answer_not_kept"]


async def test_a_broker_that_refuses_is_told_to_the_log(rig: Rig, cache: AnswerCache):
    info = await rig.admin.stream_info(ANSWERS)
    info.config.max_msg_size = 10
    await rig.admin.update_stream(info.config)
    with capture_logs() as logs:
        await cache.put(KEY, "T1", ANSWER)
    assert [each["event"] for each in logs] == ["answer_not_kept"]
    assert ANSWER.text not in str(logs)


async def test_a_broker_that_is_away_has_nothing(caller: Line, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("capibara_flow.runtime.cache._PATIENCE", 0.1)
    await cache.put(KEY, "T1", ANSWER)
    caller.swallow = lambda subject, body: "ANSWERS" in subject
    with capture_logs() as logs:
        assert await cache.get(KEY) is None
        await cache.put(OTHER, "T2", ANSWER)
    assert [each["event"] for each in logs] == ["answer_cache_away", "answer_not_kept"]
    caller.swallow = lambda subject, body: False
    assert await cache.get(KEY) == ANSWER


async def test_only_callers_read_and_write_answers(rig: Rig, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("capibara_flow.runtime.cache._PATIENCE", 0.5)
    await cache.put(KEY, "T1", ANSWER)
    for role in ("edge", "router"):
        stranger = AnswerCache(await rig.client(role))
        assert await stranger.get(KEY) is None
        await stranger.put(KEY, "T2", AGAIN)
    assert await cache.get(KEY) == ANSWER
    assert await rig.waiting(ANSWERS) == 1


async def test_many_callers_at_once(rig: Rig, cache: AnswerCache):
    other = AnswerCache(await rig.client("caller"))
    await asyncio.gather(*(each.put(KEY, f"T{number}", ANSWER) for number, each in enumerate([cache, other] * 10)))
    assert await asyncio.gather(*(each.get(KEY) for each in [cache, other] * 10)) == [ANSWER] * 20


def test_it_is_switched_off_by_default():
    assert ANSWERS not in {stream.name for stream in Layout().streams}
    assert set(every_stream()) == {stream.name for stream in Layout().streams} | {ANSWERS}
