"""A turn as it was kept: every message of it, in order, and what they tell. Pure: whoever reads them from the broker hands them in."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from pydantic import ValidationError

from capibara_flow.ports import Entry
from topics.chat import CallExpert, ExpertCalled, RouteTurn, TurnFailed, TurnRouted
from topics.message import ORIGIN, PRINCIPAL, TENANT, Command, Message
from topics.output import Done, Failed, Output, known

__all__ = ["Entry", "Record", "Told"]

Kind = TypeVar("Kind", bound=Message)


@dataclass(frozen=True, slots=True)
class Told(Generic[Kind]):
    """A message, read, with the entry that carries it."""

    entry: Entry
    message: Kind


@dataclass(frozen=True)
class Record:
    """All *entries* that are kept of *turn*, in the order in which they were stored."""

    turn: str
    entries: tuple[Entry, ...]
    _said: dict[str, list[tuple[Entry, Output]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, kind: type[Kind]) -> list[Told[Kind]]:
        """Every message of *kind*, a command as it was republished to the log; what this version cannot read is left out."""
        wanted = _logged(kind) if issubclass(kind, Command) else kind.subjects()
        found = []
        for entry in self.entries:
            if _matches(entry.subject, wanted):
                try:
                    found.append(Told(entry, kind.read(entry.data)))
                except ValidationError:
                    continue
        return found

    def branch(self, name: str = "main") -> list[Entry]:
        """The batches of output of the branch called *name*."""
        return [entry for entry in self.entries if entry.subject == f"cf.out.{self.turn}.data.{name}"]

    def said(self, name: str = "main") -> Iterator[tuple[Entry, Output]]:
        """Every event of the branch called *name*, each with the batch that brought it."""
        if name not in self._said:  # to read it once is enough
            lines = ((entry, known(line)) for entry in self.branch(name) for line in entry.data.split(b"\n"))
            self._said[name] = [(entry, output) for entry, output in lines if output is not None]
        return iter(self._said[name])

    @cached_property
    def asked(self) -> RouteTurn | None:
        """What the client asked for."""
        return next((each.message for each in self.of(RouteTurn)), None)

    @cached_property
    def routed(self) -> TurnRouted | None:
        """What the router decided."""
        return next((each.message for each in self.of(TurnRouted)), None)

    @cached_property
    def calls(self) -> list[Told[CallExpert]]:
        """What experts were asked, in order."""
        return self.of(CallExpert)

    @cached_property
    def attempts(self) -> list[Told[ExpertCalled]]:
        """How the calls ended of which a process lived to tell."""
        return self.of(ExpertCalled)

    @cached_property
    def dead(self) -> list[Told[TurnFailed]]:
        """What stages gave up."""
        return self.of(TurnFailed)

    @cached_property
    def end(self) -> Done | Failed | None:
        """How it ended; none while it goes on."""
        return next((output for _, output in self.said() if isinstance(output, Done | Failed)), None)

    @property
    def outcome(self) -> str:
        """How it ended in a word or two: the finish reason, ``failed``, or ``running``."""
        match self.end:
            case Done(finish_reason=reason):
                return reason
            case Failed():
                return "failed"
        return "running"

    @property
    def expert(self) -> str:
        """Who answered, or was to: the last that is known of it."""
        if isinstance(self.end, Done) and self.end.model_id:
            return self.end.model_id
        if self.calls:
            last = self.calls[-1].message
            return last.request.model or last.expert
        return self.routed.decision.model_id if self.routed else ""

    @property
    def began(self) -> float:
        """When its first message was stored, in seconds since the epoch."""
        return self.entries[0].when

    @property
    def lasted(self) -> float:
        """Seconds from its first message to its last."""
        return self.entries[-1].when - self.entries[0].when

    @property
    def tenant(self) -> str:
        """Whose turn it is; empty where nothing tells."""
        return self._header(TENANT)

    @property
    def principal(self) -> str:
        """Who asked; empty where nothing tells."""
        return self._header(PRINCIPAL)

    @property
    def origin(self) -> str:
        """The turn that this one was forked from; empty for most."""
        return self._header(ORIGIN)

    def _header(self, name: str) -> str:
        return next((entry.headers[name] for entry in self.entries if name in entry.headers), "")


def _logged(command: type[Message]) -> str:
    """Where commands of that kind are republished to, as ``topics.streams`` says."""
    return command.subjects().replace("cf.work.*.", "cf.log.*.asked.", 1)


def _matches(subject: str, pattern: str) -> bool:
    """Whether *subject* is one of *pattern*, which may have ``*`` for whole tokens."""
    tokens, wanted = subject.split("."), pattern.split(".")
    return len(tokens) == len(wanted) and all(b in {"*", a} for a, b in zip(tokens, wanted, strict=True))
