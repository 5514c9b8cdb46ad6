"""What the map says is what there is: workers, streams, permissions, README and AsyncAPI are held against it."""

import re
from pathlib import Path

import pytest
import yaml

from topics.chat import CallExpert
from topics.flow import DOOR, FLOW, OPERATOR, Hop, mermaid
from topics.message import Command, Message, Request, Signal
from topics.output import OUTPUTS, Output
from topics.streams import (
    ANSWERS,
    CALLS,
    DOCUMENTS,
    LANES,
    REPORTS,
    Layout,
    absence_consumer,
    accountant_consumer,
    answer_key,
    caller_consumer,
    due_key,
    ingester_consumer,
    lane_key,
    piece_subject,
    reader_key,
    report_key,
    retriever_consumer,
    router_consumer,
    subject_token,
    traces,
    undertaker_consumer,
)
from workers.asyncapi import described

ROOT = Path(__file__).parents[1]
MESSAGES = {message for hop in FLOW for message in (hop.consumes, *hop.serves, *hop.speaks)} | set(DOOR)
KEPT = {message for message in MESSAGES if not issubclass(message, Request)}


STREAMS = {
    "router": {router_consumer().stream},
    "caller": {caller_consumer("x").stream},
    "retriever": {retriever_consumer().stream, "CF_JOIN"},
    "ingester": {ingester_consumer().stream, DOCUMENTS},
    "undertaker": {undertaker_consumer().stream, absence_consumer().stream},
    "accountant": {accountant_consumer().stream},
}
#: Who sends or takes calls knows the lanes, and what callers report.
QUEUES = {lane_key("*", "*"), report_key("caller", "*")}
LANE_KEYS = {lane_key("*", "*"), f"$JS.API.DIRECT.GET.{LANES}", f"$JS.API.STREAM.CREATE.{LANES}"}
#: What a worker may do to streams that are not its own, because that is its work.
MAY_ALSO = {
    "undertaker": {"$JS.API.STREAM.PURGE.*", "cf.ctl.*.erased"},
    "ingester": {f"$JS.API.STREAM.PURGE.{DOCUMENTS}"},
    "router": {f"$JS.API.STREAM.INFO.{CALLS}"},
    "retriever": {f"$JS.API.STREAM.INFO.{CALLS}"},
    "caller": {answer_key("*", "*"), f"$JS.API.STREAM.MSG.GET.{ANSWERS}"},
}


def covers(pattern: str, subject: str) -> bool:
    """Whether the NATS *pattern* matches everything that *subject* (which may have ``*`` itself) matches."""
    wanted, given = pattern.split("."), subject.split(".")
    for position, token in enumerate(wanted):
        if token == ">":
            return len(given) > position
        if position >= len(given) or (token != "*" and token != given[position]):
            return False
    return len(wanted) == len(given)


def permissions(role: str) -> tuple[set[str], set[str]]:
    """What *role* may publish and subscribe to, by nats.conf."""
    text = re.sub(r"#[^\n]*", "", (ROOT / "nats.conf").read_text(encoding="utf-8"))
    user = re.search(rf"user: {role}\b(.*?)(?=user: |\Z)", text, re.DOTALL)
    assert user, f"nats.conf has no user {role}"
    found = re.search(r"publish \{ allow: \[(.*?)\].*?subscribe \{ allow: \[(.*?)\]", user[1], re.DOTALL)
    assert found
    publish, subscribe = (set(re.findall(r'"([^"]+)"', part)) for part in found.groups())
    return publish, subscribe


@pytest.mark.parametrize("hop", FLOW, ids=lambda hop: hop.worker)
def test_a_worker_listens_and_speaks_exactly_as_the_map_says(hop: Hop):
    document = described(hop.worker)
    seen: dict[str, set[str]] = {"receive": set(), "send": set()}
    for operation in document["operations"].values():
        channel = operation["channel"]["$ref"].removeprefix("#/channels/").replace("%20", " ").replace("%7B", "{").replace("%7D", "}")
        seen[operation["action"]].add((document["channels"][channel]["address"], channel.split(" ")[0]))
    assert seen["receive"] == {(message.pattern, message.__name__) for message in (hop.consumes, *hop.serves)}
    assert seen["send"] == {(message.pattern, message.__name__) for message in hop.speaks}


def test_the_readme_draws_the_map():
    assert mermaid() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_asyncapi_is_the_one_of_today():
    written = yaml.safe_load((ROOT / "deploy" / "asyncapi.yaml").read_text(encoding="utf-8"))
    assert written == described(), "run `make asyncapi`"


@pytest.mark.parametrize("message", sorted(KEPT, key=lambda each: each.__name__), ids=lambda each: each.__name__)
def test_every_message_is_kept_by_exactly_one_stream(message: type[Message]):
    keepers = [stream for stream in Layout().streams if any(covers(subject, message.subjects()) for subject in stream.subjects)]
    assert len(keepers) == 1
    assert (keepers[0].keeps == "work") == issubclass(message, Command)


def test_every_command_has_one_taker_and_every_output_is_on_the_map():
    takers = [hop.consumes for hop in FLOW]
    assert len(takers) == len(set(takers))
    commands = {message for message in MESSAGES if issubclass(message, Command)}
    assert commands == {taken for taken in takers if issubclass(taken, Command)}
    asked = {message for message in (*DOOR, *OPERATOR) if issubclass(message, Request)}
    assert asked == {served for hop in FLOW for served in hop.serves}
    assert {output for hop in FLOW for output in hop.shows} == set(OUTPUTS)
    assert all(issubclass(message, Command | Signal | Request) for message in DOOR)
    assert not any(covers(subject, message.subjects()) for message in MESSAGES - KEPT for s in Layout().streams for subject in s.subjects)


@pytest.mark.parametrize("hop", FLOW, ids=lambda hop: hop.worker)
def test_a_worker_may_publish_what_the_map_lists_and_nothing_else(hop: Hop):
    publish, subscribe = permissions(hop.worker)
    also = MAY_ALSO.get(hop.worker, set())
    ours = {subject for subject in publish if subject.startswith("cf.")}
    turns = set() if hop.takes_facts else {"cf.out.*.lease.*"}  # who takes facts comes behind all turns
    assert ours - also == {message.subjects() for message in hop.speaks} | turns
    ears = {f"_INBOX_{hop.worker}.>"} | {request.subjects() for request in hop.serves}
    ears |= set() if hop.takes_facts else {"cf.ctl.*.cancel"}
    assert subscribe == ears | (QUEUES if CallExpert in (*hop.emits, hop.consumes) else set())
    reports = {report_key(hop.worker, "*"), f"$JS.API.DIRECT.GET.{REPORTS}"} | LANE_KEYS
    assert report_key(hop.worker, "*") in publish
    for subject in publish - ours - also - reports:
        assert subject.startswith(("$JS.ACK.", "$JS.API."))
        assert any(stream in subject for stream in STREAMS[hop.worker]) or subject.split(".")[-1] in {"CF_OUT", "CF_CTL"}
        assert not re.search(r"DELETE|PURGE|UPDATE|SNAPSHOT|RESTORE", subject)


def test_the_door_may_open_cancel_and_follow_turns_only():
    publish, subscribe = permissions("edge")
    assert {subject for subject in publish if subject.startswith("cf.")} == {message.subjects() for message in DOOR} | {
        piece_subject("*", "*")
    }
    assert subscribe == {"cf.live.*.*", "_INBOX_edge.>"}
    assert {subject for subject in publish if subject.startswith("$KV.")} == {"$KV.CF_READERS.*", "$KV.CF_READERS.*.due", "$KV.CF_KEYS.*.*"}
    asked = {subject.removeprefix("$JS.API.") for subject in publish if subject.startswith("$JS.")}
    assert all(each.startswith(("STREAM.INFO.", "STREAM.MSG.GET.", "DIRECT.GET.", "CONSUMER.INFO.")) for each in asked)
    assert not [each for each in asked if "GET" in each and "CF_WORK" in each]  # what waits is nobody's to read


def test_the_operator_may_ask_for_what_nobody_else_does():
    publish, _ = permissions("provisioner")
    assert {message.subjects() for message in OPERATOR} <= publish


def test_observers_change_nothing():
    publish, subscribe = permissions("observer")
    assert not {subject for subject in publish if subject.startswith("cf.")}
    assert all(re.search(r"INFO|NAMES|LIST|GET", subject) for subject in publish)
    assert subscribe == {"cf.>", "_INBOX_observer.>"}


def test_every_stream_forgets():
    for layout in (Layout(), Layout(log=False), Layout(answer_age=600), Layout(log=False, answer_age=600)):
        assert all(0 < stream.max_age <= 24 * 3600 for stream in layout.streams)
        assert all(stream.dedupe_window <= stream.max_age for stream in layout.streams)
        assert sum(stream.max_bytes for stream in layout.streams) <= layout.storage  # else a broker could not reserve it
        assert all(stream.max_bytes > 0 for stream in layout.streams)
    assert "CF_LOG" not in {stream.name for stream in Layout(log=False).streams}


def test_subjects_of_messages_fit_their_patterns():
    for message in MESSAGES:
        assert re.fullmatch(r"cf\.[a-z]+\.\{turn\}\.[a-z0-9_.{}]+", message.pattern)
    assert all(output.pattern == Output.pattern for output in OUTPUTS)
    assert all(any(covers(trace, message.pattern.replace("{turn}", "T")) for trace in traces("T")) for message in MESSAGES)
    assert {reader_key("T"), due_key("T"), answer_key("*", "T")} <= set(traces("T"))
    consumer = caller_consumer("qwen2.5-coder:1.5b")
    assert covers(CallExpert.subjects(), consumer.filter)
    assert subject_token("qwen2.5-coder:1.5b") in consumer.durable
