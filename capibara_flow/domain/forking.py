"""Asking a turn again from one of its stages on, with something changed: what is copied of it, and the command that begins the rest.

Pure: ids and fleets are handed in.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.routing import lacks
from capibara_flow.errors import BadRequest, UnknownExpert
from topics.chat import CallExpert, ChatMessage, ChatRequest, ContentPart, Sampling, TextPart
from topics.grounding import RetrieveSources
from topics.knowledge import DEFAULT_COLLECTION, Collection
from topics.message import Command
from topics.output import Routed, SourcesFound, known
from topics.streams import subject_token

Stage = Literal["router", "retriever", "caller"]
STAGES: tuple[Stage, ...] = ("router", "retriever", "caller")
#: What comes of each stage and of those behind it, as it stands in subjects of the log; what nobody knows here came before.
_FOLLOWING = {stage: frozenset({*STAGES[number:], "call"}) for number, stage in enumerate(STAGES)}
#: The header of a message that was not made for its turn but copied from another one, whose id it holds.
COPIED = "Cf-Copied"
#: What can be changed, beside the fields of ``Sampling``.
KEYS = ("expert", "model", "message", "prompt", "system", "collection", "source")


#: The worker that finds sources, as a part of its step.
RETRIEVER: Stage = "retriever"
_COLLECTION: TypeAdapter[str] = TypeAdapter(Collection)
_DROPPED = re.compile(r"-[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class Sent:
    """One message to be published: to which *subject*, with what, under which id; it may be *opening* output, or a *call*."""

    subject: str
    data: bytes
    dedupe: str
    headers: dict[str, str] = field(default_factory=dict)
    opening: bool = False
    call: CallExpert | None = None


def parse(text: str) -> tuple[str, str]:
    """The key and the value of ``KEY=VALUE``; raises ``BadRequest`` that names the keys which there are."""
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or (key not in KEYS and key not in Sampling.model_fields):
        raise BadRequest(
            f"{text!r} changes nothing that can be changed: give KEY=VALUE, with one of {', '.join((*KEYS, *Sampling.model_fields))}"
        )
    if key == "source" and not _DROPPED.fullmatch(value.strip()):
        raise BadRequest(f"{text!r}: source=-2 leaves the source with the number 2 out; none can be put in")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{key}: what is no text (UTF-8) cannot be sent: {value[:20]!r}") from error
    return key, value


def changed(request: ChatRequest, changes: Sequence[tuple[str, str]]) -> ChatRequest:
    """*request* with all *changes*, the last of a key counts; raises ``BadRequest`` when a value does not fit."""
    messages, fields, model = request.messages, request.sampling.model_dump(), request.model
    for key, value in changes:
        match key:
            case "expert" | "model":
                model = value or None
            case "message" | "prompt":
                messages = _asking(messages, value)
            case "system":
                messages = _told(messages, value)
            case "collection":
                request = request.model_copy(update={"collection": _collection(value)})
            case "source":
                continue
            case _:
                fields[key] = _value(key, value)
    try:
        sampling = Sampling.model_validate(fields)
        return request.model_copy(update={"messages": messages, "sampling": sampling, "model": model})
    except ValidationError as error:
        problem = error.errors()[0]
        raise BadRequest(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


def forked(
    record: Record,
    turn: str,
    stage: Stage,
    changes: Sequence[tuple[str, str]],
    fleet: Fleet | None = None,
    *,
    until: float = 0.0,
) -> tuple[Sent, ...]:
    """What makes the new *turn* of what is kept in *record*, asked anew from *stage* on; the last message begins the work.

    What was said before *stage* is copied byte for byte, but for the turn's id. A new expert behind the router is looked up in *fleet*.
    A retriever looks for sources *until* then (seconds since the epoch). Raises ``BadRequest`` and ``UnknownExpert``.
    """
    if record.asked is None:
        raise BadRequest(f"the question of {record.turn} is not kept: only what the log has can be forked (CAPIBARA_LOG__ENABLED)")
    _refuse_elsewhere(stage, {key for key, _ in changes})
    if stage == "router":
        request = changed(record.asked.request, changes)
        return (_command(record.asked.model_copy(update={"turn": turn, "request": request})),)
    begin = _retrieval(record, turn, changes, fleet, until) if stage == "retriever" else _call(_called(record), turn, changes, fleet)
    return (*copies(record, turn, stage), _command(begin))


def begun(record: Record, stage: Stage, *, until: float = 0.0) -> tuple[Sent, ...]:
    """What lets the turn of *record* itself begin anew at *stage*, elsewhere; see ``forked`` for *until*. Raises ``BadRequest``."""
    return forked(record, record.turn, stage, (), until=until)


def begins_at(record: Record) -> Stage:
    """Where the turn of *record* began: a fork may have left out the router, or the retriever as well."""
    if not any(COPIED in entry.headers for entry in record.entries):
        return "router"
    if any(COPIED not in each.entry.headers for each in record.of(RetrieveSources)):
        return "retriever"
    return "caller" if record.calls else "router"


def copies(record: Record, turn: str, stage: Stage = "caller") -> tuple[Sent, ...]:
    """Everything that was said of the turn of *record* before *stage* had it, as things said of *turn*."""
    upstream = (entry for entry in record.entries if _is_upstream(entry, stage))
    found = [_copied(record, turn, entry, number) for number, entry in enumerate(upstream)]
    lines = [line for entry in record.branch() for line in entry.data.split(b"\n") if _opens(line, stage)]
    if not lines and record.routed:
        lines = [Routed.of(record.turn, record.routed.decision, record.routed.plan).line()]
    mark = {COPIED: record.turn}
    return (
        *found,
        *(
            Sent(f"cf.out.{turn}.data.main", renamed(line, record.turn, turn), f"{turn}:opening:{number}", mark, opening=True)
            for number, line in enumerate(lines)
        ),
    )


def renamed(data: bytes, old: str, new: str) -> bytes:
    """The message *data* of the turn *old* as one of *new*: every other byte stays."""
    return data.replace(f'"turn":"{old}"'.encode(), f'"turn":"{new}"'.encode(), 1)


def _copied(record: Record, turn: str, entry: Entry, number: int) -> Sent:
    subject = entry.subject.replace(record.turn, turn, 1)
    return Sent(subject, renamed(entry.data, record.turn, turn), f"{turn}:copied:{number}", {COPIED: record.turn})


def _is_upstream(entry: Entry, stage: Stage) -> bool:
    """Whether *entry* is a fact, or a command, of a stage before *stage*."""
    kind, _, *rest = entry.subject.split(".")[1:]
    return kind == "log" and rest[1 if rest[0] == "asked" else 0] not in _FOLLOWING[stage]


def _opens(line: bytes, stage: Stage) -> bool:
    """Whether *line* was told before *stage*, and before any answer. A place in a line is not: the new turn has its own."""
    output = known(line)
    return isinstance(output, Routed | SourcesFound if stage == "caller" else Routed)


def _refuse_elsewhere(stage: Stage, keys: set[str]) -> None:
    """Raise ``BadRequest`` when one of *keys* would change nothing from *stage* on."""
    if "source" in keys and stage != "caller":
        raise BadRequest(f"sources are looked for behind the {stage}'s beginning: drop one with --from caller")
    if "collection" in keys and stage == "caller":
        raise BadRequest("collection: the sources have been found by then; change it with --from retriever")


def _command(command: Command) -> Sent:
    return Sent(
        command.subject,
        command.model_dump_json(exclude_none=True).encode(),
        command.dedupe,
        call=command if isinstance(command, CallExpert) else None,
    )


def _called(record: Record) -> CallExpert:
    """What the first expert was asked; raises ``BadRequest`` when none was."""
    if not record.calls:
        raise BadRequest(f"{record.turn} never came to an expert: fork it from the router")
    return record.calls[0].message


def _retrieval(record: Record, turn: str, changes: Sequence[tuple[str, str]], fleet: Fleet | None, until: float) -> RetrieveSources:
    """What lets sources be found anew; whatever other parts of that step gave to the call stays. Raises ``BadRequest``."""
    found = record.of(RetrieveSources)
    if not found:
        raise BadRequest(f"no sources were looked for in {record.turn}: fork it from the router")
    asked = found[0].message
    call = record.calls[0].message if record.calls else asked.call
    plain = call.model_copy(update={"sources": asked.call.sources, "context": asked.call.context})
    collection = next((_collection(value) for key, value in reversed(changes) if key == "collection"), asked.collection)
    fields = {"turn": turn, "call": _call(plain, turn, changes, fleet), "collection": collection, "parts": (RETRIEVER,), "until": until}
    return asked.model_copy(update=fields)


def _call(call: CallExpert, turn: str, changes: Sequence[tuple[str, str]], fleet: Fleet | None) -> CallExpert:
    asks = call.request
    request = changed(asks, changes)
    # How often the old one was passed on says nothing of the new one.
    fields: dict[str, Any] = {"turn": turn, "request": request, "passed": 0, **_sources(call, changes)}
    if request.model != asks.model:
        expert = _found(request, fleet)
        fields |= {"request": request.model_copy(update={"model": expert.name}), "expert": subject_token(expert.name), "alternatives": ()}
    return call.model_copy(update=fields)


def _sources(call: CallExpert, changes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What *call* rests on once those sources are left out that are to be dropped; the others keep their numbers."""
    dropped = {int(value.strip()[1:]) for key, value in changes if key == "source"}
    if not dropped:
        return {}
    if missing := dropped - {source.n for source in call.sources}:
        there = ", ".join(str(source.n) for source in call.sources) or "none"
        raise BadRequest(f"there is no source {', '.join(map(str, sorted(missing)))}: there are {there}")
    from capibara_flow.domain.context import rewritten  # noqa: PLC0415  needs a package that only who has documents has

    kept = tuple(source for source in call.sources if source.n not in dropped)
    return {"sources": kept, "context": rewritten(call.context, kept)}


def _found(request: ChatRequest, fleet: Fleet | None) -> Expert:
    """The expert that *request* names, and that can take it."""
    if request.model is None:
        raise BadRequest("expert: one must be named here; only a fork from the router leaves that to the router")
    if fleet is None:
        raise BadRequest("no fleet is known here, so the expert cannot be looked up: set CAPIBARA_FLEET__FILE, or fork from the router")
    if (expert := fleet.find(request.model)) is None:
        raise UnknownExpert(f"no expert is called {request.model!r}; there are: {', '.join(each.name for each in fleet.active)}")
    if lacking := lacks(request, expert):
        raise BadRequest(f"{expert.name} does not take {' and '.join(lacking)}")
    return expert


def _asking(messages: tuple[ChatMessage, ...], words: str) -> tuple[ChatMessage, ...]:
    """*messages* whose last one of the user says *words*; its images stay."""
    place = max((number for number, each in enumerate(messages) if each.role == "user"), default=None)
    if place is None:
        raise BadRequest("message: the turn has no message of a user that could be changed")
    before = messages[place]
    if not (words.strip() or before.has_image):
        raise BadRequest("message: it is empty, and something must be asked")
    content: str | tuple[ContentPart, ...] = words
    if before.has_image and not isinstance(before.content, str):
        content = (TextPart(text=words), *(part for part in before.content or () if not isinstance(part, TextPart)))
    return (*messages[:place], before.model_copy(update={"content": content}), *messages[place + 1 :])


def _told(messages: tuple[ChatMessage, ...], words: str) -> tuple[ChatMessage, ...]:
    """*messages* with *words* as what the system says first; without any, it says nothing."""
    others = messages[1:] if messages[0].role == "system" else messages
    if not words and not others:
        raise BadRequest("system: it is all that was said, and something must be")
    return (ChatMessage(role="system", content=words), *others) if words else others


def _collection(text: str) -> str:
    """The name of a collection; empty: the one that everybody has."""
    try:
        return _COLLECTION.validate_python(text.strip() or DEFAULT_COLLECTION)
    except ValidationError as error:
        raise BadRequest(f"collection: {error.errors()[0]['msg']}") from error


def _value(key: str, text: str) -> Any:
    """What *text* means for a field of ``Sampling``; empty: the expert's own."""
    if key != "stop":
        return text.strip() or None
    if not text:
        return ()
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    return tuple(listed) if isinstance(listed, list) else (text,)
