"""What two turns differ in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.differences import DECISIONS, Difference, decisive, differences, worded
from capibara_flow.domain.record import Record
from tests.domain.kept import Kept, passed_on, plain
from topics.chat import ChatMessage, ChatRequest, Sampling
from topics.grounding import SourcesRetrieved
from topics.knowledge import Passage, Source

TOLD = [plain(), passed_on(), plain(expert="two"), Kept().asked(), Kept().asked().routed("two", confidence=0.9).taken().words("a").done()]


def found(one: Record, other: Record) -> dict[tuple[str, str], tuple[object, object]]:
    return {(each.where, each.what): (each.before, each.after) for each in differences(one, other)}


def test_the_same_twice_differs_in_nothing_though_it_took_longer() -> None:
    slow = Kept(turn="01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4G").wait(3)
    assert differences(plain().record, plain(slow).record) == ()


def test_every_stage_tells_what_it_did_otherwise() -> None:
    asked = ChatRequest(messages=(ChatMessage(role="user", content="count to six"),), sampling=Sampling(temperature=0.5))
    other = Kept().asked(asked).wait(0.1).routed("two", confidence=0.9).called("two", request=asked).wait(0.1).taken()
    other.words("one", "three").done("length", expert="two", tokens=9).account("length", expert="two", lasted=0.1)
    told = found(plain().record, other.record)
    assert told["request", "messages[0].content"] == ("count to five", "count to six")
    assert told["request", "sampling.temperature"] == (None, 0.5)
    assert told["decision", "model_id"] == ("one", "two")
    assert told["decision", "confidence"] == (0.5, 0.9)
    assert told["expert", "answered"] == ("one", "two")
    assert told["sampling", "temperature"] == (None, 0.5)
    assert told["attempts", "main[1]"] == ("one stop", "two length")
    assert told["outcome", "outcome"] == ("stop", "length")
    assert told["usage", "completion_tokens"] == (2, 9)
    assert told["text", "text"] == ("onetwo", "onethree")


def test_a_decision_is_told_from_a_consequence() -> None:
    assert decisive(differences(plain().record, plain(expert="two").record))
    assert not decisive(differences(plain().record, plain(text="other words").record))
    assert set(DECISIONS) == {"decision", "plan", "sources", "expert"}


def test_a_source_that_was_dropped_is_a_decision() -> None:
    def grounded(*ids: str) -> Record:
        passages = [Passage(id=each, document="d", number=0, text="", start=0, end=0, title="Ducks") for each in ids]
        sources = tuple(Source(n=n, passage=passage, score=1.0) for n, passage in enumerate(passages, 1))
        return Kept().asked().routed().called("one", sources=sources).record

    [found] = differences(grounded("d:1", "d:2"), grounded("d:1"))
    assert found == Difference("sources", "passages", ["Ducks d:1", "Ducks d:2"], ["Ducks d:1"])
    assert found.decides


def test_what_an_expert_was_asked_is_told_where_the_question_stayed_as_it_was() -> None:
    words = ChatRequest(messages=(ChatMessage(role="user", content="count to six"),), collection="birds")
    one, other = Kept().asked().called("one").record, Kept().asked().called("one", request=words).record
    assert found(one, other) == {
        ("call", "messages[0].content"): ("count to five", "count to six"),
        ("call", "collection"): ("default", "birds"),
    }
    assert not decisive(differences(one, other))
    asked = Kept().asked(words).called("one", request=words).record
    assert {where for where, _ in found(one, asked)} == {"request"}  # once is enough
    assert {where for where, _ in found(one, Kept().asked().record)} == {"expert"}  # nobody was asked anything


def test_a_call_that_came_after_the_turn_was_stopped_was_asked_of_nobody() -> None:
    stopped = Kept().asked().wait(0.1).taken("undertaker@b:2").done("cancelled", expert="")
    before = stopped.record
    told = found(before, stopped.wait(0.1).called("one").record)
    assert told == {("expert", "answered"): ("", "one")}  # who was to answer, as far as it is known


def test_what_stood_in_the_way_of_sources_is_told() -> None:
    kept = Kept().asked()
    kept.log(SourcesRetrieved(turn=kept.turn, collection="default", sources=(), problem="away", started=1.0, ended=2.0))
    told = found(kept.called("one").record, Kept().asked().called("one").record)
    assert told == {("sources", "problem"): ("away", None)}


def test_the_output_alone_tells_the_decision_too() -> None:
    told = found(plain().without("CF_LOG"), plain(expert="two").without("CF_LOG"))
    assert told["decision", "model_id"] == ("one", "two")
    assert not [what for where, what in found(plain().record, plain().without("CF_LOG")) if where == "decision"]


@pytest.mark.parametrize("one", TOLD)
@pytest.mark.parametrize("other", TOLD)
def test_to_compare_the_other_way_round_swaps_both_sides(one: Kept, other: Kept) -> None:
    there = differences(one.record, other.record)
    back = {(each.where, each.what): each for each in differences(other.record, one.record)}
    assert len(there) == len(back)
    assert all(back[each.where, each.what] == Difference(each.where, each.what, each.after, each.before) for each in there)


texts = st.lists(st.sampled_from(["one", "two", "three", "\n", "  ", "tres, ", "🦫", "a" * 30]), max_size=60).map(" ".join)


@given(texts, texts)
def test_both_texts_can_be_read_from_their_words(before: str, after: str) -> None:
    pieces = worded(before, after)
    if before == after:
        assert pieces == []
        return
    assert "".join(piece.text for piece in pieces if piece.how != "after") == before
    assert "".join(piece.text for piece in pieces if piece.how != "before") == after


def test_what_is_far_from_a_change_is_left_out() -> None:
    words = " ".join(map(str, range(100)))
    pieces = worded(f"{words} red {words}", f"{words} blue {words}")
    assert [piece.how for piece in pieces] == ["gap", "same", "before", "after", "same", "gap"]
    assert (pieces[2].text, pieces[3].text, len(pieces[1].text.split())) == ("red ", "blue ", 6)


def test_a_very_long_text_is_compared_by_lines() -> None:
    lines = [f"{number} " * 10 for number in range(2000)]
    pieces = worded("\n".join(lines), "\n".join([*lines[:-1], "end"]))
    assert [piece.how for piece in pieces] == ["gap", "same", "before", "after"]
    assert pieces[-1].text == "end"
