"""Whether sources have to do with a question."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain import ordinary
from capibara_flow.domain.bm25 import language_of
from capibara_flow.domain.relevance import FLOOR, MANY, OTHER_LANGUAGE, PART, backdrop, granted, related, relevance
from capibara_flow.settings import KnowledgeSettings
from capibara_flow.wiring.knowledge import written
from topics.knowledge import Passage, Source

cosines = st.floats(-1, 1)
shares = st.floats(0, 1)
counts = st.integers(0, 10**7)


def source(*, measure: float | None) -> Source:
    return Source(1, Passage("a", "d", 0, "t", 0, 1), 1.0, {} if measure is None else {PART: measure})


@given(cosines, cosines, shares, counts)
def test_a_nearer_passage_with_more_words_is_never_less_relevant(cosine, level, words, passages):
    here = relevance(cosine, level, words, passages)
    assert relevance(min(1.0, cosine + 0.1), level, words, passages) >= here
    assert relevance(cosine, level, min(1.0, words + 0.1), passages) >= here


@given(cosines, st.floats(-1, 0.95), shares, counts)
def test_the_best_of_many_has_to_be_better_than_the_best_of_few(cosine, level, words, passages):
    assert relevance(cosine, level, words, passages + 1) <= relevance(cosine, level, words, passages)
    assert relevance(cosine, level, words, MANY) < relevance(cosine, level, words, 1) - 0.1
    assert relevance(cosine, level, words, MANY) == relevance(cosine, level, words, 100 * MANY)


@given(st.floats(-0.5, 0.9), st.floats(0.1, 1), st.floats(0, 1))
def test_models_with_wide_and_narrow_cosines_are_measured_alike(level, width, share):
    """What lies *share* of the way between unrelated and the same is as relevant, whatever level the unrelated have."""
    narrow = level + (1 - level) * (1 - width)
    here, there = (relevance(each + share * (1 - each), each, 0.5, 10) for each in (level, narrow))
    assert abs(here - there) < 1e-6


@given(cosines, shares, counts)
def test_a_model_that_tells_nothing_apart_leaves_nobody_without_sources(cosine, words, passages):
    assert relevance(cosine, 1.0, words, passages) >= FLOOR


def test_what_has_nothing_but_the_usual_level_is_not_related():
    assert relevance(0.75, 0.75, 0.0, 1) < FLOOR
    assert relevance(0.85, 0.75, 0.0, 100) > FLOOR


@given(shares)
def test_a_text_in_another_language_need_not_share_the_words(words):
    assert granted(words, "es", "es") == words
    for asked, language in (("es", "en"), ("", "en"), ("", ""), ("es", "")):
        assert granted(words, asked, language) == max(words, OTHER_LANGUAGE)


@given(st.lists(st.floats(-1, 1), min_size=1), shares)
def test_all_sources_stay_or_none(measures, floor):
    sources = [source(measure=each) for each in measures]
    assert related(sources, floor) == (floor == 0 or max(measures) >= floor)


def test_sources_of_an_older_version_stay_and_no_sources_are_none():
    assert related([source(measure=-1.0), source(measure=None)], FLOOR)
    assert not related([], FLOOR)
    assert not related([], 0.0)


def test_the_level_is_the_mean_cosine_with_ordinary_texts_of_a_language():
    rows = {"es": np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), "en": np.array([[0.6, 0.8]], np.float32)}
    levels = backdrop(rows).levels(np.array([1.0, 0.0], np.float32))
    assert {name: round(level, 4) for name, level in levels.items()} == {"es": 0.5, "en": 0.6, "": 0.55}


def test_ordinary_texts_say_as_much_in_each_language():
    assert len({len(texts) for texts in ordinary.TEXTS.values()}) == 1
    assert {language_of(text) for text in ordinary.TEXTS["es"]} == {"es"}
    assert {language_of(text) for text in ordinary.TEXTS["en"]} == {"en"}


@pytest.mark.parametrize(("floor", "stays"), [(0.0, True), (0.2, True), (0.3, False)])
def test_a_prompt_takes_sources_that_reach_the_floor(floor, stays):
    kept, text = written(KnowledgeSettings(relevance=floor), [source(measure=0.25)], "¿t?")
    assert (len(kept), bool(text)) == (int(stays), stays)


def test_the_setting_s_default_is_the_floor_that_was_measured():
    assert KnowledgeSettings().relevance == FLOOR
