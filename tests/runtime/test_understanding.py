"""Reading what questions are about: routes files that are good, bad, changed and exchanged while questions come."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routes import parse_routes
from capibara_flow.domain.understanding import Learned
from capibara_flow.ports import Vectors
from capibara_flow.runtime.understanding import Tools, Understanding
from capibara_flow.settings import SettingsError
from tests.waiting import until
from topics.chat import ChatRequest

LEVELS = ("simple", "moderate", "complex", "very_complex")


class WordBags:
    """An embedder whose vectors tell which words a text has."""

    model, dimension = "bags", 64

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.closed = False
        self.hold = asyncio.Event()
        self.hold.set()

    async def embed(self, texts: Sequence[str], kind: str = "query") -> Vectors:
        await self.hold.wait()
        self.seen += texts
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % self.dimension] += 1
        return rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True))

    async def aclose(self) -> None:
        self.closed = True


def routes_text(**words: str) -> str:
    """A routes file: for each route, a word that all its examples share, at each level."""
    text = ""
    for name, word in words.items():
        text += f'[[routes]]\nname = "{name}"\n[routes.levels]\n'
        for level in LEVELS:
            examples = ", ".join(f'"{word} {level} {word} {number}"' for number in range(8))
            text += f"{level} = [{examples}]\n"
    return text


def fleet(routes: str | None = None, *, policy: bool = True) -> Fleet:
    body = {"experts": [{"name": "a", "urls": ["http://h:1"]}], "routes": routes, "policy": {"default": "a"} if policy else {}}
    return Fleet.model_validate(body)


def asking(*texts: str) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text} for text in texts]})


def read(path: Path) -> object:
    try:
        return parse_routes(path.read_text(encoding="utf-8"), path.name)
    except ValueError as error:
        raise SettingsError(str(error)) from error


@pytest.fixture
def embedder() -> WordBags:
    return WordBags()


@pytest.fixture
async def understanding(tmp_path: Path, embedder: WordBags) -> AsyncIterator[Understanding]:
    (tmp_path / "usual.toml").write_text(routes_text(animals="cat", plants="tree"), encoding="utf-8")
    understanding = Understanding(lambda: Tools(embedder, Learned.learn), read, tmp_path / "usual.toml")  # type: ignore[arg-type]
    yield understanding
    await understanding.aclose()
    assert embedder.closed == bool(embedder.seen)


async def test_a_question_is_read_by_the_routes_that_come_along(tmp_path: Path, understanding: Understanding) -> None:
    await understanding.follow(tmp_path / "fleet.toml", fleet())
    found = await understanding(asking("cat complex cat 3"))
    assert (found.route, found.complexity) == ("animals", "complex")
    assert 0.5 < found.confidence <= 1
    assert "animals" in found.reasoning
    assert understanding.facts()["embedder"] == "bags"


async def test_a_fleet_may_name_routes_of_its_own(tmp_path: Path, understanding: Understanding) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "r.toml").write_text(routes_text(stars="sun", seas="wave"), encoding="utf-8")
    await understanding.follow(tmp_path / "own" / "fleet.toml", fleet("r.toml"))
    assert (await understanding(asking("wave simple wave 1"))).route == "seas"
    await understanding.follow(tmp_path / "own" / "fleet.toml", fleet())
    assert (await understanding(asking("tree simple tree 1"))).route == "plants"


async def test_a_file_that_tells_no_complexity_leaves_it_to_what_comes_along(tmp_path: Path, understanding: Understanding) -> None:
    (tmp_path / "flat.toml").write_text(
        '[[routes]]\nname = "stars"\nexamples = ["sun one", "sun two"]\n[[routes]]\nname = "seas"\nexamples = ["wave one", "wave two"]\n',
        encoding="utf-8",
    )
    await understanding.follow(tmp_path / "fleet.toml", fleet("flat.toml"))
    found = await understanding(asking("sun very_complex 3"))
    assert (found.route, found.complexity) == ("stars", "very_complex")


async def test_without_a_policy_no_model_is_loaded(tmp_path: Path, understanding: Understanding, embedder: WordBags) -> None:
    await understanding.follow(tmp_path / "fleet.toml", fleet(policy=False))
    assert understanding.facts() == {"embedder": None, "routes_file": None}
    assert embedder.seen == []


async def test_edited_routes_count_at_once_and_bad_ones_are_refused(tmp_path: Path, understanding: Understanding) -> None:
    path = tmp_path / "usual.toml"
    await understanding.follow(tmp_path / "fleet.toml", fleet())
    path.write_text(routes_text(beasts="cat", plants="tree"), encoding="utf-8")
    assert await understanding._watched.check()  # type: ignore[union-attr]
    assert (await understanding(asking("cat simple cat 1"))).route == "beasts"
    path.write_text(routes_text(beasts="cat") + '[[routes]]\nname = "beasts"\nexamples = ["dog"]\n', encoding="utf-8")
    assert not await understanding._watched.check()  # type: ignore[union-attr]
    assert (await understanding(asking("tree simple tree 1"))).route == "plants"
    refused = understanding.facts()["routes_file"]["refused"]
    assert "usual.toml:9:" in refused
    assert "beasts" in refused


async def test_a_fleet_whose_routes_cannot_be_read_is_refused_and_the_old_ones_stay(tmp_path: Path, understanding: Understanding) -> None:
    await understanding.follow(tmp_path / "fleet.toml", fleet())
    with pytest.raises((SettingsError, OSError)):
        await understanding.follow(tmp_path / "fleet.toml", fleet("nowhere.toml"))
    assert (await understanding(asking("cat simple cat 1"))).route == "animals"


async def test_questions_that_come_early_wait_for_the_routes(tmp_path: Path, understanding: Understanding, embedder: WordBags) -> None:
    embedder.hold.clear()
    learning = asyncio.create_task(understanding.follow(tmp_path / "fleet.toml", fleet()))
    asked = asyncio.create_task(understanding(asking("cat simple cat 1")))
    await until(lambda: understanding._tools is not None)
    assert not asked.done()
    embedder.hold.set()
    await learning
    assert (await asked).route == "animals"


async def test_a_follow_up_is_read_with_what_it_follows(tmp_path: Path, understanding: Understanding, embedder: WordBags) -> None:
    await understanding.follow(tmp_path / "fleet.toml", fleet())
    await understanding(asking("tree simple tree 1", "and then?"))
    assert embedder.seen[-1] == "and then?\ntree simple tree 1"


async def test_what_says_nothing_belongs_to_no_route(tmp_path: Path, understanding: Understanding) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    found = await understanding(ChatRequest.model_validate({"messages": [{"role": "user", "content": [image]}]}))
    assert (found.route, found.complexity) == ("default", "simple")


async def test_questions_are_told_when_the_first_routes_could_not_be_learned(tmp_path: Path, embedder: WordBags) -> None:
    (tmp_path / "usual.toml").write_text(routes_text(animals="cat", plants="tree"), encoding="utf-8")

    def learn(*_: object) -> Learned:
        raise ZeroDivisionError

    understanding = Understanding(lambda: Tools(embedder, learn), read, tmp_path / "usual.toml")  # type: ignore[arg-type]
    await understanding.follow(tmp_path / "fleet.toml", fleet())
    with pytest.raises(ZeroDivisionError):
        await understanding(asking("cat"))
    await understanding.aclose()


async def test_a_policy_for_a_route_that_is_not_there_is_refused(tmp_path: Path, understanding: Understanding) -> None:
    body = {"experts": [{"name": "a", "urls": ["http://h:1"]}], "policy": {"default": "a", "anmials": "a"}}
    with pytest.raises(SettingsError, match="no route is called anmials; there are: animals, plants, default"):
        await understanding.follow(tmp_path / "fleet.toml", Fleet.model_validate(body))


async def test_whoever_is_followed_last_has_the_last_word(tmp_path: Path, understanding: Understanding, embedder: WordBags) -> None:
    (tmp_path / "own.toml").write_text(routes_text(stars="sun", seas="wave"), encoding="utf-8")
    embedder.hold.clear()
    first = asyncio.create_task(understanding.follow(tmp_path / "fleet.toml", fleet()))
    await until(lambda: understanding._learning is not None)
    second = asyncio.create_task(understanding.follow(tmp_path / "fleet.toml", fleet("own.toml")))
    await asyncio.sleep(0.05)
    embedder.hold.set()
    await asyncio.gather(first, second)
    assert (await understanding(asking("wave simple wave 1"))).route == "seas"
