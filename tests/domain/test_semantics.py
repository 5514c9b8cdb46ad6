"""Learning routes from examples: what is alike goes together, confidence is honest, and what is like nothing belongs nowhere."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara_flow.domain import quality
from capibara_flow.domain.calibration import fit_sharpness, softmax
from capibara_flow.domain.learning import Examples, Weights, one_hot, ridge
from capibara_flow.domain.lexical import PLACES, cued, fold, form, terms
from capibara_flow.domain.routes import DEFAULT, Routes
from capibara_flow.domain.semantics import Match, Pooling, Semantics, centroids
from capibara_flow.domain.subjects import gist, is_elliptic, subject_of
from tests.domain.spaces import embed
from topics.chat import ChatMessage

BAKING = [
    "bake bread in the oven",
    "a cake with flour and sugar",
    "knead dough for bread",
    "sugar cake recipe",
    "flour for pizza dough",
    "oven cake",
]
SAILING = ["sail a boat on the sea", "wind and waves", "anchor the boat", "waves on the sea today", "a sail for strong wind", "sea anchor"]
ELSEWHERE = ["pay my bill", "bill from the bank", "bank account balance", "block bank card"]


def routes(none: list[str] | None = None) -> Routes:
    listed = [{"name": "baking", "examples": BAKING}, {"name": "sailing", "topics": {"gear": SAILING[::2], "weather": SAILING[1::2]}}]
    return Routes.model_validate({"routes": listed, "none": {"examples": none or []}})


def learned(none: list[str] | None = None) -> Semantics:
    known = routes(none)
    return Semantics.learn(known, embed([each.text for each in known.labelled]))


def choose(semantics: Semantics, text: str) -> Match:
    return semantics.choose(text, embed([text])[0])


@pytest.mark.parametrize(
    ("text", "route"), [("bread and flour", "baking"), ("boat on the waves", "sailing"), ("BREAD in my OVEN", "baking")]
)
def test_what_is_like_the_examples_of_a_route_takes_it(text: str, route: str) -> None:
    match = choose(learned(), text)
    assert match.route == route
    assert match.confidence == max(match.scores.values()) == match.scores[route]
    assert match.runner_up != route
    assert list(match.scores) == ["baking", "sailing", DEFAULT]
    assert sum(match.scores.values()) == pytest.approx(1, abs=0.001)


def test_examples_that_say_the_same_again_and_again_make_nothing_else_strange() -> None:
    echoes = [f"{each}{more}" for each in ("bake bread", "bake a cake", "knead dough") for more in ("", " please", " now", " for me")]
    sails = [f"{each}{more}" for each in ("sail a boat", "anchor a boat", "wind on the sea") for more in ("", " please", " now", " for me")]
    known = Routes.model_validate({"routes": [{"name": "baking", "examples": echoes}, {"name": "sailing", "examples": sails}]})
    semantics = Semantics.learn(known, embed([each.text for each in known.labelled]))
    assert choose(semantics, "how long does the bread bake").route == "baking"
    assert choose(semantics, "qwertz uiop").route == DEFAULT


def test_what_is_like_the_examples_of_none_goes_to_the_default() -> None:
    semantics = learned(ELSEWHERE)
    assert choose(semantics, "my bank bill").route == DEFAULT
    assert choose(semantics, "bread dough").route == "baking"
    assert choose(semantics, "my bank bill").familiarity < choose(semantics, "bread dough").familiarity


def test_what_is_like_nothing_goes_to_the_default_though_no_example_says_so() -> None:
    match = choose(learned(), "xyzzy plugh")
    assert match.route == DEFAULT
    assert match.runner_up != DEFAULT
    assert 0 <= match.confidence <= 1


def test_learning_the_same_gives_the_same() -> None:
    assert choose(learned(ELSEWHERE), "flour on the boat") == choose(learned(ELSEWHERE), "flour on the boat")


def test_cues_say_what_is_asked_for_whatever_it_is_about() -> None:
    listed = [
        {"name": "writing", "examples": ["write a poem about cats", "write a poem about rain", "write a poem about hope"]},
        {"name": "animals", "examples": ["cats sleep", "cats eat fish", "how old do cats get"]},
    ]
    known = Routes.model_validate({"cues": {"write": r"\bwrite\b"}, "routes": listed})
    semantics = Semantics.learn(known, embed([each.text for each in known.labelled]))
    assert choose(semantics, "write a poem about how cats sleep").route == "writing"


def test_vectors_that_are_not_of_the_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 vectors for 12 examples"):
        Semantics.learn(routes(), embed(["a", "b", "c"]))


def test_a_route_is_the_sum_of_its_groups_or_its_best_one() -> None:
    scores = np.array([[0.2, 0.3, 0.4]], np.float32)
    assert Pooling((0, 0, 1), 3, best=False)(scores)[0].tolist() == pytest.approx([0.5, 0.4, 0])
    assert Pooling((0, 0, 1), 3, best=True)(scores)[0].tolist() == pytest.approx([0.3, 0.4, 0])


def test_the_baseline_has_one_mean_a_route() -> None:
    known = routes()
    names, means = centroids(known, embed([each.text for each in known.labelled]))
    assert names == ("baking", "sailing")
    assert np.linalg.norm(means, axis=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (embed(["bread"]) @ means.T).argmax() == 0


# --- learning ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(4, 12))
def test_the_answer_for_an_example_left_out_is_what_learning_without_it_gives(seed: int, count: int) -> None:
    chance = np.random.default_rng(seed)
    points = chance.normal(size=(count, 3))
    kernel = np.exp(-((points[:, None] - points[None]) ** 2).sum(axis=2))
    targets = chance.normal(size=(count, 2))
    _, unseen = ridge(kernel, targets, 0.3)
    for left_out in range(count):
        kept = [index for index in range(count) if index != left_out]
        weights = np.linalg.solve(kernel[np.ix_(kept, kept)] + 0.3 * np.eye(count - 1), targets[kept])
        assert unseen[left_out].tolist() == pytest.approx((kernel[left_out, kept] @ weights).tolist(), abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_examples_are_as_like_one_another_one_by_one_as_all_at_once(texts: list[str]) -> None:
    examples = Examples.of(texts, embed(texts), (r"\bde\b", "a+"), Weights())
    mutual = examples.mutual()
    for row, text, vector in zip(mutual, texts, embed(texts), strict=True):
        assert examples.likeness(text, vector).tolist() == pytest.approx(row.tolist(), abs=1e-3)
    assert np.allclose(mutual, mutual.T, atol=1e-5)


@pytest.mark.parametrize("side", ["meaning", "words", "signs"])
def test_each_side_of_a_text_counts_by_its_weight(side: str) -> None:
    texts = ["sail a boat", "2 + 2 = ?"]
    only = Weights(**{**dict.fromkeys(("meaning", "words", "signs"), 0.0), side: 1.0})
    assert Examples.of(texts, embed(texts), (), only).mutual()[0, 1] < 0.8
    assert Examples.of(texts, embed(texts), (), Weights(0, 0, 0)).mutual()[0, 1] == 1


def test_sharpness_turns_scores_into_the_share_that_is_right() -> None:
    chance = np.random.default_rng(7)
    scores = chance.normal(size=(4000, 3)).astype(np.float32)
    shares = softmax(scores, 4.0)
    labels = np.array([chance.choice(3, p=row / row.sum()) for row in shares.astype(np.float64)])
    assert fit_sharpness(scores, labels).sharpness == pytest.approx(4, rel=0.15)


def test_classes_become_columns() -> None:
    assert one_hot([1, 0], 3).tolist() == [[0, 1, 0], [1, 0, 0]]


# --- the form of a text ----------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_the_form_of_any_text_is_numbers_from_0_to_1_and_its_terms_have_length_1(text: str) -> None:
    folded = fold(text)
    assert fold(folded) == folded
    assert all(0 <= number <= 1 for number in form(folded))
    found = terms(folded)
    assert all(0 <= place < PLACES for place in found)
    assert sum(value**2 for value in found.values()) == pytest.approx(1 if found else 0, abs=1e-6)


def test_accents_and_capitals_make_no_difference_and_of_a_long_text_both_ends_count() -> None:
    assert fold("¿Cuál es la RAÍZ?") == "¿cual es la raiz?"
    assert fold("𝐂ó𝐝𝐢𝐠𝐨 ϒ") == "codigo υ"
    long = fold("begin " + "x" * 100_000 + " end")
    assert long.startswith("begin")
    assert long.endswith("end")
    assert len(long) < 4000


def test_a_cue_counts_and_counts_more_at_the_beginning() -> None:
    cue = [re.compile("poem")]
    assert cued("write a poem", cue) == [1.0, 1.0]
    assert cued("a b c d e f g poem", cue) == [1.0, 0.0]
    assert cued("nothing", cue) == [0.0, 0.0]


# --- conversations ---------------------------------------------------------------------------------------------


def talk(*texts: str) -> list[ChatMessage]:
    roles = ("user", "assistant")
    return [ChatMessage(role=roles[index % 2], content=text) for index, text in enumerate(texts)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "subject"),
    [
        (("How do I sort a list in Python?", "So.", "and in Java?"), "and in Java?\nHow do I sort a list in Python?"),
        (("¿Cómo ordeno una lista en Python?", "Así.", "¿y en Java?"), "¿y en Java?\n¿Cómo ordeno una lista en Python?"),
        (("Write a poem about the sea", "Sea!", "shorter please"), "shorter please\nWrite a poem about the sea"),
        (("Escribe un poema sobre el mar", "¡Mar!", "hazlo más triste"), "hazlo más triste\nEscribe un poema sobre el mar"),
        (("Sort a list in Python", "..", "and in Java?", "..", "and C?"), "and C?\nand in Java?\nSort a list in Python"),
        (("Sort a list in Python", "..", "thanks!"), "thanks!"),
        (("Sort a list in Python", "..", "gracias, crack"), "gracias, crack"),
        (("Sort a list in Python", "..", "What is the capital of Peru?"), "What is the capital of Peru?"),
        (("Ordena una lista", "..", "¿cuál es la capital de Perú?"), "¿cuál es la capital de Perú?"),
        (("and in Java?",), "and in Java?"),
        ((), ""),
    ],
)
def test_a_follow_up_is_about_what_was_asked_before(texts: tuple[str, ...], subject: str) -> None:
    assert subject_of(talk(*texts)) == subject


def test_only_what_users_say_counts() -> None:
    messages = [ChatMessage(role="system", content="You write code."), ChatMessage(role="user", content=" hola "), ChatMessage(role="user")]
    assert subject_of(messages) == "hola"


def test_of_a_long_text_the_two_ends_are_read() -> None:
    pasted = "Summarise this: " + "bla " * 1000 + "Thanks, and in French."
    assert subject_of(talk(pasted)).startswith("Summarise this: bla")
    assert subject_of(talk(pasted)).endswith("Thanks, and in French.")
    assert len(gist(pasted)) < 400
    assert gist("short") == "short"


@pytest.mark.parametrize("text", ["why?", "and now with tests", "pero en francés", "can you optimize it?", "otra vez", "explícalo mejor"])
def test_what_makes_no_sense_alone(text: str) -> None:
    assert is_elliptic(text)


@pytest.mark.parametrize(
    "text", ["hola", "lol", "thank you", "write a function that sorts it and tests every case", "capital de Francia", "if a:\nb"]
)
def test_what_does(text: str) -> None:
    assert not is_elliptic(text)


# --- figures ---------------------------------------------------------------------------------------------------


def test_figures_of_quality_are_as_their_formulas_say() -> None:
    truth, told = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    assert quality.accuracy(truth, told) == 0.5
    assert quality.per_class(truth, told)["b"] == {"n": 1, "precision": 0.3333, "recall": 1.0, "f1": 0.5}
    assert quality.macro_f1(truth, told) == pytest.approx((2 / 3 + 0.5 + 0) / 3, abs=1e-3)
    assert quality.confusion(truth, told) == {"a": {"a": 1, "b": 1}, "b": {"b": 1}, "c": {"b": 1}}
    assert quality.interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert quality.calibration_error([0.9, 0.9, 0.1, 0.1], [True, True, False, False]) == pytest.approx(0.1)
    assert quality.auroc([3, 2], [1, 2]) == 0.875
    assert quality.auroc([], [1]) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=50))
def test_figures_stay_between_0_and_1(pairs: list[tuple[float, bool]]) -> None:
    confidences, right = [one for one, _ in pairs], [other for _, other in pairs]
    assert 0 <= quality.calibration_error(confidences, right) <= 1
    low, high = quality.interval(sum(right) / max(1, len(right)), len(right))
    assert 0 <= low <= high <= 1
