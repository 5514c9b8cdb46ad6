"""Going on with an answer: whatever an earlier attempt left, the client ends with exactly one whole answer."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.answering import Account
from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.continuing import Held, Repetition, continuing, failing, held, limited, stopped, tokens_left, way_on
from capibara_flow.errors import EngineUnreachable, TurnExpired
from capibara_flow.ports import Abilities, Finish, Piece, Tally, Text, ToolFragment
from topics.chat import ChatMessage, ChatRequest, Sampling, TextPart
from topics.output import Continued, Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage, Waiting

T = "T"
ASKED = ChatRequest(messages=(ChatMessage(role="user", content="hola"),))
PREFILL, NONE = Abilities(prefill=True), Abilities()
WORDS = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8)


def run(pieces: Sequence[Piece], said: list[Output], way: str | None = None, stop_after: int | None = None) -> list[Output]:
    """The outputs of one more attempt after *said*; with *stop_after* it dies behind so many pieces."""
    holds = held(said)
    account = Account(turn=T, branch="main", expert="e", attempt=1, started=0, holds=holds, way=way or way_on(holds, ASKED, NONE))
    outputs = [output for piece in pieces[:stop_after] for output in account.take(piece, 1.0)]
    return outputs if stop_after is not None else [*outputs, *account.ending(2.0)]


def collected(outputs: Sequence[Output]) -> Collected:
    found = Collected()
    for output in outputs:
        found.add(output)
    return found


def engine(words: Sequence[str], reasoning: Sequence[str] = ()) -> list[Piece]:
    texts = [*(Text(reasoning=each) for each in reasoning), *map(Text, words)]
    return [*texts, Tally(3, len(texts)), Finish("stop")]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[str], list[str], list[int]]:
    """An answer, the same answer in other pieces, and where each of some attempts dies."""
    words = draw(WORDS)
    whole = "".join(words)
    places = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=4)) | {len(whole)})
    others = [whole[begin:end] for begin, end in zip([0, *places], places, strict=False)]
    return words, others, draw(st.lists(st.integers(0, 9), max_size=3))


@given(cuts(), st.lists(st.text("xy", min_size=1, max_size=2), max_size=3))
def test_an_engine_that_says_all_again_is_heard_once(case: tuple[list[str], list[str], list[int]], reasoning: list[str]) -> None:
    words, others, deaths = case
    said: list[Output] = []
    for number, death in enumerate(deaths):
        said += run(engine(words if number % 2 else others, reasoning), said, stop_after=death)
    said += run(engine(words, reasoning), said)
    found = collected(said)
    assert (found.text, found.reasoning) == ("".join(words), "".join(reasoning))
    assert not any(isinstance(output, Reset) for output in said)
    assert found.done
    assert found.usage
    assert found.usage.completion_tokens == len(words) + len(reasoning)
    assert found.usage.burnt_tokens >= found.usage.completion_tokens


@given(cuts())
def test_an_engine_that_goes_on_from_the_very_words_needs_no_reset(case: tuple[list[str], list[str], list[int]]) -> None:
    words, _, deaths = case
    said: list[Output] = []
    for death in [*deaths, None]:
        rest = "".join(words)[len(held(said).text) :]
        pieces = engine([rest] if rest else [])
        said += run(pieces, said, way=way_on(held(said), ASKED, PREFILL), stop_after=death)
    assert collected(said).text == "".join(words)
    assert not any(isinstance(output, Reset) for output in said)


@given(WORDS, WORDS, st.integers(0, 8), st.booleans())
def test_whatever_a_second_engine_says_the_client_ends_with_that(first: list[str], second: list[str], death: int, calls: bool) -> None:
    tail: list[Piece] = [ToolFragment(0, "i", "n", "{}")] if calls else []
    said = run([*engine(first)[:-2], *tail, *engine([])], [], stop_after=death)
    said += run(engine(second), said)
    found = collected(said)
    assert found.text == "".join(second)
    assert found.tool_calls == ()
    repeats = "".join(second).startswith("".join(first[:death])) and not (calls and death > len(first))
    assert sum(isinstance(output, Reset) for output in said) == (death > 0 and not repeats)


@given(st.lists(st.sampled_from(["token", "call", "reset", "routed", "waiting"]), max_size=12))
def test_what_the_client_holds_is_what_came_behind_the_last_reset(kinds: list[str]) -> None:
    made = {
        "token": Token(turn=T, text="x", reasoning="r"),
        "call": ToolCalled(turn=T, index=0),
        "reset": Reset(turn=T, reason="again"),
        "routed": Routed(turn=T, model_id="m", route_name="r", complexity="simple", confidence=1, reasoning="why"),
        "waiting": Waiting(turn=T, stage="caller", reason="why", attempt=2),
    }
    behind = kinds[len(kinds) - kinds[::-1].index("reset") :] if "reset" in kinds else kinds
    holds = held([made[kind] for kind in kinds])
    tokens, calls = behind.count("token"), behind.count("call")
    assert (holds.text, holds.reasoning, holds.calls) == ("x" * tokens, "r" * tokens, calls > 0)
    assert (holds.kept, holds.made, holds.ended) == (tokens + calls, kinds.count("token") + kinds.count("call"), False)


def test_an_end_that_something_was_said_behind_is_an_end() -> None:
    done = Done(turn=T, finish_reason="cancelled", model_id="")
    assert held([done, Token(turn=T, text="late")]).ended


def holding(text: str = "", reasoning: str = "", calls: bool = False) -> Held:
    return Held(text, reasoning, calls, kept=1, made=1, attempts=1)


@pytest.mark.parametrize(
    ("holds", "changes", "abilities", "way"),
    [
        (Held(), {}, PREFILL, "fresh"),
        (holding("Hola"), {}, PREFILL, "prefill"),
        (holding("Hola"), {}, NONE, "skip"),
        (holding("Hola", "hm"), {}, PREFILL, "skip"),
        (holding(reasoning="hm"), {}, PREFILL, "skip"),
        (holding("{"), {"response_format": {"type": "json_object"}}, PREFILL, "skip"),
        (holding("Hola"), {"tools": ({"type": "function"},)}, PREFILL, "skip"),
        (holding("Hola", calls=True), {}, PREFILL, "reset"),
        (holding("Hola"), {"messages": (*ASKED.messages, ChatMessage(role="assistant", content=(TextPart(text="a"),)))}, PREFILL, "skip"),
    ],
)
def test_how_an_answer_goes_on(holds: Held, changes: dict[str, object], abilities: Abilities, way: str) -> None:
    assert way_on(holds, ASKED.model_copy(update=changes), abilities) == way


def test_a_prefill_is_the_last_message() -> None:
    asked = continuing(ASKED, holding("Hola, "))
    assert [(message.role, message.text) for message in asked.messages] == [("user", "hola"), ("assistant", "Hola, ")]
    begun = ASKED.model_copy(update={"messages": (*ASKED.messages, ChatMessage(role="assistant", content="¡"))})
    assert [message.text for message in continuing(begun, holding("Hola")).messages] == ["hola", "¡Hola"]


def test_what_was_said_counts_against_the_limit() -> None:
    holds = Held("a b c", kept=3, made=3, attempts=1)
    assert tokens_left(ASKED, holds, NONE) is None
    assert tokens_left(ASKED, holds, Abilities(max_tokens=10)) == 7
    asked = ASKED.model_copy(update={"sampling": Sampling(max_tokens=2)})
    assert tokens_left(asked, holds, Abilities(max_tokens=10)) == 0
    assert limited(asked, 5).sampling == Sampling(max_tokens=5)


def test_attempts_are_counted_from_what_is_known_of_them() -> None:
    one, goes_on = Token(turn=T, text="a"), Continued(turn=T, how="skip", expert="e", attempt=4)
    waits = Waiting(turn=T, stage="caller", title="busy", reason="full", attempt=3)
    unseen, queued = Usage(turn=T, attempts=7), waits.model_copy(update={"stage": "router", "attempt": 9})
    told: list[tuple[list[Output], int]] = [
        ([], 0),
        ([queued], 0),
        ([one, one], 1),
        ([one, Reset(turn=T, reason="x"), one], 2),
        ([waits, one], 3),
        ([waits, one, goes_on, one], 4),
        ([goes_on, one, waits], 4),
        ([goes_on, one, unseen], 7),
        ([unseen, Reset(turn=T, reason="x")], 8),
    ]
    assert [held(said).attempts for said, _ in told] == [attempts for _, attempts in told]


def test_usage_adds_up_over_attempts() -> None:
    said: list[Output] = [Token(turn=T, text=word) for word in ("a", "b", "c")]
    went_on = collected(run([Text("d"), Tally(10, 1), Finish("stop")], said, way="prefill"))
    assert went_on.usage
    assert (went_on.usage.prompt_tokens, went_on.usage.completion_tokens) == (7, 4)
    assert (went_on.usage.burnt_tokens, went_on.usage.attempts) == (4, 2)
    again = collected(run([Text("a"), Text("bc"), Text("d"), Tally(7, 4), Finish("stop")], said, way="skip"))
    assert again.usage
    assert (again.usage.completion_tokens, again.usage.burnt_tokens) == (4, 7)
    anew = collected(run([Text("z"), Tally(7, 1), Finish("stop")], said, way="reset"))
    assert anew.usage
    assert (anew.usage.completion_tokens, anew.usage.burnt_tokens) == (1, 4)


@pytest.mark.parametrize("way", ["prefill", "skip", "reset"])
def test_a_call_that_is_stopped_before_it_said_anything_leaves_what_the_client_has(way: str) -> None:
    said: list[Output] = [Token(turn=T, text="a"), Token(turn=T, text="b")]
    account = Account(turn=T, branch="main", expert="e", attempt=2, started=0, holds=held(said), way=way)  # type: ignore[arg-type]
    usage, done = account.ending(1.0)
    assert (usage.completion_tokens, done.finish_reason) == (2, "cancelled")  # type: ignore[attr-defined]


def test_how_it_went_on_is_told_once_before_the_first_new_word() -> None:
    said: list[Output] = [Token(turn=T, text="a")]
    outputs = run(engine(["a", "b", "c"]), said)
    assert [type(output) for output in outputs[:3]] == [Continued, Token, Token]
    assert outputs[0] == Continued(turn=T, how="skip", expert="e", attempt=2)
    outputs = run(engine([]), said, way="prefill")  # it had said all, and died before the end
    assert [type(output).__name__ for output in outputs] == ["Continued", "Usage", "Done"]


def test_a_turn_that_somebody_else_stops_keeps_its_account() -> None:
    routed = Routed(turn=T, model_id="m", route_name="r", complexity="simple", confidence=1, reasoning="why")
    usage, done = stopped(T, [routed, Token(turn=T, text="a")])
    assert (usage.completion_tokens, done.finish_reason, done.model_id) == (1, "cancelled", "m")
    assert stopped(T, [])[1].model_id == ""


@pytest.mark.parametrize("piece", [Text("xz", "a"), Text("", "abc"), Text("y"), Finish("stop")])
def test_words_beyond_count_only_when_all_before_was_repeated(piece: Piece) -> None:
    repetition = Repetition(Held("x", "ab", kept=2, made=2, attempts=1))
    assert repetition.take(piece) == [piece]
    assert repetition.diverged


def test_what_was_made_unseen_counts_once_it_was_told() -> None:
    said: list[Output] = [Token(turn=T, text="a"), Token(turn=T, text="b")]
    account = Account(turn=T, branch="main", expert="e", attempt=2, started=0, holds=held(said), way="skip")
    assert list(account.take(Text("a"), 1.0)) == []
    assert account.unseen
    said.append(account.usage)
    assert (account.usage.completion_tokens, held(said).made) == (2, 3)
    again = collected(run(engine(["a", "b", "c"]), said))
    assert again.usage
    assert (again.usage.completion_tokens, again.usage.burnt_tokens) == (3, 6)


def test_a_turn_that_fails_tells_what_it_took_and_what_it_waited_for() -> None:
    late = TurnExpired("too late")
    assert failing(T, [], late) == (Failed(turn=T, title="turn expired", status=504, detail="too late"),)
    said = [Token(turn=T, text="a"), Waiting(turn=T, stage="caller", reason="the engine is down", attempt=2)]
    usage, failed = failing(T, said, late)
    assert isinstance(usage, Usage)
    assert isinstance(failed, Failed)
    assert (usage.completion_tokens, usage.burnt_tokens) == (1, 1)
    assert (failed.detail, failed.retryable) == ("too late; it waited, for: the engine is down", True)
    (failed,) = failing(T, said[1:], EngineUnreachable("the engine is down"))
    assert isinstance(failed, Failed)
    assert failed.detail == "the engine is down"


def test_a_repetition_of_nothing_is_over() -> None:
    assert Repetition(Held()).over
