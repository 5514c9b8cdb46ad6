"""Routing: who is named is honoured, rules come next, and nobody gets images or tools who cannot take them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.fleet import AUTO, Fleet
from capibara_flow.domain.routing import DEFAULT, Understood, candidates, choose, lacks, needs_reading, wants
from capibara_flow.errors import BadRequest, UnknownExpert
from topics.chat import ChatRequest, Decision

PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOLS = ({"type": "function", "function": {"name": "weather"}},)
FLEET = Fleet.model_validate(
    {
        "experts": [
            {"name": "plain", "urls": ["http://h:1"], "aliases": ["simple"]},
            {"name": "painter", "urls": ["http://h:2"], "modalities": ["text", "image"]},
            {"name": "coder", "urls": ["http://h:3"], "tools": True},
            {"name": "retired", "urls": ["http://h:4"], "active": False},
        ],
        "rules": [
            {"route": "old", "expert": "retired", "patterns": ["python"]},
            {"route": "code", "expert": "coder", "patterns": [r"\bpython\b", r"\bloop\b"]},
            {"route": "art", "expert": "painter", "patterns": ["paint", "loop"]},
        ],
    }
)
BLIND = Fleet.model_validate({"experts": [{"name": "plain", "urls": ["http://h:1"]}]})


def request(text: str = "hello", model: str | None = None, *, image: bool = False, tools: bool = False) -> ChatRequest:
    content: Any = [{"type": "text", "text": text}, PIXEL] if image else text
    body = {"messages": [{"role": "user", "content": content}], "model": model, "tools": TOOLS if tools else ()}
    return ChatRequest.model_validate(body)


def decide(asked: ChatRequest, fleet: Fleet, understood: Understood | None = None) -> Decision:
    return choose(asked, fleet, understood).decision


@pytest.mark.parametrize("model", ["plain", "simple"])
def test_a_named_expert_is_honoured_whatever_the_rules_say(model: str) -> None:
    decision = decide(request("a python loop to paint", model), FLEET)
    assert (decision.model_id, decision.route_name, decision.confidence) == ("plain", "named", 1.0)


@pytest.mark.parametrize("model", ["nobody", "retired", "Plain", " plain"])
def test_an_unknown_name_is_answered_with_the_known_ones(model: str) -> None:
    with pytest.raises(UnknownExpert) as caught:
        decide(request(model=model), FLEET)
    assert str(caught.value) == f"no expert is called {model!r}; there are: auto, plain, painter, coder"


@pytest.mark.parametrize("model", [None, "", "auto", "AUTO", "Capibara"])
def test_without_a_name_the_first_rule_that_matches_decides(model: str | None) -> None:
    assert wants(request(model=model), FLEET) is None
    assert decide(request("a PYTHON loop", model), FLEET).model_id == "coder"
    assert decide(request("paint me", model), FLEET).route_name == "art"


def test_what_no_rule_claims_goes_to_the_default() -> None:
    decision = decide(request("pythonic"), FLEET)
    assert (decision.model_id, decision.route_name) == ("plain", "default")


def test_rules_look_at_the_last_user_message_only() -> None:
    conversation = [("user", "python"), ("assistant", "loop"), ("user", "thanks"), ("assistant", "paint")]
    asked = ChatRequest.model_validate({"messages": [{"role": role, "content": text} for role, text in conversation]})
    assert decide(asked, FLEET).route_name == "default"


def test_an_image_passes_over_rules_and_defaults_that_cannot_see() -> None:
    assert decide(request("a python question", image=True), FLEET).model_id == "painter"
    assert decide(request("a loop", image=True), FLEET).route_name == "art"


def test_an_image_for_whoever_cannot_see_is_refused() -> None:
    with pytest.raises(BadRequest, match="plain does not take images"):
        decide(request(model="plain", image=True), FLEET)
    with pytest.raises(BadRequest, match="no expert of this fleet takes images"):
        decide(request(image=True), BLIND)


def test_tools_pass_over_rules_and_defaults_that_cannot_call_them() -> None:
    assert decide(request("hello", tools=True), FLEET).model_id == "coder"
    assert decide(request("paint me", tools=True), FLEET).route_name == "default"
    assert decide(request("a loop", tools=True), FLEET).route_name == "code"


def test_tools_for_whoever_cannot_call_them_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"^plain does not take tools$"):
        decide(request(model="simple", tools=True), FLEET)
    with pytest.raises(BadRequest, match=r"^plain does not take images and tools$"):
        decide(request(model="plain", image=True, tools=True), FLEET)
    with pytest.raises(BadRequest, match=r"^painter does not take tools$"):
        decide(request(model="painter", image=True, tools=True), FLEET)
    with pytest.raises(BadRequest, match=r"^no expert of this fleet takes images and tools$"):
        decide(request(image=True, tools=True), FLEET)


def test_an_empty_list_of_tools_asks_for_nothing() -> None:
    assert decide(request(model="plain"), FLEET).model_id == "plain"


def test_the_plan_calls_whoever_was_chosen() -> None:
    steps = choose(request(model="coder"), FLEET).plan().steps
    assert [(step.stage, step.expert) for step in steps] == [("caller", "coder")]


def test_a_grounded_plan_looks_for_sources_first() -> None:
    steps = choose(request(model="coder"), FLEET).plan(grounded=True).steps
    assert [step.stage for step in steps] == ["retriever", "caller"]


LADDER = Fleet.model_validate(
    {
        "experts": [
            {"name": "small", "urls": ["http://h:1"], "aliases": ["s"]},
            {"name": "large", "urls": ["http://h:2"]},
            {"name": "seer", "urls": ["http://h:3"], "modalities": ["text", "image"]},
            {"name": "retired", "urls": ["http://h:4"], "active": False},
        ],
        "rules": [{"route": "greeting", "expert": "small", "patterns": ["^hola$"], "then": ["large", "retired", "small"]}],
        "then": ["seer"],
        "policy": {
            "programming": {
                "simple": "s",
                "moderate": ["retired", "small", "large"],
                "complex": "large",
                "very_complex": {"consensus": ["large", "small"]},
            },
            DEFAULT: "small",
        },
    }
)


def about(route: str, complexity: str = "moderate") -> Understood:
    return Understood(route, complexity, 0.93456, "it is nearest to that")  # type: ignore[arg-type]


def test_the_policy_tells_who_answers_what_by_route_and_complexity() -> None:
    chosen = choose(request("a loop"), LADDER, about("programming", "complex"))
    assert chosen.decision == Decision(
        model_id="large", route_name="programming", complexity="complex", confidence=0.9346, reasoning="it is nearest to that"
    )
    assert chosen.alternatives == ("seer",)
    assert decide(request("a loop"), LADDER, about("programming", "simple")).model_id == "small"


def test_whoever_is_not_active_is_passed_over_and_the_others_take_over_in_order() -> None:
    chosen = choose(request("a loop"), LADDER, about("programming"))
    assert (chosen.decision.model_id, chosen.alternatives) == ("small", ("large", "seer"))


def test_a_route_without_a_row_and_what_belongs_to_none_have_the_default_row() -> None:
    assert decide(request("a poem"), LADDER, about("poetry", "very_complex")).model_id == "small"
    assert decide(request("asdf"), LADDER, about(DEFAULT)).model_id == "small"
    bare = LADDER.model_copy(update={"policy": {}})
    assert decide(request("asdf"), bare, about(DEFAULT)).model_id == "small"


def test_a_wanted_consensus_without_a_voter_is_told() -> None:
    chosen = choose(request("a loop"), LADDER, about("programming", "very_complex"))
    assert chosen.decision.model_id == "large"
    assert "a consensus of large, small is wanted" in chosen.decision.reasoning
    assert chosen.alternatives == ("small", "seer")


def test_an_image_goes_past_the_policy_to_who_can_see() -> None:
    chosen = choose(request("a loop", image=True), LADDER, about("programming"))
    assert (chosen.decision.model_id, chosen.alternatives) == ("seer", ())


def test_rules_and_names_come_before_what_was_understood() -> None:
    chosen = choose(request("hola"), LADDER, about("programming", "complex"))
    assert (chosen.decision.route_name, chosen.decision.model_id, chosen.alternatives) == ("greeting", "small", ("large",))
    assert decide(request("a loop", "seer"), LADDER, about("programming")).model_id == "seer"


def test_a_question_is_read_only_where_that_can_make_a_difference() -> None:
    assert needs_reading(request("a loop"), LADDER)
    assert not needs_reading(request("hola"), LADDER)
    assert not needs_reading(request("a loop", "seer"), LADDER)
    assert not needs_reading(request("a poem"), FLEET)


models = st.none() | st.text(max_size=20) | st.sampled_from(["plain", "simple", "painter", "coder", "retired", *AUTO])


@given(st.text(), models, st.booleans(), st.booleans(), st.sampled_from([FLEET, BLIND]))
def test_routing_decides_or_refuses_and_nothing_else(text: str, model: str | None, image: bool, tools: bool, fleet: Fleet) -> None:
    asked = request(text, model, image=image, tools=tools)
    try:
        decision = decide(asked, fleet)
    except (BadRequest, UnknownExpert) as refusal:
        with pytest.raises(type(refusal)):
            candidates(asked, fleet)
        return
    expert = fleet.find(decision.model_id)
    assert expert in candidates(asked, fleet)
    assert expert is not None
    assert not lacks(asked, expert)
    named = wants(asked, fleet)
    assert named is None or named is expert


def test_a_rule_for_somebody_who_cannot_see_does_not_keep_an_image_from_being_read() -> None:
    assert needs_reading(request("hola", image=True), LADDER)


def test_of_those_who_can_answer_the_dearest_comes_first() -> None:
    experts = [{"name": name, "urls": ["http://h:1"], "priority": priority} for name, priority in (("a", 1), ("b", 5), ("c", 3))]
    assert [each.name for each in candidates(request(), Fleet.model_validate({"experts": experts}))] == ["a", "b", "c", "a"]
