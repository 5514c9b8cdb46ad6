"""Remembered vectors: what is asked for again, or by many at once, is embedded once."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from capibara_flow.engines.embeddings.cached import CachedEmbedder
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Vectors
from tests.waiting import until


class FakeEmbedder:
    """``ports.Embedder``: remembers what it was asked; waits while *gate* is shut, and raises *error* when there is one."""

    model, dimension = "fake", 3

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.closed = False

    async def embed(self, texts: Sequence[str], kind: str = "query") -> Vectors:
        self.asked.append(tuple(texts))
        await self.gate.wait()
        if self.error:
            raise self.error
        return np.array([[len(text), kind == "query", 1] for text in texts], np.float32).reshape(-1, 3)

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
async def inner() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
async def cached(inner: FakeEmbedder) -> AsyncIterator[CachedEmbedder]:
    cached = CachedEmbedder(inner, 3)
    yield cached
    await cached.aclose()


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"capibara_embedding_cache_{name}_total") or 0.0


async def test_a_known_text_is_not_embedded_again(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    hits, misses = counted("hits"), counted("misses")
    first = await cached.embed(["one", "three"])
    again = await cached.embed(["three", "one", "seven"])
    assert np.array_equal(again[:2], first[::-1])
    assert inner.asked == [("one", "three"), ("seven",)]
    assert (counted("hits") - hits, counted("misses") - misses) == (2, 3)
    assert (cached.model, cached.dimension) == ("fake", 3)


async def test_a_text_is_the_same_however_it_is_written(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    await cached.embed(["qué"])
    await cached.embed([" que\u0301\n"])
    assert len(inner.asked) == 1


async def test_a_question_is_not_taken_for_a_passage(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    asked, answering = await cached.embed(["one"], "query"), await cached.embed(["one"], "passage")
    assert not np.array_equal(asked, answering)


async def test_what_was_asked_for_longest_ago_is_forgotten(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        await cached.embed([text])
    assert inner.asked == [("a",), ("b",), ("c",), ("d",), ("b",)]


async def test_a_batch_larger_than_the_memory_is_answered(cached: CachedEmbedder) -> None:
    assert (await cached.embed([str(number) for number in range(20)])).shape == (20, 3)


async def test_no_texts_are_no_rows(cached: CachedEmbedder) -> None:
    assert (await cached.embed([])).shape == (0, 3)


async def test_many_who_ask_the_same_at_once_are_answered_by_one_run(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    inner.gate.clear()
    calls = [asyncio.create_task(cached.embed(["same", "same"])) for _ in range(10)]
    await until(lambda: inner.asked)
    inner.gate.set()
    rows = await asyncio.gather(*calls)
    assert all(np.array_equal(row, rows[0]) for row in rows)
    assert inner.asked == [("same",)]


async def test_who_gives_up_does_not_take_it_from_the_others(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    inner.gate.clear()
    first = asyncio.create_task(cached.embed(["same"]))
    await until(lambda: inner.asked)
    second = asyncio.create_task(cached.embed(["same"]))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    inner.gate.set()
    assert (await second).shape == (1, 3)
    assert inner.asked == [("same",)]


async def test_an_error_is_told_to_all_who_wait_and_not_remembered(inner: FakeEmbedder, cached: CachedEmbedder) -> None:
    inner.error = CannotStart("no")
    told = await asyncio.gather(*(cached.embed(["same"]) for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in told] == [CannotStart] * 3
    inner.error = None
    assert (await cached.embed(["same"])).shape == (1, 3)


async def test_what_is_handed_out_may_be_written_to(cached: CachedEmbedder) -> None:
    first = await cached.embed(["one"])
    expected = first.copy()
    first[:] = 7
    assert np.array_equal(await cached.embed(["one"]), expected)


@pytest.mark.parametrize("begun", [True, False])
async def test_closing_leaves_nobody_waiting(inner: FakeEmbedder, cached: CachedEmbedder, begun: bool) -> None:
    inner.gate.clear()
    call = asyncio.create_task(cached.embed(["one"]))
    await (until(lambda: inner.asked) if begun else asyncio.sleep(0))
    await cached.aclose()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert inner.closed


@given(st.lists(st.lists(st.text("abc", max_size=2), max_size=6), max_size=8), st.integers(1, 4))
def test_vectors_are_those_of_the_model_whatever_was_asked_before(calls: list[list[str]], capacity: int) -> None:
    async def run() -> None:
        cached, plain = CachedEmbedder(FakeEmbedder(), capacity), FakeEmbedder()
        for texts in calls:
            assert np.array_equal(await cached.embed(texts), await plain.embed(texts))
        await cached.aclose()

    asyncio.run(run())
