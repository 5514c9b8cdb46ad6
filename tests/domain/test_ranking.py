"""One order from several finders."""

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.linking import Path
from capibara_flow.domain.ranking import Found, Weights, distinct, likeness, normalised, numbered, ranked
from topics.knowledge import Passage

NOW = 1_800_000_000.0
DAY = 86_400.0
ids = st.sampled_from("abcdef")
shares = st.dictionaries(ids, st.floats(0, 1))
paths = st.dictionaries(ids, st.builds(Path, st.floats(0, 1), st.sampled_from(["", "a", "z"]), st.floats(0, 1)))
founds = st.builds(Found, shares, st.floats(-1, 1), shares, shares, paths)


def order(found: Found, updated: dict[str, float], weights: Weights = Weights()) -> list[str]:  # noqa: B008  frozen
    return [id for id, _, _ in ranked(found, updated, NOW, weights)]


@given(founds, st.dictionaries(ids, st.floats(0, 2 * NOW)))
def test_every_passage_is_ranked_once_and_scores_are_bounded(found, updated):
    rows = ranked(found, updated, NOW, Weights())
    assert sorted(id for id, _, _ in rows) == sorted(updated)
    assert [score for _, score, _ in rows] == sorted((score for _, score, _ in rows), reverse=True)
    assert all(-1e-9 <= score <= 1.05 + 1e-9 for _, score, _ in rows)


@given(founds, st.dictionaries(ids, st.floats(0, 2 * NOW), min_size=1))
def test_the_score_is_the_documented_sum(found, updated):
    weights = Weights()
    for _, score, parts in ranked(found, updated, NOW, weights):
        whole = weights.vector * parts["vector"] + weights.graph * parts["graph"] + weights.recency * parts["recency"]
        assert abs(score - whole) < 1e-3


@given(st.dictionaries(ids, st.floats(-100, 100)))
def test_normalised_lie_between_0_and_1_in_the_same_order(scores):
    found = normalised(scores)
    assert all(0 <= each <= 1 for each in found.values())
    assert all(found[one] <= found[other] for one in scores for other in scores if scores[one] <= scores[other])


def test_words_in_one_sentence_break_a_tie_of_meaning():
    found = Found({"a": 0.8, "b": 0.8}, 0.5, {"a": 0.3, "b": 0.3}, {"a": 0.2, "b": 0.9})
    assert order(found, {"a": 0, "b": 0}) == ["b", "a"]


def test_few_shared_words_do_not_outweigh_meaning():
    found = Found({"right": 0.9, "wrong": 0.7}, 0.6, {"wrong": 0.15}, {"wrong": 0.2})
    assert order(found, {"right": 0, "wrong": 0}) == ["right", "wrong"]


def test_the_graph_brings_up_what_is_unlike_the_question():
    film, director, other = "film", "director", "other"
    found = Found({film: 0.9, other: 0.8, director: 0.5}, 0.5, paths={film: Path(0.7), director: Path(0.6, film, 0.9)})
    updated = dict.fromkeys((film, director, other), 0.0)
    assert order(found, updated) == [film, director, other]
    assert order(Found(found.dense, 0.5), updated) == [film, other, director]


def test_what_is_newer_is_before_what_is_alike_and_no_more():
    found = Found({"old": 0.8, "new": 0.8, "better": 0.9}, 0.5)
    assert order(found, {"old": NOW - 1000 * DAY, "new": NOW - DAY, "better": NOW - 4000 * DAY}) == ["better", "new", "old"]
    rows = {id: parts["recency"] for id, _, parts in ranked(found, {"old": NOW - 365 * DAY, "new": NOW + DAY, "better": 0}, NOW, Weights())}
    assert rows == {"old": 0.5, "new": 1.0, "better": 0.0}


def test_weights_are_settings():
    found = Found({"a": 0.9, "b": 0.8}, 0.7, paths={"b": Path(1.0)})
    assert order(found, {"a": 0, "b": 0}, Weights(graph=0.0, named=0.0)) == ["a", "b"]
    assert order(found, {"a": 0, "b": 0}, Weights(vector=0.1, graph=0.9)) == ["b", "a"]


def test_a_cosine_that_says_nothing_counts_nothing():
    assert likeness(Found({"a": 0.7, "b": 0.8}, 0.7), "abc", Weights()) == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_near_duplicates_are_merged():
    text = " ".join(f"word{index}" for index in range(40))
    passages = {
        "a": Passage("a", "d", 0, text, 0, 1),
        "copy": Passage("copy", "e", 0, text.upper() + "!", 0, 1),
        "other": Passage("other", "d", 1, "quite something else", 0, 1),
    }
    assert distinct(["a", "copy", "gone", "other"], passages, 10, 0.9) == ["a", "other"]
    assert distinct(["copy", "a", "other"], passages, 1, 0.9) == ["copy"]


def test_sources_are_numbered_from_1():
    passages = {id: Passage(id, "d", 0, id, 0, 1) for id in "abc"}
    rows = [("c", 0.9, {"vector": 1.0}), ("b", 0.5, {}), ("a", 0.1, {})]
    found = numbered(rows, ["a", "c"], passages)
    assert [(source.n, source.passage.id, source.score) for source in found] == [(1, "c", 0.9), (2, "a", 0.1)]
