"""Chat templates for engines that take a bare prompt: pure functions from messages to text.

The beginning-of-sequence token is left out: llama-server adds it where the model wants one. Control tokens inside a
message are removed, so that nobody can speak in another role; a trailing assistant message is left open to be continued.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from capibara_flow.settings import SettingsError
from topics.chat import ChatMessage

#: A role and what it says.
Saying = tuple[str, str]


@dataclass(frozen=True)
class Template:
    """How a family of models wants its prompt: *render* gets sayings and whether the last one stays open."""

    render: Callable[[Sequence[Saying], bool], str]
    controls: tuple[str, ...]
    stops: tuple[str, ...]

    def prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that lets the assistant speak next."""
        sayings = [(message.role, self._harmless(message.text)) for message in messages]
        return self.render(sayings, bool(sayings) and sayings[-1][0] == "assistant")

    def _harmless(self, text: str) -> str:
        while any(control in text for control in self.controls):
            for control in self.controls:
                text = text.replace(control, "")
        return text


def template(name: str) -> Template:
    """The template called *name*; raises ``SettingsError`` naming those that exist."""
    found = TEMPLATES.get(name.replace("-", "_"))
    if found is None:
        raise SettingsError(f"no chat template is called {name!r}; there are: {', '.join(sorted(TEMPLATES))}")
    return found


def _tagged(begin: str, middle: str, end: str) -> Callable[[Sequence[Saying], bool], str]:
    """Each saying is *begin*, its role, *middle*, its text, *end*."""

    def render(sayings: Sequence[Saying], is_open: bool) -> str:
        turns = [f"{begin}{role}{middle}{text}{end}" for role, text in sayings]
        if is_open:
            return "".join(turns).removesuffix(end)
        return "".join([*turns, f"{begin}assistant{middle}"])

    return render


def _folded(sayings: Iterable[Saying]) -> list[Saying]:
    """For models without a system role: its text opens the next user message, and a tool's result is a user's word."""
    folded: list[Saying] = []
    system = ""
    for role, text in sayings:
        if role == "system":
            system += f"{text}\n\n"
        elif role == "assistant":
            folded.append((role, text))
        else:
            folded.append(("user", system + text))
            system = ""
    return [*folded, ("user", system.rstrip())] if system else folded


def _mistral(sayings: Sequence[Saying], is_open: bool) -> str:
    turns = [f"[INST] {text} [/INST]" if role == "user" else f" {text}</s>" for role, text in _folded(sayings)]
    return "".join(turns).removesuffix("</s>") if is_open else "".join(turns)


def _llama2(sayings: Sequence[Saying], is_open: bool) -> str:
    system = "\n".join(text for role, text in sayings if role == "system")
    turns = _folded(saying for saying in sayings if saying[0] != "system")
    if system:
        at = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
        first = turns[at][1] if turns and turns[at][0] == "user" else ""
        turns[at : at + bool(first)] = [("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}")]
    prompt = "".join(f"[INST] {text} [/INST]" if role == "user" else f" {text} </s><s>" for role, text in turns)
    return prompt.removesuffix(" </s><s>") if is_open else prompt


def _gemma(sayings: Sequence[Saying], is_open: bool) -> str:
    named = [("model" if role == "assistant" else role, text) for role, text in _folded(sayings)]
    prompt = "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in named)
    return prompt.removesuffix("<end_of_turn>\n") if is_open else prompt + "<start_of_turn>model\n"


def _harmony(sayings: Sequence[Saying], is_open: bool) -> str:
    """OpenAI's harmony format; the answer is opened in its final channel, since a bare prompt cannot tell channels apart."""
    turns = [
        "<|start|>system<|message|>You are a helpful assistant.\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final.<|end|>"
    ]
    opening = "<|start|>assistant<|channel|>final<|message|>"
    for role, text in sayings:
        if role == "system":
            turns.append(f"<|start|>developer<|message|># Instructions\n\n{text}<|end|>")
        elif role == "assistant":
            turns.append(f"{opening}{text}<|end|>")
        else:
            turns.append(f"<|start|>user<|message|>{text}<|end|>")
    return "".join(turns).removesuffix("<|end|>") if is_open else "".join([*turns, opening])


def _plain(sayings: Sequence[Saying], is_open: bool) -> str:
    turns = "\n\n".join(f"{role.capitalize()}: {text}" for role, text in sayings)
    return turns if is_open else f"{turns}\n\nAssistant:"


_MISTRAL = Template(_mistral, ("[INST]", "[/INST]", "<s>", "</s>"), ("</s>", "[INST]"))
_HARMONY = Template(
    _harmony,
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"),
    ("<|return|>", "<|end|>", "<|call|>", "<|start|>"),
)
TEMPLATES = {
    "chatml": Template(_tagged("<|im_start|>", "\n", "<|im_end|>\n"), ("<|im_start|>", "<|im_end|>"), ("<|im_end|>", "<|im_start|>")),
    "phi": Template(
        _tagged("<|", "|>\n", "<|end|>\n"),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|endoftext|>"),
        ("<|end|>", "<|user|>", "<|endoftext|>"),
    ),
    "phi4_mini": Template(
        _tagged("<|", "|>", "<|end|>"),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|endoftext|>"),
        ("<|end|>", "<|user|>", "<|endoftext|>"),
    ),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "gemma": Template(_gemma, ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>", "<start_of_turn>")),
    "llama2": Template(_llama2, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"), ("</s>", "[INST]")),
    "llama3": Template(
        _tagged("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
        ("<|eot_id|>", "<|start_header_id|>"),
    ),
    "gpt_oss": _HARMONY,
    "harmony": _HARMONY,
    "plain": Template(_plain, (), ("\n\nUser:", "\n\nSystem:", "\nUser:")),
}
