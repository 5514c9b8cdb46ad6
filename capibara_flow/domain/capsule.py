"""A capsule: everything that is kept of one turn in one readable file, and what differs when it is played again. Pure.

The file is JSON, ``"format": "capibara-capsule"``. ``messages`` is what is compared with, ``engines`` what is played; ``configuration``
holds fleet and routes without secrets. What people wrote stays as they wrote it, even if it looks like a key.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from capibara_flow.domain.configuration import digest, redacted, told
from capibara_flow.domain.differences import Difference, differences
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.recording import Recording, recorded
from capibara_flow.domain.routes import Routes
from capibara_flow.domain.turns import is_turn_id
from capibara_flow.errors import BadRequest, TooLarge
from topics.message import Part

FORMAT: Literal["capibara-capsule"] = "capibara-capsule"
VERSION: Literal[1] = 1
#: No file is larger, in bytes.
MOST = 128 * 1024 * 1024
#: What is shown of a line that differs, in characters.
_SHOWN = 200


class Kept(Part):
    """One message: *at* is when it was stored, in seconds since the epoch. Of its content one is there.

    *body* for JSON, *lines* for several of it (a batch of output), *text*, or *base64* for what is not even text.
    """

    at: float
    stream: str
    sequence: int
    subject: str
    headers: dict[str, str] = {}
    body: Any = None
    lines: tuple[Any, ...] | None = None
    text: str | None = None
    base64: str | None = None

    @classmethod
    def of(cls, entry: Entry) -> "Kept":
        """*entry*, as readable as it can be without changing a byte."""
        where = {"at": round(entry.when, 6), "stream": entry.stream, "sequence": entry.sequence, "subject": entry.subject}
        return cls(**where, headers=redacted(dict(entry.headers)), **_content(entry.data))

    def entry(self) -> Entry:
        """The message again; raises ``ValueError`` when it was tampered with."""
        if self.text is not None:
            data = self.text.encode()
        elif self.base64 is not None:
            data = base64.b64decode(self.base64, validate=True)
        elif self.lines is not None:
            data = b"\n".join(map(_compact, self.lines))
        else:
            data = _compact(self.body)
        return Entry(self.stream, self.sequence, self.at, self.subject, self.headers, data)


class Configuration(Part):
    """What was decided by, as far as it is known: *then* is the digest that the router told, *digest* that of what is here.

    *embedder* names the model that read questions.
    """

    then: str
    digest: str
    embedder: str
    fleet: Fleet
    routes: Routes | None = None


class Capsule(Part):
    """All of it; *versions* are those of the software that routed the turn (``router``) and that made the file (``capsule``)."""

    format: Literal["capibara-capsule"] = FORMAT
    version: Literal[1] = VERSION
    turn: str
    question: str = ""
    outcome: str = ""
    versions: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    decisions: tuple[Any, ...] = ()
    configuration: Configuration
    engines: Recording
    messages: tuple[Kept, ...] = Field(min_length=1)

    @field_validator("turn")
    @classmethod
    def _is_an_id(cls, turn: str) -> str:
        if not is_turn_id(turn):
            raise ValueError("not the id of a turn")
        return turn

    @field_validator("messages")
    @classmethod
    def _are_messages(cls, messages: tuple[Kept, ...]) -> tuple[Kept, ...]:
        if any(each.subject.split(".")[:1] != ["cf"] or each.subject.count(".") < 3 for each in messages):
            raise ValueError("a subject that is none of a turn")
        return messages

    @property
    def record(self) -> Record:
        """The turn as it was kept."""
        return Record(self.turn, tuple(kept.entry() for kept in self.messages))


def capsule(record: Record, fleet: Fleet, routes: Routes | None, embedder: str, version: str) -> Capsule:
    """What is kept in *record*, with the configuration of today; raises ``BadRequest`` for a turn that has not ended."""
    engines = recorded(record, fleet)
    by = record.routed
    here = digest(fleet, routes)
    then = by.configuration if by else ""
    notes: tuple[str, ...] = (
        "keys, and users in addresses, are left out of fleet and headers; what people and engines said stands as it was said",
    )
    if then and then != here:
        notes += ("fleet or routes have changed since the turn was routed: those of the day on which this file was made are in it",)
    question = record.asked.request.question if record.asked else ""
    return Capsule(
        turn=record.turn,
        question=question,
        outcome=record.outcome,
        versions={"router": by.version if by else "", "capsule": version},
        notes=notes,
        decisions=tuple(decided(record)),
        configuration=Configuration(
            then=then, digest=here, embedder=embedder, fleet=Fleet.model_validate_json(json.dumps(told(fleet))), routes=routes
        ),
        engines=engines,
        messages=tuple(map(Kept.of, record.entries)),
    )


def decided(record: Record) -> Iterator[dict[str, Any]]:
    """What stages decided and how calls ended, in short: for whoever reads the file."""
    if record.routed:
        yield {"stage": "router", **record.routed.model_dump(mode="json", exclude={"turn"}, exclude_defaults=True)}
    for each in record.attempts:
        yield {"stage": "caller", **each.message.model_dump(mode="json", exclude={"turn"}, exclude_defaults=True)}
    for letter in record.dead:
        yield {"stage": letter.message.stage, "title": letter.message.title, "detail": letter.message.detail}


# --- the file -------------------------------------------------------------------------------------------------


def written(made: Capsule) -> Iterator[str]:
    """*made* as the text of a file, piece by piece: one line a message and a piece of an answer, the rest indented."""
    yield "{\n"
    for name in ("format", "version", "turn", "question", "outcome", "versions", "notes", "decisions"):
        yield f"{_json(name)}: {_json(made.model_dump(mode='json', include={name})[name], indent=1)},\n"
    yield f'"configuration": {_json(_dumped(made.configuration))},\n'
    yield '"engines": {\n'
    engines = _dumped(made.engines)
    takes = engines.pop("takes", [])
    yield from (f" {_json(name)}: {_json(value)},\n" for name, value in engines.items())
    yield ' "takes": [' + ",".join(map(_take, takes)) + "]\n},\n"
    yield '"messages": [\n'
    last = len(made.messages) - 1
    for number, each in enumerate(made.messages):
        yield f" {_json(each.model_dump(mode='json', exclude_none=True))}{',' if number < last else ''}\n"
    yield "]\n}\n"


def read(text: bytes) -> Capsule:
    """The capsule in a file; raises ``BadRequest`` that says what is wrong with it, and ``TooLarge``."""
    if len(text) > MOST:
        raise TooLarge(f"no capsule: {len(text)} bytes, and {MOST} are the most")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"no capsule: not JSON: {error}") from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise BadRequest('no capsule: JSON, but without "format": "capibara-capsule"; `capibara capsule export TURN FILE` makes one')
    if data.get("version") != VERSION:
        raise BadRequest(f"a capsule of version {_json(data.get('version'))[:20]}: this software reads version {VERSION}")
    try:
        found = Capsule.model_validate_json(text)
        if any(entry.turn != found.turn for entry in found.record.entries):
            raise BadRequest("a broken capsule: it has messages of another turn")
    except ValidationError as error:
        where = error.errors()[0]
        raise BadRequest(f"a broken capsule: {'.'.join(map(str, where['loc'])) or 'file'}: {where['msg']}") from error
    except ValueError as error:
        raise BadRequest(f"a broken capsule: a message is not what it was: {error}") from error
    _check(found)
    return found


def _check(found: Capsule) -> None:
    """Raise ``BadRequest`` unless the parts of a capsule belong together."""
    if found.engines.turn != found.turn or found.record.asked is None or found.record.end is None:
        raise BadRequest("a broken capsule: the question, the end or the engines of its turn are missing")


def _take(take: dict[str, Any]) -> str:
    pieces = take.pop("pieces", [])
    head = _json(take)
    return "\n  " + head[:-1] + ', "pieces": [' + ",".join(f"\n   {_json(piece)}" for piece in pieces) + "]}"


def _dumped(part: Part) -> dict[str, Any]:
    data: dict[str, Any] = part.model_dump(mode="json", exclude_defaults=True)
    return data


def _content(data: bytes) -> dict[str, Any]:
    """*data* as the most readable of a ``Kept``'s fields that gives back the same bytes."""
    pieces = data.split(b"\n")
    values = [_value(piece) for piece in pieces]
    if all(found for found, _ in values):
        return {"body": values[0][1]} if len(pieces) == 1 else {"lines": tuple(value for _, value in values)}
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _value(data: bytes) -> tuple[bool, Any]:
    try:
        value = json.loads(data)
        json.dumps(value, allow_nan=False)  # what only Python takes for JSON would be written as null
        return _compact(value) == data and value is not None, value
    except (ValueError, RecursionError):
        return False, None


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


# --- what differs ---------------------------------------------------------------------------------------------

#: Output that asks for patience: whether and how often it is told depends on the time.
_TIMED = frozenset({"waiting", "loading", "queued"})
#: What belongs to which stage; the rest is the caller's.
_ROUTERS, _RETRIEVERS = frozenset({"decision", "plan"}), frozenset({"sources"})


def changes(before: Record, after: Record, *, router: bool = True, retriever: bool = True, caller: bool = True) -> tuple[Difference, ...]:
    """In what *after*, the same turn played again, is not as it was *before*: decisions, then every byte that the client got.

    Times, the borders of batches, and what asks for patience are left out. A stage that was not played is not compared.
    """
    found = [each for each in differences(before, after) if each.where != "request"]
    failed_early = not before.calls
    played = dict.fromkeys(_ROUTERS, router) | dict.fromkeys(_RETRIEVERS, retriever)
    kept = [each for each in found if played.get(each.where, caller or failed_early)]
    if not caller:
        return tuple(each for each in kept if each.where in played or each.what in {"outcome", "title"})
    one, other = list(said(before)), list(said(after))
    if one != other:
        place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        kept.append(Difference("text", f"event {place + 1}", _at(one, place), _at(other, place)))
    return tuple(kept)


def said(record: Record) -> Iterator[str]:
    """The events that the client got, each as its line, without times and what only asks for patience."""
    for entry in record.branch():
        yield from filter(None, map(_timeless, entry.data.split(b"\n")))


def _timeless(line: bytes) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return line.decode("utf-8", "replace")
    if value.get("event") in _TIMED:
        return ""
    if value.get("event") == "done":
        value.pop("timings", None)
    return _compact(value).decode()


def _at(events: list[str], place: int) -> str | None:
    return events[place][:_SHOWN] if place < len(events) else None
