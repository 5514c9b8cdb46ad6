"""From names in a question over two hops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.bm25 import question_words
from capibara_flow.domain.linking import Path, first_hop, leading, linked, names, scarcity, second_hop
from capibara_flow.ports import Spread
from topics.knowledge import Mention

SPREAD = Spread(1000)


def strengths(question: str, *known: str) -> dict[str, float]:
    return linked(question_words(question), dict.fromkeys(known, 1), SPREAD)


def test_the_longest_name_counts():
    assert set(strengths("When did Lothair II's mother die?", "lothair", "lothair ii")) == {"lothair ii"}


def test_a_name_within_another_counts_where_it_stands_alone():
    assert set(strengths("Was Lothair older than Lothair II?", "lothair", "lothair ii")) == {"lothair", "lothair ii"}


def test_several_names_each_have_their_share():
    found = strengths("Who was born earlier, Marjatta Raita or Bruce Coulter?", "marjatta raita", "bruce coulter")
    assert found["marjatta raita"] == pytest.approx(found["bruce coulter"])
    assert 0 < sum(found.values()) <= 1


def test_a_common_noun_is_no_name_unless_nothing_is_written_as_one():
    assert strengths("Who wrote the song about Ana?", "song") == {}
    assert set(strengths("who wrote the song", "song")) == {"song"}
    assert strengths("what is it", "it", "what is it") == {"what is it": pytest.approx(1.0)}


def test_what_nobody_mentions_is_not_linked():
    assert strengths("Where is Narnia?") == {}


@given(st.text(max_size=120), st.lists(st.text(max_size=12), max_size=5))
def test_any_question_can_be_linked(question, known):
    words = question_words(question)
    found = linked(words, dict.fromkeys((*known, *list(names(words))[:3]), 2), SPREAD)
    assert all(0 <= each <= 1 + 1e-9 for each in found.values())


def test_leads_from_the_film_to_its_director():
    first = first_hop({"film": 0.5}, [Mention("F", "film", "Film", True), Mention("X", "film", "Film")], {"film": 2}, 1000, 0.0)
    assert first == {"F": Path(0.5**0.5)}
    mentioned = [Mention("F", "director", "Director"), Mention("F", "city", "City"), Mention("F", "alone", "Alone")]
    degrees = {"director": 2, "city": 500, "alone": 1}
    assert leading(first, mentioned, degrees, 1000) == ["director", "city"]
    about = [Mention("D", "director", "Director", True), Mention("C", "city", "City", True), Mention("F", "director", "Director")]
    second = second_hop(first, mentioned, about, degrees, passages=1000, mentioning=0.0)
    assert set(second) == {"D", "C"}
    assert second["D"].over == "F"
    assert second["D"].strength > second["C"].strength


def test_what_only_mentions_an_entity_counts_as_much_as_it_is_told_to():
    mentions = [Mention("A", "e", "E", True), Mention("B", "e", "E")]
    paths = first_hop({"e": 1.0}, mentions, {"e": 2}, 1000, 0.5)
    assert paths["A"].strength > paths["B"].strength > 0


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_scarcity_is_a_share(degree, passages):
    assert 0 < scarcity(min(degree, passages), passages) <= 1 + 1e-9
