"""What is looked for, what an engine is asked, and how parts are put together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.grounding import grounded, is_courtesy, put_together, query
from capibara_flow.errors import BadRequest
from topics.chat import CallExpert, ChatMessage, ChatRequest
from topics.grounding import PartDone


def asking(*words: str, system: str = "") -> ChatRequest:
    first = (ChatMessage(role="system", content=system),) if system else ()
    return ChatRequest(messages=(*first, *(ChatMessage(role="user", content=each) for each in words)))


@pytest.mark.parametrize(
    ("asked", "looked"),
    [
        (asking("¿Dónde viven los capibaras del Paraná hoy en día?"), "¿Dónde viven los capibaras del Paraná hoy en día?"),
        (asking("¿Dónde viven?", "¿Y qué comen?"), "¿Dónde viven?\n¿Y qué comen?"),
        (asking("¿Dónde?", "¿Cuántos años puede llegar a vivir un capibara?"), "¿Cuántos años puede llegar a vivir un capibara?"),
        (asking("  "), ""),
    ],
)
def test_the_last_question_is_looked_for_with_the_one_before_if_it_is_short(asked: ChatRequest, looked: str) -> None:
    assert query(asked) == looked


@pytest.mark.parametrize(
    "said", ["hola", "¡Hola, buenos días! ¿Qué tal?", "Muchas gracias.", "Hi! How are you?", "thank you very much", "Adiós"]
)
def test_who_only_greets_thanks_or_takes_leave_asks_nothing_of_documents(said: str) -> None:
    assert is_courtesy(asking("¿Dónde viven los capibaras?", said))


@pytest.mark.parametrize(
    "said", ["hola, ¿dónde viven?", "gracias a quién", "Buenas Tardes Motors", "sí", "¿y luego?", "hiho", "", "?", "hola " * 99]
)
def test_whatever_else_is_said_may_ask_something_of_documents(said: str) -> None:
    assert not is_courtesy(asking(said))


@given(st.text(max_size=9000))
def test_no_question_is_too_long(words: str) -> None:
    assert len(query(asking(words))) <= 2001


def test_the_context_stands_in_the_one_system_message() -> None:
    assert grounded(asking("hola"), "C").messages[0] == ChatMessage(role="system", content="C")
    both = grounded(asking("hola", system="Be brief."), "C").messages
    assert [each.role for each in both] == ["system", "user"]
    assert both[0].text == "Be brief.\n\nC"
    assert grounded(asking("hola"), "") == asking("hola")


def share(part: str, **gives: object) -> PartDone:
    return PartDone(turn="T", step=0, part=part, gives=gives)


def test_parts_are_put_together_and_what_nobody_may_give_is_left_out() -> None:
    call = CallExpert(turn="T", expert="phi", bucket=0, request=asking("hola"))
    made = put_together(call, [share("retriever", context="C"), share("enricher", expert="evil", turn="other")])
    assert made == call.model_copy(update={"context": "C"})
    assert put_together(call, []) is call
    with pytest.raises(BadRequest):
        put_together(call, [share("retriever", sources="none")])
