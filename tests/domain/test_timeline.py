"""A record as a timeline: what happened when, and what cannot be known."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.record import Record
from capibara_flow.domain.timeline import AGAIN, BROKE, LOST, RUNNING, Stage, Summary, Timeline, timeline
from capibara_flow.domain.turns import turn_id
from tests.domain.kept import BEGAN, TURN, Kept, passed_on, plain
from topics.chat import CancelTurn, TurnFailed
from topics.output import Continued, Done, Failed, Loading, Reset, Token, Usage, Waiting


def named(told: Timeline, kind: str) -> list[Stage]:
    return [stage for stage in told.stages if stage.kind == kind]


def cancelled() -> Kept:
    """A turn that was stopped in its queue: the undertaker took the branch to say so."""
    kept = Kept().asked().wait(0.1).routed().wait(0.5)
    kept.log(CancelTurn(turn=TURN))
    return kept.wait(0.4).taken("undertaker@a:9").done("cancelled", tokens=0)


def broken(second: str = "caller@a:1") -> Kept:
    """A turn whose first attempt tells nothing: the process *second* goes on with it."""
    kept = Kept().asked().wait(0.1).routed().wait(0.1).taken("caller@a:1").wait(0.1).words("one").wait(0.2).taken(second)
    kept.wait(0.1).say(Continued(turn=TURN, how="prefill", expert="one", attempt=2), Token(turn=TURN, text=" two"))
    return kept.wait(0.1).done().account(lasted=0.2, attempt=2, continued="prefill", completion_tokens=2)


def failed() -> Kept:
    """A turn that the caller gave up."""
    kept = Kept().asked().wait(0.1).routed().wait(0.1).taken().wait(0.1).taken("caller@a:1")
    kept.say(Failed(turn=TURN, title="bad request", status=400, detail="no"))
    kept.log(TurnFailed(turn=TURN, stage="caller", title="bad request", detail="no", body="{}"))
    return kept


def test_a_plain_turn_is_laid_out_from_the_question_to_the_answer() -> None:
    told = timeline(plain().record)
    laid = [(stage.kind, stage.name, round(stage.start, 3), round(stage.end or 0, 3)) for stage in told.stages]
    assert laid == [
        ("door", "asked", 0, 0),
        ("queue", "waits for router", 0, 0.05),
        ("work", "router", 0.05, 0.1),
        ("queue", "waits for one", 0.1, 0.2),
        ("attempt", "one", 0.2, 1.0),
    ]
    router, attempt = told.stages[2], told.stages[4]
    assert (router.outcome, router.facts["route_name"], router.facts["plan"]) == ("one", "default", ["caller"])
    assert (attempt.outcome, attempt.facts["attempt"], round(attempt.facts["first_token"], 3)) == ("stop", 1, 0.5)
    assert (told.question, told.answer, told.outcome, told.tenant, told.missing) == ("count to five", "onetwo", "stop", "acme", ())
    totals = told.totals
    assert (totals.prompt_tokens, totals.completion_tokens, totals.attempts, totals.silent_attempts) == (3, 2, 1, 0)
    assert (round(totals.seconds, 3), round(totals.first_token_seconds or 0, 3)) == (1.0, 0.5)


def test_a_call_that_was_passed_on_shows_both_experts_and_both_queues() -> None:
    told = timeline(passed_on().record)
    assert [(stage.name, stage.outcome) for stage in named(told, "attempt")] == [("one", "passed on: engine unreachable"), ("two", "stop")]
    queues = [(stage.name, round(stage.start, 3), round(stage.end or 0, 3)) for stage in named(told, "queue")]
    assert queues[1:] == [("waits for one", 0.1, 0.2), ("waits for two", 0.4, 0.7)]
    assert (told.totals.passed_on, told.totals.attempts, told.expert) == (1, 2, "two")


@pytest.mark.parametrize(("second", "outcome"), [("caller@a:1", AGAIN), ("caller@a:1 inbox.2", AGAIN), ("caller@b:1", LOST)])
def test_an_attempt_that_told_nothing_is_still_an_attempt(second: str, outcome: str) -> None:
    told = timeline(broken(second).record)
    first, last = named(told, "attempt")
    assert (first.outcome, first.facts["told"], first.facts["pieces"], round(first.end or 0, 3)) == (outcome, False, 1, 0.5)
    assert (last.outcome, last.facts["continued"]) == ("stop", "prefill")
    assert (told.totals.attempts, told.totals.silent_attempts) == (2, 1)
    assert any("told no end" in each for each in told.missing)


def test_a_lease_that_is_renewed_is_no_further_attempt() -> None:
    kept = Kept().asked().routed().taken(claim="x").wait(1).taken(claim="x").words("one").done().account(lasted=1)
    assert timeline(kept.record).totals.attempts == 1


def test_who_takes_the_branch_only_to_end_it_makes_no_attempt() -> None:
    told = timeline(cancelled().record)
    [end] = named(told, "end")
    assert (end.name, end.outcome, named(told, "attempt")) == ("undertaker", "stopped it", [])
    assert [(stage.name, stage.outcome, round(stage.start, 3)) for stage in named(told, "cancel")] == [("cancel", "asked", 0.6)]
    queue = named(told, "queue")[-1]
    assert (queue.name, round(queue.end or 0, 3)) == ("waits for one", 1.0)


def test_who_takes_the_branch_when_all_is_said_makes_no_attempt() -> None:
    late = cancelled()
    late.wait(5).taken("caller@a:1")  # the call had waited for its place
    told = timeline(late.record)
    assert (named(told, "attempt"), told.totals.silent_attempts) == ([], 0)
    assert not any("told no end" in each for each in told.missing)


def test_a_turn_that_was_given_up_shows_who_and_its_dead_letter() -> None:
    told = timeline(failed().record)
    assert [(stage.name, stage.outcome) for stage in named(told, "end")] == [("caller", "gave it up: bad request")]
    assert [(stage.name, stage.facts["detail"]) for stage in named(told, "dead")] == [("dead letter of caller", "no")]
    assert [stage.outcome for stage in named(told, "attempt")] == [BROKE]
    assert told.outcome == "failed"


def test_a_turn_that_goes_on_has_stages_without_an_end() -> None:
    told = timeline(Kept().asked().wait(0.1).routed().wait(0.1).taken().words("one").record)
    [attempt] = named(told, "attempt")
    assert (attempt.end, attempt.lasted, attempt.outcome, told.outcome) == (None, None, RUNNING, "running")
    waiting = timeline(Kept().asked().wait(0.1).routed().record)
    assert [stage.end for stage in named(waiting, "queue")][-1] is None
    assert any("no end is kept" in each for each in told.missing)


def test_an_answer_whose_account_is_not_there_has_the_end_that_its_output_tells() -> None:
    kept = Kept().asked().routed().taken().wait(0.2).words("one").done()
    [attempt] = named(timeline(kept.record), "attempt")
    assert (attempt.outcome, attempt.facts["told"], round(attempt.end or 0, 3)) == ("stop", "by its output alone", 0.2)


def test_what_the_client_was_told_beside_the_answer_is_news() -> None:
    kept = Kept().asked().routed().taken().wait(0.1)
    kept.say(
        Loading(turn=TURN, expert="one", eta_s=4.5),
        Waiting(turn=TURN, stage="caller", title="engine busy", reason="503", attempt=1),
        Reset(turn=TURN, reason="anew"),
    )
    told = [(stage.name, stage.outcome) for stage in named(timeline(kept.record), "news")]
    assert told == [("loading", "about 4.5 s"), ("waiting", "engine busy"), ("reset", "")]


def test_a_stage_of_a_later_version_is_shown_with_what_it_tells() -> None:
    kept = Kept().asked().wait(0.2)
    kept.put("cf.log.{turn}.judge", json.dumps({"turn": TURN, "started": 5.0, "ended": 5.1, "verdict": "good", "votes": [1, 2]}).encode())
    kept.put("cf.log.{turn}.noise", b"\xff not json")
    [judge] = named(timeline(kept.record), "work")
    assert (judge.name, round(judge.start, 3), round(judge.end or 0, 3), dict(judge.facts)) == (
        "judge",
        0.1,
        0.2,
        {"verdict": "good", "votes": 2},
    )


def test_without_the_log_the_output_and_the_leases_still_tell() -> None:
    told = timeline(plain().without("CF_LOG"))
    assert (told.question, told.answer, told.outcome) == ("", "onetwo", "stop")
    [router] = named(told, "work")
    assert (router.name, router.facts["told_by"], router.facts["confidence"]) == ("router", "the output alone", 0.5)
    assert [stage.outcome for stage in named(told, "attempt")] == ["stop"]
    assert any("the log holds nothing" in each for each in told.missing)


def test_without_the_output_the_log_still_tells() -> None:
    told = timeline(plain().without("CF_OUT"))
    [attempt] = named(told, "attempt")
    assert (attempt.outcome, round(attempt.start, 3), round(attempt.end or 0, 3)) == ("stop", 0.2, 1.0)
    assert (told.answer, told.outcome) == ("", "running")
    assert any("no output is kept" in each for each in told.missing)


def test_the_door_s_share_is_seen_where_the_id_tells_it() -> None:
    turn = turn_id(milliseconds=int((BEGAN - 0.25) * 1000), entropy=b"\0" * 10, tenant="acme")
    told = timeline(plain(Kept(turn=turn)).record)
    assert (told.stages[0].name, round(told.stages[0].end or 0, 3), round(told.totals.seconds, 3)) == ("asked", 0.25, 1.25)


@pytest.mark.parametrize("tell", [plain, passed_on])
@given(seconds=st.floats(-1e6, 1e6))
def test_clocks_that_disagree_shift_nothing(tell, seconds: float) -> None:
    def laid(kept: Kept) -> list[tuple[object, ...]]:
        stages = timeline(kept.record).stages
        return [(stage.kind, stage.name, round(stage.start, 2), round(stage.end or 0, 2), stage.outcome) for stage in stages]

    assert laid(tell(Kept(skew=seconds))) == laid(tell())


STORIES = [plain, passed_on, cancelled, broken, failed]


@given(st.sampled_from(STORIES), st.data())
def test_whatever_is_missing_the_rest_is_told_in_order(tell, data: st.DataObject) -> None:
    entries = tell().entries
    left = data.draw(st.lists(st.sampled_from(entries), min_size=1, unique_by=lambda each: each.sequence))
    record = Record(TURN, tuple(sorted(left, key=lambda each: (each.when, each.sequence))))
    told = timeline(record)
    assert [stage.start for stage in told.stages] == sorted(stage.start for stage in told.stages)
    assert all(stage.start >= 0 for stage in told.stages)
    assert all(stage.end is None or stage.end >= stage.start for stage in told.stages)
    leases = sum(".lease." in each.subject for each in left)
    shown = [stage for stage in told.stages if stage.kind in {"attempt", "end"}]
    assert leases <= len(shown) <= leases + len(record.attempts)
    assert json.loads(json.dumps(told.as_json()))["turn"] == TURN
    assert Summary.of(record).turn == TURN


def test_a_summary_has_the_first_words_and_the_figures() -> None:
    short = Summary.of(plain().record, words=8)
    assert (short.question, short.route, short.expert, short.outcome, short.tokens) == ("count t…", "default", "one", "stop", 2)
    assert (short.when, round(short.seconds, 3), short.tenant) == (BEGAN, 1.0, "acme")
    assert Summary.of(plain().without("CF_LOG")).route == "default"


def test_an_answer_that_was_kept_from_before_says_so() -> None:
    kept = (
        Kept()
        .asked()
        .routed()
        .taken()
        .words("one")
        .say(Usage(turn=TURN), Done(turn=TURN, finish_reason="stop", model_id="one", cached=True))
    )
    assert timeline(kept.record).totals.cached
