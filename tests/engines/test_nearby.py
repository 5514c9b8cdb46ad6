"""Rows in memory are found as one would find them by looking at each."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.engines import nearby
from capibara_flow.engines.milvus import MilvusPassages
from capibara_flow.engines.nearby import Nearby
from topics.knowledge import Passage, Scope

Row = tuple[str, str, tuple[float, ...], dict[int, float]]
_numbers = st.floats(-1, 1, width=32).map(lambda value: round(value, 2))
_weights = st.floats(0.125, 1, width=16)
#: Terms that only differ in their upper half are told apart.
_terms = st.sampled_from([0, 1, 1 + (1 << 16), 5 << 16, 2**32 - 3])
_rows = st.tuples(
    st.sampled_from("abcdefgh"), st.sampled_from(["one", "two", "three"]), st.tuples(_numbers, _numbers), st.dictionaries(_terms, _weights)
)
_deeds = st.lists(st.one_of(_rows, st.sampled_from(["one", "two", "three"])), max_size=40)


def _done(deeds: Sequence[Row | str]) -> tuple[Nearby, dict[str, Row]]:
    rows, plain = Nearby(2), dict[str, Row]()
    for deed in deeds:
        if isinstance(deed, str):
            rows.forget([key for key, row in plain.items() if row[1] == deed])
            plain = {key: row for key, row in plain.items() if row[1] != deed}
        else:
            key, _, dense, sparse = deed
            rows.put(key, f"p{key}", dense, sparse)
            plain[key] = deed
    return rows, plain


@given(deeds=_deeds, asked=st.tuples(_numbers, _numbers), terms=st.dictionaries(_terms, _weights), limit=st.integers(0, 6))
def test_what_is_found_is_what_is_there(deeds: list[Row | str], asked: tuple[float, float], terms: dict[int, float], limit: int) -> None:
    rows, plain = _done(deeds)
    assert len(rows) == len(plain)
    unit = np.array(asked) / (np.linalg.norm(asked) or 1)
    cosines = {f"p{key}": float(np.dot(dense, unit)) / (float(np.linalg.norm(dense)) or 1) for key, _, dense, _ in plain.values()}
    products = {f"p{key}": sum(weight * sparse.get(term, 0) for term, weight in terms.items()) for key, _, _, sparse in plain.values()}
    matched = {id: score for id, score in products.items() if score > 0}
    for hits, scores in ((rows.nearest(np.array(asked, np.float32), limit), cosines), (rows.matching(terms, limit), matched)):
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:limit], abs=1e-5)
        assert len({hit.passage for hit in hits}) == len(hits)
        for hit in hits:
            assert hit.score == pytest.approx(scores[hit.passage], abs=1e-5)
        assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.passage))


def test_space_of_what_went_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "_GONE", 8)
    rows = Nearby(2)
    for turn in range(200):
        rows.put(f"k{turn % 3}", f"p{turn % 3}", (1.0, turn), {1: 0.5, turn + 2: 0.25})
    assert len(rows) == 3
    assert len(rows._terms) <= nearby._FIRST
    assert [hit.passage for hit in rows.matching({1: 1.0}, 9)] == ["p0", "p1", "p2"]
    assert [hit.passage for hit in rows.matching({201: 1.0}, 9)] == ["p1"]
    rows.forget(["k0", "k1", "k2", "never there"])
    assert rows.nearest(np.ones(2, np.float32), 5) == rows.matching({1: 1.0}, 5) == []


async def test_a_write_that_nobody_waits_for_is_found_as_it_is_kept(tmp_path: Path) -> None:
    scope, asked = Scope("ours"), np.ones(2, np.float32)
    store = MilvusPassages(str(tmp_path / "passages.db"))
    await store.prepare("model", 2)
    assert await store.nearest(scope, asked, 9) == []
    for number in range(6):
        one = Passage(f"p{number}", f"d{number}", 0, "text", 0, 4)
        writing = asyncio.create_task(store.put(scope, [one], asked[None], [{1: 0.5}]))
        await asyncio.sleep(0.002 * number)
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing
        if number % 2:
            await store.delete(scope, f"d{number}")
    kept = set(await store.documents(scope))
    found, matched = await store.nearest(scope, asked, 9), await store.matching(scope, {1: 1.0}, 9)
    await store.aclose()
    assert {f"d{hit.passage[1:]}" for hit in found} == {f"d{hit.passage[1:]}" for hit in matched} == kept
    assert not kept & {"d1", "d3", "d5"}
