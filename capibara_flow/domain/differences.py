"""What two turns differ in, stage by stage: what was asked, decided, planned and called, how it ended, and the words. Pure.

Times are left out: no two turns take the same.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.record import Record, Told
from topics.chat import CallExpert
from topics.grounding import SourcesRetrieved
from topics.output import Done, Routed, Usage

Where = Literal["request", "decision", "plan", "sources", "expert", "call", "sampling", "attempts", "outcome", "usage", "text"]
#: Where a difference is one of decisions: the others follow from chance, or from these.
DECISIONS: frozenset[str] = frozenset({"decision", "plan", "sources", "expert"})

_PARTS: tuple[Literal["same", "gap"], ...] = ("same", "gap", "same")
_CONTEXT = 6  # words beside a change
_MOST_WORDS = 4000  # beyond it, whole lines are compared
_DIGITS = 12  # of a passage's id, which are enough to tell it from others


@dataclass(frozen=True)
class Difference:
    """At stage *where* the field *what* was *before* in the one turn, and is *after* in the other; none: it is not there."""

    where: Where
    what: str
    before: Any
    after: Any

    @property
    def decides(self) -> bool:
        """Whether somebody decided otherwise."""
        return self.where in DECISIONS

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self) | {"decides": self.decides}


def differences(one: Record, other: Record) -> tuple[Difference, ...]:
    """Everything in which *other* is not as *one*, in the order of the stages.

    What the expert was asked is told where that is not what the client had asked for: a fork may have changed it behind the router.
    """
    before, after = _facets(one), _facets(other)
    if not (before["call"] and after["call"]):  # nothing was called, or the log does not tell
        before["call"] = after["call"] = {}
    found = [each for where in before for each in _compared(where, before[where], after[where])]
    asked = {(each.what, each.before, each.after) for each in found if each.where == "request"}
    return tuple(each for each in found if each.where != "call" or (each.what, each.before, each.after) not in asked)


def decisive(found: tuple[Difference, ...]) -> bool:
    """Whether any of *found* is a difference of decisions."""
    return any(each.decides for each in found)


def _facets(record: Record) -> dict[Where, dict[str, Any]]:
    """What is compared, as flat fields by stage."""
    request = record.asked.request.model_dump(mode="json", exclude_none=True) if record.asked else {}
    decision, plan = _decided(record)
    calls = called(record)
    last = calls[-1].message if calls else None
    answer = Collected()
    for _, output in record.said():
        answer.add(output)
    tools = [call.model_dump(mode="json") for call in answer.tool_calls]
    return {
        "request": _flat(request),
        "decision": decision,
        "plan": plan,
        "sources": _sources(record, last) if last else {},
        "expert": {"asked": [each.message.request.model or each.message.expert for each in calls], "answered": record.expert},
        "call": _flat(last.request.model_dump(mode="json", exclude_none=True, exclude={"model", "sampling"})) if last else {},
        "sampling": last.request.sampling.model_dump(mode="json", exclude_defaults=True) if last else {},
        "attempts": _attempts(record),
        "outcome": {"outcome": record.outcome, **_failure(record)},
        "usage": _usage(record),
        "text": {"text": answer.text, "reasoning": answer.reasoning, **_flat({"tool_calls": tools})},
    }


def _decided(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """The router's decision and plan, from the log or from what the client was told."""
    if record.routed is not None:
        steps = [step.stage if step.expert is None else f"{step.stage}({step.expert})" for step in record.routed.plan.steps]
        return record.routed.decision.model_dump(), {"steps": steps}
    shown = next((output for _, output in record.said() if isinstance(output, Routed)), None)
    if shown is None:
        return {}, {}
    return shown.model_dump(exclude={"turn", "event", "plan"}), {"steps": list(shown.plan)}


def called(record: Record) -> list[Told[CallExpert]]:
    """What experts were asked; a call that came when the turn had been stopped was asked of nobody."""
    stopped = next(
        (entry.when for entry, output in record.said() if isinstance(output, Done) and output.finish_reason == "cancelled"), None
    )
    return [each for each in record.calls if stopped is None or each.entry.when <= stopped]


def _sources(record: Record, call: CallExpert) -> dict[str, Any]:
    """What *call* rests on, by title and id, and what stood in the way of more."""
    named = [" ".join(filter(None, (each.passage.title, each.passage.id[:_DIGITS]))) for each in call.sources]
    problem = next((each.message.problem for each in record.of(SourcesRetrieved)), "")
    return {"passages": named or None, "problem": problem or None}


def _attempts(record: Record) -> dict[str, Any]:
    """Who tried, how it went on and ended; those that told nothing are not there."""
    return {
        f"{each.message.branch}[{number}]": " ".join(
            part for part in (each.message.expert, each.message.continued, each.message.outcome) if part
        )
        for number, each in enumerate(record.attempts, 1)
    }


def _failure(record: Record) -> dict[str, Any]:
    end = record.end
    return {"detail": getattr(end, "detail", None), "title": getattr(end, "title", None)}


def _usage(record: Record) -> dict[str, Any]:
    usages = [output for _, output in record.said() if isinstance(output, Usage)]
    return usages[-1].model_dump(exclude={"turn", "event"}) if usages else {}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """*value* as its leaves, by path: ``messages[0].content``. What is empty is not there."""
    if isinstance(value, Mapping):
        parts = [_flat(each, f"{path}.{name}" if path else str(name)) for name, each in value.items()]
    elif isinstance(value, list | tuple):
        parts = [_flat(each, f"{path}[{number}]") for number, each in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for part in parts for name, leaf in part.items()}


def _compared(where: Where, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for what in dict.fromkeys([*before, *after]):
        one, other = before.get(what), after.get(what)
        if one != other:
            yield Difference(where, what, one, other)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words: both have them, they are only before or only after, or (a gap) both have them far from any change."""

    how: Literal["same", "before", "after", "gap"]
    text: str


def worded(before: str, after: str) -> list[Piece]:
    """The words of both texts, in order, with a few around each change; nothing where there is none.

    What is the same, only before, or left out, in that order, is *before*; with what is only after instead, it is *after*.
    """
    one, other = _words(before), _words(after)
    if max(len(one), len(other)) > _MOST_WORDS:
        one, other = before.splitlines(keepends=True), after.splitlines(keepends=True)
    deeds = SequenceMatcher(None, one, other, autojunk=len(one) > _MOST_WORDS // 4).get_opcodes()
    found: list[Piece] = []
    for number, (deed, i1, i2, j1, j2) in enumerate(deeds, 1):
        if deed == "equal":
            found += _around(one[i1:i2], behind=number > 1, ahead=number < len(deeds))
        else:
            found += [Piece("before", "".join(one[i1:i2])), Piece("after", "".join(other[j1:j2]))]
    return [piece for piece in found if piece.text] if before != after else []


def _around(words: list[str], *, behind: bool, ahead: bool) -> list[Piece]:
    """Of *words* that both have those that stand *behind* a change, and those *ahead* of one."""
    head, tail = _CONTEXT * behind, len(words) - _CONTEXT * ahead
    if tail <= head:
        return [Piece("same", "".join(words))]
    parts = words[:head], words[head:tail], words[tail:]
    return [Piece(how, "".join(part)) for how, part in zip(_PARTS, parts, strict=True)]


def _words(text: str) -> list[str]:
    """*text* as words, each with the blanks behind it: joined they are *text*."""
    return re.findall(r"\s+|\S+\s*", text)
