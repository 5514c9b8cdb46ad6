"""Chunks of OpenAI's dialect: the short way of a token says the same as the long one."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capibara_flow.domain.turns import turn_id
from capibara_flow.edge import completions
from capibara_flow.edge.completions import Chunks
from capibara_flow.ports import Batch
from topics.output import Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage, parse

T = turn_id(milliseconds=1, entropy=bytes(10), tenant="t")
NASTY = [
    '"',
    "\\",
    '\\"',
    '","',
    ',"reasoning":',
    '"}',
    "\x00",
    "\n",
    "\r\n\r\n",
    "\x1f",
    "\x7f",
    "\u2028",
    "é",
    "\U0001f9ab",
    "\\u0000",
    "data: ",
]

texts = st.sampled_from(NASTY) | st.text() | st.lists(st.sampled_from(NASTY) | st.text(max_size=3), max_size=6).map("".join)
tokens = st.builds(Token, turn=st.just(T), text=texts)
thoughts = st.builds(Token, turn=st.just(T), text=texts, reasoning=texts)
routes = st.builds(
    Routed,
    turn=st.just(T),
    model_id=texts,
    route_name=st.just("r"),
    complexity=st.just("simple"),
    confidence=st.just(1.0),
    reasoning=texts,
)
others = st.sampled_from(
    [
        Reset(turn=T, reason="again"),
        Usage(turn=T, prompt_tokens=3),
        ToolCalled(turn=T, index=0, id="a", name="weather", arguments="{}"),
        Failed(turn=T, title="t", status=500, detail="d"),
    ]
)
answers = st.lists(st.lists(tokens | tokens | thoughts | routes | others, min_size=1, max_size=6), max_size=8)
DONE = Done(turn=T, finish_reason="stop", model_id="phi")


class Unspliced(Chunks):
    """Parses every line, and writes every chunk anew."""

    def _line(self, line: bytes) -> bytes:
        return self._event(parse(line))


def batches(answer: list[list[Output]]) -> list[Batch]:
    lines = [tuple(output.line() for output in outputs) for outputs in [*answer, [DONE]]]
    return [Batch(sequence, each, final=False) for sequence, each in enumerate(lines, 11)]


def said(chunks: Chunks, answer: list[list[Output]]) -> list[Any]:
    """The events of *answer* with their ids, parsed; a chunk that says nothing and one that says an empty text are the same."""
    found: list[Any] = []
    for batch in batches(answer):
        for block in chunks.encode(batch).decode().split("\n\n"):
            *head, line = block.split("\n")
            if line:
                data = line.removeprefix("data: ")
                found.append((head, data if data == "[DONE]" else plain(json.loads(data))))
    return found


def plain(chunk: dict[str, Any]) -> dict[str, Any]:
    for choice in chunk.get("choices", ()):
        if not choice["delta"].get("content"):
            choice["delta"].pop("content", None)
    return chunk


@given(answers, texts, st.booleans())
def test_spliced_chunks_say_what_unspliced_ones_say(answer: list[list[Output]], model: str, usage: bool):
    assert said(Chunks(T, model, usage=usage), answer) == said(Unspliced(T, model, usage=usage), answer)


@given(st.lists(texts.filter(bool), min_size=2), texts, texts)
@example(["a", "b", "c", "d"], "\x00", "\x00")
def test_every_text_arrives_as_it_was_whatever_the_model_is_called(words: list[str], first: str, second: str):
    routed = Routed(turn=T, model_id=second, route_name="r", complexity="simple", confidence=1, reasoning="why")
    half = len(words) // 2
    answer = [[Token(turn=T, text=word)] for word in words]
    found = [chunk for _, chunk in said(Chunks(T, first, usage=False), [*answer[:half], [routed], *answer[half:]])]
    *chunks, end = found
    assert end == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]] == words
    assert [chunk["model"] for chunk in chunks] == [first] * half + [second] * (len(words) - half + 1)


def test_only_what_is_not_a_mere_text_is_parsed(monkeypatch: pytest.MonkeyPatch):
    parsed: list[bytes] = []

    def remembering(line: bytes) -> Output:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(completions, "parse", remembering)
    first, thought = Token(turn=T, text="first"), Token(turn=T, text="a", reasoning="b")
    mere = [Token(turn=T, text=text) for text in NASTY]
    said(Chunks(T, "auto", usage=True), [[first, *mere], [thought], mere])
    assert parsed == [first.line(), thought.line(), DONE.line()]


@given(texts)
def test_a_token_s_line_is_as_the_short_way_expects_it(text: str):
    assert Token(turn=T, text=text).line().startswith(Chunks(T, "auto", usage=False)._token + b'"')
