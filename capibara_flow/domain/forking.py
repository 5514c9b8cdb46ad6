"""Asking a turn again from one of its stages on, with something changed: what is copied of it, and the command that begins the rest.

Pure: ids and fleets are handed in.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.routing import lacks
from capibara_flow.errors import BadRequest, UnknownExpert
from topics.chat import CallExpert, ChatMessage, ChatRequest, ContentPart, Sampling, TextPart
from topics.message import Command
from topics.output import Routed, known
from topics.streams import subject_token

Stage = Literal["router", "caller"]
STAGES: tuple[Stage, ...] = ("router", "caller")
#: The header of a message that was not made for its turn but copied from another one, whose id it holds.
COPIED = "Cf-Copied"
#: What can be changed, beside the fields of ``Sampling``.
KEYS = ("expert", "model", "message", "prompt", "system", "source")


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


def forked(record: Record, turn: str, stage: Stage, changes: Sequence[tuple[str, str]], fleet: Fleet | None = None) -> tuple[Sent, ...]:
    """What makes the new *turn* of what is kept in *record*, asked anew from *stage* on; the last message begins the work.

    What was said before *stage* is copied byte for byte, but for the turn's id. A new expert at the caller is looked up in *fleet*.
    Raises ``BadRequest`` and ``UnknownExpert``.
    """
    if record.asked is None:
        raise BadRequest(f"the question of {record.turn} is not kept: only what the log has can be forked (CAPIBARA_LOG__ENABLED)")
    if stage == "router":
        if any(key == "source" for key, _ in changes):
            raise BadRequest("sources are looked for behind the router: drop one with --from caller")
        request = changed(record.asked.request, changes)
        return (_command(record.asked.model_copy(update={"turn": turn, "request": request})),)
    if not record.calls:
        raise BadRequest(f"{record.turn} never came to an expert: fork it from the router")
    return (*copies(record, turn), _command(_call(record.calls[0].message, turn, changes, fleet)))


def begun(record: Record, stage: Stage) -> tuple[Sent, ...]:
    """What lets the turn of *record* itself begin anew at *stage*, elsewhere; raises ``BadRequest``."""
    return forked(record, record.turn, stage, ())


def begins_at(record: Record) -> Stage:
    """Where the turn of *record* began: a fork may have left the router out."""
    copied = any(COPIED in entry.headers for entry in record.entries)
    return "caller" if record.calls and copied else "router"


def copies(record: Record, turn: str) -> tuple[Sent, ...]:
    """Everything that was said of the turn of *record* before an expert was called, as things said of *turn*."""
    found = [_copied(record, turn, entry, number) for number, entry in enumerate(filter(_is_upstream, record.entries))]
    lines = [line for entry in record.branch() for line in entry.data.split(b"\n") if _opens(line)]
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


def _is_upstream(entry: Entry) -> bool:
    """Whether *entry* is a fact of a stage before the caller."""
    kind, _, *rest = entry.subject.split(".")[1:]
    return kind == "log" and rest[0] != "caller" and rest[:2] != ["asked", "call"]


def _opens(line: bytes) -> bool:
    output = known(line)
    return output is not None and output.opening


def _command(command: Command) -> Sent:
    return Sent(
        command.subject,
        command.model_dump_json(exclude_none=True).encode(),
        command.dedupe,
        call=command if isinstance(command, CallExpert) else None,
    )


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
    if fleet is None:
        raise BadRequest("no fleet is known here, so the expert cannot be looked up: set CAPIBARA_FLEET__FILE, or fork from the router")
    if (expert := fleet.find(request.model or "")) is None:
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
