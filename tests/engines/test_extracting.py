"""An expert lists names; what it makes up does not count, and where it talks nonsense the rules answer."""

import pytest

from capibara_flow.domain.entities import mentions
from capibara_flow.engines.extracting import FORMAT, ExpertExtractor
from capibara_flow.errors import BadRequest, EngineBusy
from tests.fakes import FakeEngine, spoken
from topics.knowledge import Mention, Passage

PASSAGE = Passage("p", "d", 0, "La pintora frida kahlo vivió en Coyoacán.", 0, 40)


def said(answer: str) -> FakeEngine:
    return FakeEngine(spoken(*answer))


async def test_names_are_those_that_stand_in_the_text() -> None:
    engine = said('{"names": ["Frida Kahlo", "Coyoacán", "Diego Rivera", "coyoacan", ""]}')
    made = await ExpertExtractor(engine)([PASSAGE], "Una vida (libro)")
    assert made == [
        Mention("p", "una vida libro", "Una vida (libro)", about=True),
        Mention("p", "una vida", "Una vida", about=True),
        Mention("p", "frida kahlo", "Frida Kahlo"),
        Mention("p", "coyoacan", "Coyoacán"),
    ]
    (request,) = engine.requests
    assert request.response_format == FORMAT
    assert request.sampling.temperature == 0
    assert PASSAGE.text in request.question


@pytest.mark.parametrize("answer", ["", "Sure! Here you are.", '{"names": [1', '{"names": "x"}', "[]"])
async def test_where_the_answer_cannot_be_read_the_rules_answer(answer: str) -> None:
    assert await ExpertExtractor(said(answer))([PASSAGE], "Una vida") == mentions([PASSAGE], "Una vida")


async def test_a_question_that_is_refused_is_answered_by_rule_and_a_busy_engine_is_asked_again() -> None:
    assert await ExpertExtractor(FakeEngine(error=BadRequest("no schema")))([PASSAGE], "T") == mentions([PASSAGE], "T")
    with pytest.raises(EngineBusy):
        await ExpertExtractor(FakeEngine(error=EngineBusy("later")))([PASSAGE] * 9, "T")
