"""BM25 as sparse vectors."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain import bm25
from capibara_flow.ports import Spread
from topics.knowledge import Passage

SPANISH = ["Las casas de la ciudad son antiguas.", "El río corre hacia el mar.", "La nación eligió a su presidenta en Bogotá."]
texts = st.text(max_size=200)


def spread(passages: list[str]) -> Spread:
    rows = [bm25.passage_weights(each) for each in passages]
    return Spread(len(rows), Counter(term for row in rows for term in row))


def scores(question: str, passages: list[str]) -> list[float]:
    weights = bm25.question_weights(bm25.question_words(question), spread(passages))
    return [bm25.product(weights, bm25.passage_weights(each)) for each in passages]


@given(texts, st.sampled_from(["", "es", "en", "ja", "xx"]))
def test_weights_of_a_passage_are_shares_by_terms_that_stores_take(text, language):
    for term, weight in bm25.passage_weights(text, language).items():
        assert 0 <= term < 2**32 - 2
        assert 0 < weight < 1


@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_no_passage_scores_above_all_its_names_twice(question, passages):
    assert all(0 <= each <= 2 + 1e-9 for each in scores(question, passages))


@given(texts, texts)
def test_a_sentence_covers_a_share(question, text):
    words = bm25.question_words(question)
    assert 0 <= bm25.coverage(text, "", words, spread([text])) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("question", "best"),
    [("¿Qué casa es antigua?", 0), ("rios que corren", 1), ("¿A quién eligió la nacion?", 2), ("presidenta de Bogota", 2), ("mares", 1)],
)
def test_spanish_is_found_in_other_forms_and_without_accents(question, best):
    found = scores(question, SPANISH)
    assert found.index(max(found)) == best
    assert found[best] > 0


def test_a_name_is_found_from_a_question_in_another_language():
    passages = ["Frank Sinatra was born in Hoboken.", "The sea is deep and wide."]
    found = scores("¿Dónde nació Frank Sinatra?", passages)
    assert found[0] > found[1] == 0


def test_words_that_no_passage_has_lower_the_score_of_all():
    passages = ["Frank Sinatra sang.", "The sea."]
    assert scores("Sinatra", passages)[0] > 2 * scores("Sinatra zzz qqq", passages)[0] > 0


def test_small_words_count_only_where_there_are_no_others():
    assert [word.text for word in bm25.question_words("what is the capital of it") if word.telling] == ["capital"]
    assert all(word.telling for word in bm25.question_words("to be or not to be"))
    assert [word.text for word in bm25.question_words("Was it written by The Who") if word.telling] == ["written", "The", "Who"]


def test_a_word_that_is_rare_weighs_more():
    passages = ["red car"] * 9 + ["blue car"]
    words = bm25.question_words("blue car")
    assert bm25.rarity(words[0], spread(passages)) > bm25.rarity(words[1], spread(passages)) > 0


def test_more_of_a_word_counts_ever_less_and_length_against_it():
    one, two, nine = (bm25.passage_weights("sea " * count, "en")[bm25.question_words("sea", "en")[0].terms[0]] for count in (1, 2, 9))
    assert one < two < nine < 1
    assert nine - two < 7 * (two - one)
    assert bm25.passage_weights("sea " + "word " * 300, "en")[bm25.question_words("sea", "en")[0].terms[0]] < one


def test_words_together_cover_more_than_words_apart():
    words, apart = bm25.question_words("the dog of Ana"), "A dog barks. Far away lives Ana."
    both = spread([apart, "Ana has a dog."])
    assert bm25.coverage("Ana has a dog.", "en", words, both) == pytest.approx(1.0)
    assert bm25.coverage(apart, "en", words, both) < 0.8
    assert bm25.coverage("It barks.", "en", words, both, above="Ana's dog") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "language"),
    [("¿Dónde está?", "es"), ("where is the sea", "en"), ("el mar de los niños", "es"), ("Sinatra", ""), ("", ""), ("1234", "")],
)
def test_tells_spanish_from_english(text, language):
    assert bm25.language_of(text) == language


def test_a_passage_is_found_by_what_it_stands_under():
    passage = Passage("p", "d", 0, "Text.", 0, 5, headings=("Title", "Part"), title="Title")
    assert bm25.searchable(passage) == "Title\nPart\nText."
    assert bm25.searchable(Passage("p", "d", 0, "Text.", 0, 5)) == "Text."


def test_a_very_long_question_is_read_in_part():
    assert len(bm25.question_words("word " * 10_000)) == 256
