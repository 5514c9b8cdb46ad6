"""Complexity is learned from examples of four levels, and length alone is only what it is held against."""

import pytest

from capibara_flow.domain.complexity import Scale, by_length
from capibara_flow.domain.routes import FEWEST, LEVELS, Routes
from tests.domain.spaces import embed
from topics.chat import Complexity

WORDS: dict[Complexity, str] = {
    "simple": "hello name",
    "moderate": "explain script",
    "complex": "refactor pipeline",
    "very_complex": "architect platform",
}


def routes(count: int = FEWEST) -> Routes:
    levels = {level: [f"{WORDS[level]} number{index} {'and so on ' * (index % 3)}" for index in range(count)] for level in LEVELS}
    return Routes.model_validate({"routes": [{"name": "a", "levels": levels, "examples": ["what has no level"]}]})


def learned() -> Scale:
    known = routes()
    return Scale.learn(known, embed([each.text for each in known.labelled]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("padding", ["", " and so on" * 12])
def test_what_is_asked_for_tells_the_level_however_long_it_is(level: Complexity, padding: str) -> None:
    text = WORDS[level] + padding
    told, shares = learned().measure(text, embed([text])[0])
    assert told == level
    assert list(shares) == list(LEVELS)
    assert sum(shares.values()) == pytest.approx(1, abs=0.001)


def test_a_file_with_too_few_of_a_level_teaches_nothing() -> None:
    known = routes(FEWEST - 1)
    assert not known.tells_complexity
    with pytest.raises(ValueError, match=f"each of simple, moderate, complex, very_complex needs {FEWEST} examples"):
        Scale.learn(known, embed([each.text for each in known.labelled]))


def test_the_baseline_knows_nothing_but_length() -> None:
    lengths = by_length(["a", "a b", "a b c d e f g h", "a b c d e f g h i"], ["simple", "moderate", "complex", "very_complex"])
    assert [lengths.measure(text) for text in ("x", "x y", "x " * 8, "x " * 30)] == ["simple", "moderate", "complex", "very_complex"]
