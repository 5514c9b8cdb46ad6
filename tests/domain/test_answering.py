"""What pieces amount to: output for the client, an account of the call."""

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.answering import Account
from capibara_flow.domain.continuing import Held, held
from capibara_flow.ports import Finish, Load, Piece, Tally, Text, ToolFragment
from topics.chat import ExpertCalled
from topics.output import Done, Loading, Token, ToolCalled

T = "T"


def account(attempt: int = 1, made_before: int = 0) -> Account:
    return Account(turn=T, branch="main", expert="e", attempt=attempt, started=100.0, holds=Held(made=made_before))


def done(taken: Account) -> Done:
    last = taken.ending(102.0)[-1]
    assert isinstance(last, Done)
    return last


pieces = st.lists(
    st.builds(Text, st.text(max_size=4), st.text(max_size=4))
    | st.builds(ToolFragment, st.integers(0, 3), st.none() | st.text(max_size=3), st.none() | st.text(max_size=3), st.text(max_size=3))
    | st.builds(Tally, st.integers(0, 9), st.integers(0, 9))
    | st.builds(Finish, st.sampled_from(["stop", "length", "tool_calls"]))
)


@given(pieces)
def test_everything_said_reaches_the_client_and_nothing_else(all_pieces: list[Piece]) -> None:
    taken = account()
    outputs = [output for piece in all_pieces for output in taken.take(piece, 101.0)]
    texts = [(piece.text, piece.reasoning) for piece in all_pieces if isinstance(piece, Text)]
    assert [(each.text, each.reasoning or "") for each in outputs if isinstance(each, Token)] == texts
    fragments = [piece for piece in all_pieces if isinstance(piece, ToolFragment)]
    said = [ToolFragment(each.index, each.id, each.name, each.arguments) for each in outputs if isinstance(each, ToolCalled)]
    assert said == fragments
    assert len(outputs) == len(texts) + len(fragments)


def test_times_are_counted_from_the_start_of_the_call() -> None:
    taken = account()
    for piece, now in [(Text("a"), 100.5), (Text("b"), 101.0), (Finish("stop"), 101.5)]:
        taken.take(piece, now)
    event = taken.event(102.0)
    assert done(taken).timings == {"total_seconds": 2.0, "first_token_seconds": 0.5}
    assert (event.started, event.first_token, event.ended, event.outcome) == (100.0, 100.5, 102.0, "stop")


def test_a_call_without_a_word_has_no_first_token() -> None:
    taken = account()
    taken.take(Finish("stop"), 101.0)
    assert taken.first_token_seconds is None
    assert done(taken).timings == {"total_seconds": 2.0}


def test_a_call_that_never_finished_was_cancelled_and_its_pieces_are_counted() -> None:
    taken = account(attempt=2, made_before=4)
    taken.take(Text("a"), 101.0)
    taken.take(Text("b"), 101.0)
    assert done(taken).finish_reason == taken.event(102.0).outcome == "cancelled"
    usage = taken.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.attempts, usage.burnt_tokens) == (0, 2, 2, 6)


def test_the_engine_counts_better_than_we_do() -> None:
    taken = account()
    for piece in (Text("a"), Tally(7, 3), Finish("length")):
        taken.take(piece, 101.0)
    assert (taken.usage.prompt_tokens, taken.usage.completion_tokens) == (7, 3)


def test_news_of_loading_is_told_and_counts_for_nothing() -> None:
    taken = account()
    assert taken.take(Load(12.5), 100.2) == (Loading(turn=T, expert="e", eta_s=12.5),)
    assert taken.take(Load(), 100.4) == (Loading(turn=T, expert="e"),)
    assert taken.untold
    assert taken.first_token_seconds is None
    said = [*taken.take(Text("a"), 101.0), *taken.take(Load(), 101.5), *taken.take(Text("b"), 102.0)]
    assert taken.first_token_seconds == 1.0
    assert taken.usage.burnt_tokens == 2
    holds = held(said)
    assert (holds.text, holds.kept, holds.attempts, holds.ended) == ("ab", 2, 1, False)
    assert held([Loading(turn=T, expert="e")]) == Held()


def test_news_of_loading_does_not_disturb_an_answer_that_is_said_again() -> None:
    holds = Held(text="ab", kept=2, made=2, attempts=1)
    taken = Account(turn=T, branch="main", expert="e", attempt=2, started=100.0, holds=holds, way="skip")
    outputs = [output for piece in (Load(), Text("a"), Load(), Text("b"), Text("c")) for output in taken.take(piece, 101.0)]
    assert taken.way == "skip"
    assert [each.event for each in outputs] == ["loading", "loading", "continued", "token"]


def test_two_experts_may_bear_the_same_number_of_an_attempt_and_both_are_told():
    facts = {"turn": "T", "branch": "main", "attempt": 1, "outcome": "stop", "started": 1.0, "ended": 2.0}
    one, other = ExpertCalled(**facts, expert="phi"), ExpertCalled(**facts, expert="mixtral")
    assert one.dedupe != other.dedupe
    assert one.dedupe == ExpertCalled(**facts, expert="phi").dedupe
