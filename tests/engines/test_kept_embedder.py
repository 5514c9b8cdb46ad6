"""Vectors kept on the disk."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from capibara_flow.engines.embeddings.kept import KeptEmbedder
from capibara_flow.errors import CannotStart
from tests.fakes_knowledge import FakeEmbedder


async def test_embeds_each_text_once_even_over_a_restart(tmp_path: Path):
    inner, told = FakeEmbedder(model="org/a model"), []
    first = KeptEmbedder(inner, tmp_path, told.append)
    rows = await first.embed(["one", "two", "one"], "passage")
    assert inner.batches == [2]
    assert told == [3]
    again = KeptEmbedder(FakeEmbedder(model="org/a model", dimension=32), tmp_path)
    np.testing.assert_array_equal(await again.embed(["two", "one"], "passage"), rows[[1, 0]])
    assert again._inner.batches == []
    for each in (first, again):
        await each.aclose()


async def test_questions_and_models_have_vectors_of_their_own(tmp_path: Path):
    inner, other = FakeEmbedder(), FakeEmbedder(model="other")
    one, two = KeptEmbedder(inner, tmp_path), KeptEmbedder(other, tmp_path)
    await one.embed(["x"], "passage")
    await one.embed(["x"], "query")
    await two.embed(["x"], "passage")
    assert (inner.batches, other.batches) == ([1, 1], [1])
    assert (await one.embed([])).shape == (0, 32)
    for each in (one, two):
        await each.aclose()


async def test_no_text_is_kept(tmp_path: Path):
    kept = KeptEmbedder(FakeEmbedder(), tmp_path)
    await kept.embed(["a secret"])
    await kept.aclose()
    with open(tmp_path / "fake.sqlite", "rb") as file:  # noqa: ASYNC230  a test may wait
        assert b"secret" not in file.read()


async def test_a_vector_of_another_length_is_made_anew(tmp_path: Path):
    kept = KeptEmbedder(FakeEmbedder(), tmp_path)
    await kept.embed(["x"])
    await kept.aclose()
    with sqlite3.connect(tmp_path / "fake.sqlite") as database:
        database.execute("UPDATE vectors SET vector = x'00000000'")
    again = KeptEmbedder(FakeEmbedder(), tmp_path)
    assert (await again.embed(["x"])).shape == (1, 32)
    await again.aclose()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match="cannot be kept"):
        KeptEmbedder(FakeEmbedder(), tmp_path / "file")
