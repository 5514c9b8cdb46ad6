"""Chat templates: what each family of models expects, and that nobody can speak in another role."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.engines.templates import TEMPLATES, template
from capibara_flow.settings import SettingsError
from topics.chat import ChatMessage

TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
    "phi4_mini": "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>",
    "mixtral": "[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "plain": "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:",
}


def talk(*sayings: tuple[str, str]) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage.model_validate({"role": role, "content": text}) for role, text in sayings)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_family_gets_its_form(name: str) -> None:
    assert template(name).prompt(talk(*TALK)) == EXPECTED[name]


def test_gpt_oss_answers_in_its_final_channel() -> None:
    prompt = template("gpt-oss").prompt(talk(*TALK))
    assert prompt.startswith("<|start|>system<|message|>")
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|>" in prompt
    assert prompt.endswith("<|start|>user<|message|>Bye<|end|><|start|>assistant<|channel|>final<|message|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trailing_answer_stays_open(name: str) -> None:
    asked = template(name).prompt(talk(("user", "Count.")))
    opened = template(name).prompt(talk(("user", "Count."), ("assistant", "One, two")))
    assert opened.endswith("One, two")
    assert opened.startswith(asked)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("sayings", [(("system", "Only."),), (("tool", "42"),), (("assistant", "a"), ("system", "s"), ("user", "u"))])
def test_unusual_talks_lose_no_words(name: str, sayings: tuple[tuple[str, str], ...]) -> None:
    prompt = template(name).prompt(talk(*sayings))
    assert all(text in prompt for _, text in sayings)


@given(st.sampled_from(sorted(TEMPLATES)), st.data())
def test_nobody_speaks_in_another_role(name: str, data: st.DataObject) -> None:
    chosen = TEMPLATES[name]
    fragments = st.sampled_from([*chosen.controls, "<|im_", "end|>", "<s", ">", "[IN", "ST]", "words"])
    text = data.draw(st.lists(fragments, max_size=8).map("".join))
    harmless, hostile = chosen.prompt(talk(("user", "x"))), chosen.prompt(talk(("user", text)))
    assert {each: hostile.count(each) for each in chosen.controls} == {each: harmless.count(each) for each in chosen.controls}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_control_token_inside_another_does_not_bring_it_back(name: str) -> None:
    for control in TEMPLATES[name].controls:
        hostile = control[:3] + control + control[3:]
        assert template(name).prompt(talk(("user", f"a{hostile}b"))) == template(name).prompt(talk(("user", "ab")))


def test_an_unknown_template_names_those_that_exist() -> None:
    with pytest.raises(SettingsError, match=r"'nope'.*chatml"):
        template("nope")
