"""Capsules: what is read out of a record, and written so that every byte comes back."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capibara_flow.domain.capsule import Kept, capsule, changes, read, said, written
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.recording import Take, fault, recorded
from capibara_flow.errors import BadRequest, CapibaraError, EngineBusy
from topics.chat import CallExpert, ChatMessage, ChatRequest, ExpertCalled, RouteTurn
from topics.message import Message
from topics.output import Continued, Done, Failed, Loading, Output, Reset, Token, Usage, Waiting

T = "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F"
FLEET = Fleet.model_validate({"experts": [{"name": "phi", "urls": ["http://h:1"]}, {"name": "other", "urls": ["http://h:2"]}]})
REQUEST = ChatRequest(messages=(ChatMessage(role="user", content="hola"),), model="phi")
ASKED = RouteTurn(turn=T, request=REQUEST)
DONE = Done(turn=T, finish_reason="stop", model_id="phi")


def call(expert: str = "phi", passed: int = 0, *alternatives: str) -> CallExpert:
    request = REQUEST.model_copy(update={"model": expert})
    return CallExpert(turn=T, expert=expert, bucket=0, request=request, passed=passed, alternatives=alternatives)


def fact(outcome: str = "stop", attempt: int = 1, expert: str = "phi") -> ExpertCalled:
    return ExpertCalled(turn=T, expert=expert, branch="main", attempt=attempt, outcome=outcome, started=1, ended=2)


def record(*messages: Message) -> Record:
    """*messages* as they were stored, one after the other."""
    found = []
    for number, each in enumerate((ASKED, *messages)):
        subject, data = each.subject, each.model_dump_json(exclude_none=True).encode()
        if isinstance(each, RouteTurn | CallExpert):
            subject = subject.replace(f"cf.work.{T}.", f"cf.log.{T}.asked.")
        found.append(Entry("CF_LOG", number + 1, 100.0 + number, subject, {"Cf-Tenant": "acme"}, data))
    return Record(T, tuple(found))


def words(*texts: str) -> tuple[Output, ...]:
    return tuple(Token(turn=T, text=text) for text in texts)


def usage(completion: int, burnt: int | None = None, attempts: int = 1, prompt: int = 3) -> Usage:
    burnt = completion if burnt is None else burnt
    return Usage(turn=T, prompt_tokens=prompt, completion_tokens=completion, burnt_tokens=burnt, attempts=attempts)


def takes(*messages: Message) -> tuple[Take, ...]:
    return recorded(record(*messages), FLEET).takes


def shown(take: Take) -> tuple[object, ...]:
    """What matters of *take*."""
    return take.expert, take.way, "".join(piece.text for piece in take.pieces), take.ending, take.title, take.unseen, take.counted


# --- attempts ----------------------------------------------------------------------------------------------------


def test_one_attempt_is_all_that_was_said():
    [take] = takes(call(), *words("Hola", " a todos"), usage(2), DONE, fact())
    assert shown(take) == ("phi", "fresh", "Hola a todos", "finished", "", 0, (3, 2))
    assert [piece.at for piece in take.pieces] == [2, 3]


def test_an_engine_that_counted_nothing_counts_nothing():
    [take] = takes(call(), *words("Hola", " a todos"), usage(2, prompt=0), DONE, fact())
    assert take.counted is None


def test_a_break_is_told_by_how_the_next_attempt_goes_on():
    goes_on = Continued(turn=T, how="prefill", expert="phi", attempt=2)
    first, second = takes(call(), *words("one", " two"), goes_on, *words(" three"), usage(3, 3, 2), DONE, fact(attempt=2))
    assert shown(first) == ("phi", "fresh", "one two", "failed", "engine broke", 0, None)
    assert shown(second) == ("phi", "prefill", " three", "finished", "", 0, (5, 1))
    assert second.text == "one two"


def test_pieces_that_nobody_saw_are_made_again():
    goes_on = Continued(turn=T, how="skip", expert="phi", attempt=2)
    _, second = takes(call(), *words("one", " two"), goes_on, *words(" three"), usage(3, 6, 2, 0), DONE, fact(attempt=2))
    assert shown(second) == ("phi", "skip", " three", "finished", "", 3, None)


def test_what_differs_replaces_all():
    first, second = takes(call(), *words("one"), Reset(turn=T, reason="x"), *words("other"), usage(1, 2, 2), DONE, fact(attempt=2))
    assert (first.ending, shown(second)) == ("failed", ("phi", "reset", "other", "finished", "", 0, (3, 1)))
    assert second.text == ""


def test_silent_attempts_are_filled_in_by_their_number():
    waits = Waiting(turn=T, stage="caller", title="engine busy", reason="full", attempt=3)
    found = takes(call(), waits, *words("now"), usage(1, attempts=4), DONE, fact(attempt=4))
    assert [(each.title, each.detail, each.lasted) for each in found[:2]] == [("engine broke", "", False), ("engine busy", "full", False)]
    assert [(each.ending, each.lasted) for each in found[2:]] == [("failed", True), ("finished", False)]


def test_a_call_that_was_passed_on_failed():
    passed = fact("passed on: engine unreachable")
    first, second = takes(
        call("phi", 0, "other"), passed, call("other", 1, "phi"), *words("hi"), usage(1), DONE, fact(expert="other", attempt=2)
    )
    assert shown(first) == ("phi", "fresh", "", "failed", "engine unreachable", 0, None)
    assert (second.expert, second.ending, second.last) == ("other", "finished", True)


def test_news_of_loading_are_played_too():
    [take] = takes(call(), Loading(turn=T, expert="phi", eta_s=3), *words("hi"), usage(1), DONE, fact())
    assert [piece.loading for piece in take.pieces] == [True, False]


def test_a_turn_that_goes_on_is_no_capsule():
    with pytest.raises(BadRequest, match="has not ended"):
        takes(call(), *words("hi"))
    with pytest.raises(BadRequest, match="not kept"):
        recorded(Record(T, record(DONE).entries[1:]), FLEET)


@given(st.lists(st.sampled_from([*words("a", "", "b"), usage(1), Reset(turn=T, reason=""), DONE, call(), call("other", 1), fact(),
    Continued(turn=T, how="skip", expert="phi", attempt=10**6), Waiting(turn=T, stage="caller", reason="", attempt=3),
    Failed(turn=T, title="engine busy", status=503, detail="x")]), max_size=12))  # fmt: skip
def test_no_record_is_too_odd_to_be_read(messages: list[Message]):
    found = recorded(record(*messages, DONE), FLEET)
    assert len(found.takes) < 5000
    assert all(take.expert in {"phi", "other"} for take in found.takes)


def test_an_error_is_known_by_its_title():
    assert type(fault("engine busy", "x")) is EngineBusy
    assert type(fault("something else", "x")) is CapibaraError


# --- the file ----------------------------------------------------------------------------------------------------


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.integers() | st.floats() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
@example(b"Infinity")
@example(b'{"a":[NaN]}')
def test_every_byte_of_a_message_comes_back(data: bytes):
    entry = Entry("CF_OUT", 1, 1.0, f"cf.out.{T}.data.main", {}, data)
    again = Kept.model_validate_json(Kept.of(entry).model_dump_json(exclude_none=True)).entry()
    assert again == entry


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_what_is_written_is_read_again(texts: list[str]):
    found = record(call(), *words(*texts), usage(len(texts)), DONE, fact())
    made = capsule(found, FLEET, None, "universal", "1.0")
    again = read("".join(written(made)).encode("utf-8", "surrogatepass"))
    assert again == made
    assert [entry.data for entry in again.record.entries] == [entry.data for entry in found.entries]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_anything_else_is_refused(data: bytes):
    with pytest.raises(BadRequest, match="capsule"):
        read(data)


def test_times_and_batches_are_no_difference():
    one = record(call(), *words("a", "b"), usage(2), DONE, fact())
    lines = b"\n".join(each.line() for each in (*words("a", "b"), usage(2), DONE.model_copy(update={"timings": {"total_seconds": 9.0}})))
    other = Record(T, tuple(e for e in one.entries if e.stream == "x" or ".out." not in e.subject))
    batch = Entry("CF_OUT", 1, 500.0, f"cf.out.{T}.data.main", {}, lines)
    assert changes(one, Record(T, (*other.entries, batch))) == ()
    cut = record(call(), *words("ab"), usage(2), DONE, fact())
    assert [each.what for each in changes(one, cut)] == ["event 1"]


def test_to_wait_longer_is_no_difference():
    def waiting(*attempts: int) -> list[str]:
        return list(said(record(*(Waiting(turn=T, stage="caller", title="t", reason="r", attempt=n) for n in attempts), DONE)))

    assert waiting(2, 3, 4) == waiting(9) == waiting()
