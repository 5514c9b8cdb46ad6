"""What happened in a turn, and when: its record as stages on one line of time. Pure.

Places on the line are the broker's (when a message was stored), lengths are the workers' own: clocks that disagree shift nothing.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.record import Entry, Record, Told
from capibara_flow.domain.turns import created
from topics.chat import CallExpert, CancelTurn, ExpertCalled
from topics.output import Continued, Done, Failed, Loading, Output, Reset, Routed, Token, ToolCalled, Usage, Waiting

#: ``door``, ``queue`` (a command waits to be taken), ``work`` (of a stage), ``attempt`` (at an answer), ``end`` (by who gave it up or
#: stopped it) last; ``news`` (told to the client), ``cancel`` and ``dead`` are moments.
Kind = Literal["door", "queue", "work", "attempt", "end", "news", "cancel", "dead"]

_QUIET = (Token, ToolCalled, Usage, Done, Failed, Routed)  # output that is shown elsewhere than as news
_DOOR_SECONDS = 60.0  # an id that was made longer before its question was stored says nothing of the door
_MOMENT = 0.005  # seconds
_FACT = 500  # characters of a fact
#: What an attempt of which nobody told the end came to, as far as can be seen.
BROKE = "broke off, and was the last one"
AGAIN, LOST, RUNNING = "broke off, tried again by the same process", "never told its end: its process died or lost the turn", "running"


@dataclass(frozen=True)
class Stage:
    """Something that happened: *start* and *end* in seconds since the turn began (no end: it goes on), and what was decided or counted."""

    kind: Kind
    name: str
    start: float
    end: float | None
    outcome: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lasted(self) -> float | None:
        """Seconds; none while it goes on."""
        return None if self.end is None else self.end - self.start


@dataclass(frozen=True)
class Totals:
    """What a turn took: *first_token_seconds* from its beginning to the first word, *silent_attempts* are those that told no end."""

    seconds: float
    first_token_seconds: float | None
    prompt_tokens: int
    completion_tokens: int
    burnt_tokens: int
    attempts: int
    silent_attempts: int
    passed_on: int
    cached: bool
    messages: int
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """A turn, laid out: *began* in seconds since the epoch, *stages* as they began one after the other, *missing* what is not known."""

    turn: str
    began: float
    tenant: str
    principal: str
    origin: str
    outcome: str
    expert: str
    question: str
    answer: str
    reasoning: str
    stages: tuple[Stage, ...]
    totals: Totals
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self)


def timeline(record: Record) -> Timeline:
    """What *record* tells of its turn."""
    opened = created(record.turn)
    began = opened if 0 <= record.began - opened <= _DOOR_SECONDS else record.began
    stages = [*_door(record, began), *_routed(record, began), *_works(record, began), *_news(record, began), *_moments(record, began)]
    for branch in _branches(record):
        attempts = list(_attempts(record, branch, began))
        stages += [*_queues(record, branch, began, attempts), *attempts]
    stages.sort(key=lambda stage: (stage.start, stage.end is None, stage.end or 0.0))
    answer = Collected()
    for _, output in record.said():
        answer.add(output)
    return Timeline(
        turn=record.turn,
        began=began,
        tenant=record.tenant,
        principal=record.principal,
        origin=record.origin,
        outcome=record.outcome,
        expert=record.expert,
        question=record.asked.request.question if record.asked else "",
        answer=answer.text,
        reasoning=answer.reasoning,
        stages=tuple(stages),
        totals=_totals(record, stages, began),
        missing=tuple(_missing(record, stages)),
    )


def _door(record: Record, began: float) -> Iterator[Stage]:
    """From the id that the door made to the command that the broker stored."""
    asked = _first(record, f"cf.log.{record.turn}.asked.")
    if asked is None:
        return
    request = record.asked.request if record.asked else None
    facts = {
        "messages": len(request.messages) if request else None,
        "model": request.model if request else None,
        "images": request.has_image or None if request else None,
        "tools": len(request.tools) or None if request else None,
        **(request.sampling.model_dump(exclude_defaults=True, mode="json") if request else {}),
    }
    yield Stage("door", "asked", 0.0, asked.when - began, facts=_given(facts))


def _routed(record: Record, began: float) -> Iterator[Stage]:
    """The router's decision, from the log, or else from what the client was told."""
    told = record.routed
    shown = next(((entry, output) for entry, output in record.said() if isinstance(output, Routed)), None)
    if told is not None:
        end = _first(record, f"cf.log.{record.turn}.router", whole=True)
        at = (end.when if end else told.ended) - began
        facts = {**told.decision.model_dump(), "plan": [step.stage for step in told.plan.steps] or None}
        yield from _command_waited(record, "router", began, at - (told.ended - told.started))
        yield Stage("work", "router", _from(at - (told.ended - told.started)), _from(at), told.decision.model_id, _given(facts))
    elif shown is not None:
        entry, output = shown
        at = entry.when - began
        facts = output.model_dump(exclude={"turn", "event"}) | {"plan": list(output.plan) or None, "told_by": "the output alone"}
        yield Stage("work", "router", at, at, output.model_id, _given(facts))


def _works(record: Record, began: float) -> Iterator[Stage]:
    """What other stages wrote to the log: facts with ``started`` and ``ended``, whatever else they tell."""
    for entry in record.entries:
        tokens = entry.subject.split(".")
        if tokens[1] != "log" or len(tokens) != 4 or tokens[3] in {"router", "caller"}:
            continue
        fact = _read(entry.data)
        started, ended = fact.pop("started", None), fact.pop("ended", None)
        if isinstance(started, int | float) and isinstance(ended, int | float):
            at = entry.when - began
            start = at - max(0.0, ended - started)
            yield from _command_waited(record, tokens[3], began, start)
            yield Stage("work", tokens[3], _from(start), at, str(fact.pop("outcome", "") or fact.get("problem", "")), _facts(fact))


def _command_waited(record: Record, stage: str, began: float, taken: float) -> Iterator[Stage]:
    """The time in which the command of *stage* waited to be taken."""
    asked = _first(record, f"cf.log.{record.turn}.asked.{stage}", whole=True)
    if asked is not None:
        yield Stage("queue", f"waits for {stage}", asked.when - began, max(asked.when - began, taken))


def _branches(record: Record) -> list[str]:
    """The branches that anybody was to speak on, or did."""
    found = dict.fromkeys(each.message.branch for each in record.calls)
    found |= dict.fromkeys(entry.subject.split(".")[4] for entry in record.entries if entry.subject.startswith(f"cf.out.{record.turn}."))
    return list(found | dict.fromkeys(each.message.branch for each in record.attempts))


def _leases(record: Record, branch: str) -> list[Entry]:
    """Each time that somebody took *branch*: who renews what he has writes the same once more."""
    all_of_them = [entry for entry in record.entries if entry.subject == f"cf.out.{record.turn}.lease.{branch}"]
    return [*all_of_them[:1], *(after for before, after in pairwise(all_of_them) if _claim(after) != _claim(before))]


def _attempts(record: Record, branch: str, began: float) -> Iterator[Stage]:
    """Every attempt at the answer: those that told their end, and those that only show as a lease that somebody took."""
    told = [each for each in record.attempts if each.message.branch == branch]
    # Who comes when all is said (a call that had waited for its place) finds that out, and tries nothing.
    ended = next((entry.sequence for entry, output in record.said(branch) if output.final), math.inf)
    leases = [lease for lease in _leases(record, branch) if lease.sequence < ended]
    told_by = _matched([lease.when for lease in leases], [each.message.started for each in told])
    matched = set(told_by.values())
    for number, lease in enumerate(leases):
        following = leases[number + 1] if number + 1 < len(leases) else None
        if number in told_by:
            yield _told_attempt(told[told_by[number]], lease.when - began, record)
        elif (ending := _ending(record, branch, lease, following)) is not None:
            yield Stage("end", _process(lease).split("@")[0], lease.when - began, ending[0].when - began, ending[1])
        else:
            after = leases[number + 2] if number + 2 < len(leases) else None
            given_up = following is not None and _ending(record, branch, following, after) is not None
            yield _silent_attempt(record, branch, (lease, following), number + 1, began, again=not given_up)
    for number, each in enumerate(told):
        if number not in matched:
            lasted = each.message.ended - each.message.started
            yield _told_attempt(each, _from(each.entry.when - began - lasted), record)


def _matched(leases: Sequence[float], started: Sequence[float]) -> dict[int, int]:
    """Which attempt (by when it started) belongs to which lease (by when it was taken), in order: the nearest, as clocks may disagree."""
    found: dict[int, int] = {}
    first = 0
    for number, when in enumerate(started):
        last = len(leases) - max(0, len(started) - number - 1)  # the later ones need theirs
        places = range(first, last)
        if not places:
            break
        nearest = min(places, key=lambda place: abs(leases[place] - when))
        found[nearest] = number
        first = nearest + 1
    return found


def _told_attempt(each: Told[ExpertCalled], start: float, record: Record) -> Stage:
    fact = each.message
    first = None if fact.first_token is None else start + fact.first_token - fact.started
    counted = fact.model_dump(exclude={"turn", "expert", "outcome", "started", "ended", "first_token", "branch"}, exclude_none=True)
    where = {} if fact.branch == "main" else {"branch": fact.branch}
    facts = counted | {"cached": fact.cached or None, "first_token": first} | where
    return Stage("attempt", fact.expert, start, start + max(0.0, fact.ended - fact.started), fact.outcome, _given(facts))


def _silent_attempt(record: Record, branch: str, leases: tuple[Entry, Entry | None], number: int, began: float, *, again: bool) -> Stage:
    """An attempt without an account: a process that died tells nothing, nor does one that tries *again* itself, or gives the turn up."""
    lease, following = leases
    batches = [entry for entry in record.branch(branch) if _between(entry, lease, following)]
    end, outcome = None, RUNNING
    if following is not None:
        end = following.when - began
        outcome = LOST if _process(following) != _process(lease) else AGAIN if again else BROKE
    elif record.end is not None and branch == "main":
        end, outcome = (batches[-1].when if batches else record.entries[-1].when) - began, LOST
    facts: dict[str, Any] = {"attempt": number, "told": False}
    for entry, output in record.said(branch):
        if _between(entry, lease, following):
            if isinstance(output, Continued):
                facts |= {"continued": output.how}
            elif isinstance(output, Reset):
                facts |= {"continued": "reset"}
            elif isinstance(output, Token | ToolCalled):
                facts.setdefault("first_token", entry.when - began)
                facts["pieces"] = facts.get("pieces", 0) + 1
            elif isinstance(output, Done | Failed):  # the log has not got its account yet, or never will
                end, outcome = entry.when - began, _end_in_words(output)
                facts["told"] = "by its output alone"
    return Stage("attempt", _asked_then(record, branch, lease.when), lease.when - began, end, outcome, facts)


def _end_in_words(end: Done | Failed) -> str:
    return end.finish_reason if isinstance(end, Done) else f"failed: {end.title}"


def _asked_then(record: Record, branch: str, when: float) -> str:
    """The expert whose turn it was at that time."""
    name = record.expert
    for each in record.calls:
        if each.message.branch == branch and (each.entry.when <= when or each is record.calls[0]):
            name = _expert(each.message)
    return name


def _ending(record: Record, branch: str, lease: Entry, following: Entry | None) -> tuple[Entry, str] | None:
    """The end that somebody said who took the branch for that alone, and nothing else."""
    said = [(entry, output) for entry, output in record.said(branch) if _between(entry, lease, following)]
    if not said or any(not isinstance(output, Usage | Done | Failed) for _, output in said):
        return None
    match said[-1]:
        case entry, Failed(title=title):
            return entry, f"gave it up: {title}"
        case entry, Done(finish_reason="cancelled"):
            return entry, "stopped it"
    return None


def _between(entry: Entry, lease: Entry, following: Entry | None) -> bool:
    """Whether *entry*, of the same stream, was stored while *lease* was the last one."""
    return lease.sequence < entry.sequence and (following is None or entry.sequence < following.sequence)


def _claim(lease: Entry) -> list[bytes]:
    """Whose lease it is: the process, and the name of this one claim; more may follow."""
    return lease.data.split(b" ")[:2]


def _process(lease: Entry) -> str:
    """Who took it, without the name of this one claim."""
    return lease.data.decode(errors="replace").split(" ")[0]


def _expert(call: CallExpert) -> str:
    return call.request.model or call.expert


def _queues(record: Record, branch: str, began: float, attempts: Sequence[Stage]) -> Iterator[Stage]:
    """How long each call of an expert waited until somebody took it."""
    calls = [each for each in record.calls if each.message.branch == branch]
    for number, each in enumerate(calls):
        at, call = each.entry.when - began, each.message
        # The log has a command a moment later than the queue has it.
        mine = [stage.start for stage in attempts if stage.kind == "attempt" and stage.name == _expert(call)]
        later = [start for start in mine if start >= at - _MOMENT]
        until = calls[number + 1].entry.when - began if number + 1 < len(calls) else _over(record, began)
        end = min([*later, *([until] if until is not None else [])], default=None)
        facts = {
            "expert": _expert(call),
            "bucket": call.bucket,
            "priority": None if call.priority == "normal" else call.priority,
            "sources": len(call.sources) or None,
            "passed": call.passed or None,
            "alternatives": list(call.alternatives) or None,
            "plan": [step.stage for step in call.plan.steps] or None,
            "branch": None if branch == "main" else branch,
        }
        words = "passed on" if call.passed else ""
        yield Stage("queue", f"waits for {_expert(call)}", at, None if end is None else max(at, end), words, _given(facts))


def _over(record: Record, began: float) -> float | None:
    """When the turn had ended; none while it goes on."""
    return next((entry.when - began for entry, output in record.said() if output.final), None)


def _news(record: Record, began: float) -> Iterator[Stage]:
    """What the client was told beside the answer: waiting, loading, how an attempt goes on, and what later versions tell."""
    for entry, output in record.said():
        if isinstance(output, _QUIET):
            continue
        at = entry.when - began
        facts = _facts(output.model_dump(exclude={"turn", "event"}, mode="json"))
        yield Stage("news", output.event, at, at, _in_words(output), facts)


def _in_words(output: Output) -> str:
    match output:
        case Waiting(title=title, reason=reason):
            return title or reason
        case Loading(eta_s=eta):
            return "" if eta is None else f"about {eta:g} s"
        case Continued(how=how):
            return how
    return ""


def _moments(record: Record, began: float) -> Iterator[Stage]:
    """Signals and dead letters."""
    for stop in record.of(CancelTurn):
        at = stop.entry.when - began
        yield Stage("cancel", "cancel", at, at, stop.message.reason)
    for letter in record.dead:
        at, failed = letter.entry.when - began, letter.message
        yield Stage("dead", f"dead letter of {failed.stage}", at, at, failed.title, {"detail": failed.detail[:_FACT]})


def _totals(record: Record, stages: Sequence[Stage], began: float) -> Totals:
    usage = next((output for _, output in reversed(list(record.said())) if isinstance(output, Usage)), None)
    words = (entry.when - began for entry, output in record.said() if isinstance(output, Token | ToolCalled))
    attempts = [stage for stage in stages if stage.kind == "attempt"]
    return Totals(
        seconds=record.entries[-1].when - began,
        first_token_seconds=next(words, None),
        prompt_tokens=usage.prompt_tokens if usage else sum(each.message.prompt_tokens for each in record.attempts),
        completion_tokens=usage.completion_tokens if usage else sum(each.message.completion_tokens for each in record.attempts),
        burnt_tokens=usage.burnt_tokens if usage else sum(each.message.burnt_tokens for each in record.attempts),
        attempts=max(len(attempts), usage.attempts if usage and not attempts else 0),
        silent_attempts=sum(stage.facts.get("told") is False for stage in attempts),
        passed_on=max((each.message.passed for each in record.calls), default=0),
        cached=isinstance(record.end, Done) and bool(record.end.cached),
        messages=len(record.entries),
        bytes=sum(len(entry.data) for entry in record.entries),
    )


def _missing(record: Record, stages: Sequence[Stage]) -> Iterator[str]:
    """What cannot be told, and why."""
    subjects = [entry.subject.split(".") for entry in record.entries]
    if not any(tokens[1] == "log" for tokens in subjects):
        yield "the log holds nothing of it (switched off, or aged out): what was asked, and how attempts ended, is not known"
    elif record.asked is None and record.routed is not None:
        yield "the question is no longer kept"
    if not any(tokens[1] == "out" and tokens[3] == "data" for tokens in subjects):
        yield "no output is kept: it has not been said yet, or has aged out"
    elif record.end is None:
        yield "no end is kept: it goes on, or was left behind"
    silent = [stage for stage in stages if stage.facts.get("told") is False]
    if silent:
        yield f"{len(silent)} of the attempts told no end: what they counted is not in the tokens unless it reached the client"


def _first(record: Record, subject: str, *, whole: bool = False) -> Entry | None:
    """The first entry whose subject begins with *subject*, or is the *whole* of it."""
    return next((entry for entry in record.entries if (entry.subject == subject if whole else entry.subject.startswith(subject))), None)


def _from(seconds: float) -> float:
    """Nothing happened before the beginning, whatever clocks say."""
    return max(0.0, seconds)


def _given(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _facts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """*fields* of a message of any kind as facts: long texts cut off, and of what has many parts their number."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if value in (None, "", []) or name == "turn":
            continue
        if isinstance(value, str):
            found[name] = value[:_FACT]
        elif isinstance(value, list | tuple | dict):
            small = isinstance(value, list) and len(value) <= 16 and all(isinstance(each, str) and len(each) <= 64 for each in value)
            found[name] = value if small else len(value)
        else:
            found[name] = value
    return found


def _read(data: bytes) -> dict[str, Any]:
    """The fields of a fact; none of what is no JSON object."""
    try:
        read = json.loads(data)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


@dataclass(frozen=True)
class Summary:
    """A turn in one line: *when* in seconds since the epoch, *question* its first words, *tokens* those that the client got."""

    turn: str
    when: float
    tenant: str
    question: str
    route: str
    expert: str
    outcome: str
    seconds: float
    tokens: int
    origin: str = ""

    @classmethod
    def of(cls, record: Record, words: int = 60) -> "Summary":
        """*record* in short, with at most *words* characters of its question."""
        question = " ".join(record.asked.request.question[: 4 * words].split()) if record.asked else ""
        shown = next((output.route_name for _, output in record.said() if isinstance(output, Routed)), "")
        usage = next((output for _, output in reversed(list(record.said())) if isinstance(output, Usage)), None)
        return cls(
            turn=record.turn,
            when=record.began,
            tenant=record.tenant,
            question=question if len(question) <= words else question[: words - 1] + "…",
            route=record.routed.decision.route_name if record.routed else shown,
            expert=record.expert,
            outcome=record.outcome,
            seconds=record.lasted,
            tokens=usage.completion_tokens if usage else 0,
            origin=record.origin,
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self)
