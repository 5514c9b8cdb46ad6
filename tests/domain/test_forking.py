"""Changing a request, and renaming what is copied of a turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.context import context
from capibara_flow.domain.forking import KEYS, changed, copies, forked, parse, renamed
from capibara_flow.domain.record import Entry, Record
from capibara_flow.errors import BadRequest
from topics.chat import CallExpert, ChatMessage, ChatRequest, RouteTurn, Sampling
from topics.knowledge import Passage, Source
from topics.output import Queued, Routed, SourcesFound, Token
from topics.output import parse as parse_output

OLD, NEW = "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F", "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4G"
HOLA = ChatRequest(messages=(ChatMessage(role="user", content="hola"),))


@given(words=st.text(), key=st.sampled_from([key for key in KEYS if key != "collection"]))
def test_only_what_is_named_changes(words: str, key: str):
    if (key == "system" and not words) or (key in {"message", "prompt"} and not words.strip()):
        return
    made = changed(HOLA, [(key, words)])
    if key in {"message", "prompt"}:
        assert made == HOLA.model_copy(update={"messages": (ChatMessage(role="user", content=words),)})
    elif key == "source":
        assert made == HOLA  # it is no part of the request
    elif key == "system":
        assert made.messages == (ChatMessage(role="system", content=words), *HOLA.messages)
    else:
        assert made == HOLA.model_copy(update={"model": words or None})


@given(temperature=st.floats(0, 2), tokens=st.integers(1, 1000), seed=st.integers(-(2**63), 2**63 - 1))
def test_sampling_is_read_from_words(temperature: float, tokens: int, seed: int):
    wanted = [("temperature", repr(temperature)), ("max_tokens", str(tokens)), ("seed", str(seed)), ("stop", '["a", "b"]')]
    expected = Sampling(temperature=temperature, max_tokens=tokens, seed=seed, stop=("a", "b"))
    assert changed(HOLA, wanted).sampling == expected
    assert changed(HOLA, [*wanted, *((key, "") for key, _ in wanted)]) == HOLA


def test_where_sources_are_looked_for_is_changed_by_the_name_of_a_collection():
    made = changed(HOLA, [("collection", " birds ")])
    assert made == HOLA.model_copy(update={"collection": "birds"})
    assert changed(made, [("collection", "")]) == HOLA
    with pytest.raises(BadRequest, match="collection: "):
        changed(HOLA, [("collection", "two words")])


def test_something_must_be_asked_that_can_be_sent():
    for words in ("", " \n"):
        with pytest.raises(BadRequest, match="message: it is empty"):
            changed(HOLA, [("message", words)])
    with pytest.raises(BadRequest, match="message: what is no text"):
        parse("message=\udcff")


def test_what_the_system_said_is_replaced_or_left_out():
    told = changed(HOLA, [("system", "Be brief.")])
    assert changed(told, [("system", "Be long.")]).messages[0].text == "Be long."
    assert changed(told, [("system", "")]) == HOLA
    with pytest.raises(BadRequest):
        changed(ChatRequest(messages=told.messages[:1]), [("system", "")])
    with pytest.raises(BadRequest):
        changed(ChatRequest(messages=told.messages[:1]), [("message", "x")])


@given(text=st.text())
def test_any_words_are_a_change_or_a_clear_refusal(text: str):
    key, sign, value = text.partition("=")
    if sign and key.strip() in {*KEYS, *Sampling.model_fields}:
        assert parse(text) == (key.strip(), value)
    else:
        with pytest.raises(BadRequest, match=r"changed|dropped"):
            parse(text)


@given(words=st.text() | st.just(f'"turn":"{OLD}"') | st.just(OLD))
def test_a_copy_differs_in_its_turn_only(words: str):
    command = RouteTurn(turn=OLD, request=ChatRequest(messages=(ChatMessage(role="user", content=words),), tools=({"turn": OLD},)))
    copy = RouteTurn.read(renamed(command.model_dump_json().encode(), OLD, NEW))
    assert copy == command.model_copy(update={"turn": NEW})


def _grounded() -> Record:
    passages = [Passage(f"p{n}", "d", n, f"Fact number {n}.", 0, 14, title="Facts") for n in (1, 2)]
    sources = tuple(Source(n, passage, 0.5) for n, passage in enumerate(passages, 1))
    call = CallExpert(turn=OLD, expert="phi", bucket=0, request=HOLA, sources=sources, context=context(sources, 1000, language="es").text)
    asked = RouteTurn(turn=OLD, request=HOLA)
    logged = [(f"cf.log.{OLD}.asked.router", asked), (f"cf.log.{OLD}.asked.call.phi.0", call)]
    entries = [Entry("CF_LOG", n, float(n), subject, {}, each.model_dump_json().encode()) for n, (subject, each) in enumerate(logged)]
    return Record(OLD, tuple(entries))


def test_what_was_told_before_an_expert_had_it_is_copied_but_for_places_in_a_line():
    routed = Routed(turn=OLD, model_id="phi", route_name="r", complexity="simple", confidence=1, reasoning="x")
    said = [routed, Queued(turn=OLD, expert="phi", position=3), SourcesFound(turn=OLD, sources=()), Token(turn=OLD, text="hi")]
    lines = b"\n".join(each.line() for each in said)
    entries = (*_grounded().entries, Entry("CF_OUT", 9, 9.0, f"cf.out.{OLD}.data.main", {}, lines))
    sent = {stage: [each.data for each in copies(Record(OLD, entries), NEW, stage) if each.opening] for stage in ("retriever", "caller")}
    assert sent["retriever"] == [routed.line().replace(OLD.encode(), NEW.encode())]
    assert [parse_output(each).event for each in sent["caller"]] == ["routed", "sources"]


def test_a_source_can_be_left_out():
    call = forked(_grounded(), NEW, "caller", [parse("source=-1")])[-1].call
    assert call is not None
    assert [source.n for source in call.sources] == [2]
    assert "Fact number 2." in call.context
    assert "Fact number 1." not in call.context
    assert call.context.startswith("Si las fuentes")
    without = forked(_grounded(), NEW, "caller", [("source", "-1"), ("source", "-2")])[-1].call
    assert without is not None
    assert (without.sources, without.context) == ((), "")


@pytest.mark.parametrize(("stage", "value", "told"), [("caller", "-3", "there are 1, 2"), ("router", "-1", "--from caller")])
def test_a_source_that_is_not_there_cannot(stage: str, value: str, told: str):
    with pytest.raises(BadRequest, match=told):
        forked(_grounded(), NEW, stage, [("source", value)])


@pytest.mark.parametrize("text", ["source=2", "source=", "source=-x"])
def test_sources_can_only_be_left_out(text: str):
    with pytest.raises(BadRequest, match="leaves the source"):
        parse(text)
