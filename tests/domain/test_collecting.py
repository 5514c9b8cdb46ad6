"""Folding output events into the answer they amount to."""

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.collecting import Collected
from topics.output import Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage, parse

T = "T"
tokens = st.builds(Token, turn=st.just(T), text=st.text(max_size=5), reasoning=st.none() | st.text(max_size=5))
fragments = st.builds(
    ToolCalled,
    turn=st.just(T),
    index=st.integers(0, 3),
    id=st.none() | st.text("abc", min_size=1, max_size=3),
    name=st.none() | st.text("xyz", min_size=1, max_size=3),
    arguments=st.text(max_size=5),
)
resets = st.builds(Reset, turn=st.just(T), reason=st.just("again"))


def folded(outputs: list[Output]) -> Collected:
    collected = Collected()
    for output in outputs:
        collected.add(output)
    return collected


@given(st.lists(tokens | fragments | resets, max_size=30))
def test_the_answer_is_what_was_said_since_the_last_reset(outputs: list[Output]) -> None:
    collected = folded(outputs)
    start = max((n for n, output in enumerate(outputs) if isinstance(output, Reset)), default=-1) + 1
    kept = outputs[start:]
    assert collected.text == "".join(each.text for each in kept if isinstance(each, Token))
    assert collected.reasoning == "".join(each.reasoning or "" for each in kept if isinstance(each, Token))
    calls = [each for each in kept if isinstance(each, ToolCalled)]
    indices = sorted({each.index for each in calls})
    expected = ["".join(each.arguments for each in calls if each.index == index) for index in indices]
    assert [call.function.arguments for call in collected.tool_calls] == expected


@given(st.lists(tokens | fragments | resets, max_size=30))
def test_the_way_over_the_wire_changes_nothing(outputs: list[Output]) -> None:
    assert folded([parse(output.line()) for output in outputs]) == folded(outputs)


def test_fragments_of_two_calls_may_be_interleaved() -> None:
    first = {"turn": T, "index": 0}
    second = {"turn": T, "index": 1}
    collected = folded(
        [
            ToolCalled(**second, id="b", name="two", arguments="{"),
            ToolCalled(**first, id="a", name="one", arguments='{"x":'),
            ToolCalled(**second, arguments="}"),
            ToolCalled(**first, arguments="1}"),
        ]
    )
    assert [(call.id, call.function.name, call.function.arguments) for call in collected.tool_calls] == [
        ("a", "one", '{"x":1}'),
        ("b", "two", "{}"),
    ]


def test_the_rest_is_kept_as_it_came() -> None:
    routed = Routed(turn=T, model_id="m", route_name="r", complexity="simple", confidence=1, reasoning="why")
    usage = Usage(turn=T, prompt_tokens=1)
    done = Done(turn=T, finish_reason="stop", model_id="m")
    failed = Failed(turn=T, title="t", status=500, detail="d")
    collected = folded([routed, usage, Reset(turn=T, reason="r"), done, failed])
    assert (collected.routed, collected.usage, collected.done, collected.failed) == (routed, usage, done, failed)
