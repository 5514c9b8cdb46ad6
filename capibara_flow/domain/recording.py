"""What engines said in a turn, attempt by attempt, read out of what is kept of it: enough to play them again. Pure.

The client's output tells nearly all: an engine's pieces are stored one by one, ``continued`` and ``reset`` tell where an attempt began,
``waiting`` why the one before had failed, ``usage`` what was made unseen. What left no trace is filled in from the numbers of attempts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from capibara_flow import errors
from capibara_flow.domain.continuing import Held, Way, held
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.forking import Stage, begins_at
from capibara_flow.domain.record import Record, Told
from capibara_flow.domain.routing import Understood, needs_reading
from capibara_flow.errors import BadRequest, CapibaraError, EngineBroke, EngineFault
from topics.chat import EXPIRED, PASSED_ON, CallExpert, CancelTurn, Complexity, ExpertCalled
from topics.message import Part
from topics.output import Continued, Done, Failed, Loading, Output, Reset, Token, ToolCalled, Usage, Waiting

#: How an attempt ended. ``finished``: with the engine's finish reason. ``failed``: with an error. ``stopped`` and ``late``: it was silent
#: until somebody stopped the turn, or until its deadline. ``lost``: without a word, with the process that made it.
Ending = Literal["finished", "failed", "stopped", "late", "lost"]
_MOST_SILENT = 500  # attempts that left no trace: more are not believed
_VOTE = "; a consensus of "  # what the router adds to a reading's reasons


class Fragment(Part):
    """A piece of a tool call."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Said(Part):
    """One piece of an answer, *at* so many seconds after the turn began: words, a piece of a tool call, or news of loading."""

    at: float = 0
    text: str = ""
    reasoning: str = ""
    tool: Fragment | None = None
    loading: bool = False


class Take(Part):
    """One attempt of *expert*: all that its engine said which is known, and how that ended.

    *unseen* pieces repeated what the client held already (*text*, *reasoning*) before anything new was said. *counted* are the tokens of
    prompt and answer as the engine counted them. An attempt that *lasted* was worth another one at once. After a *last* one nobody tried
    again.
    """

    expert: str
    way: Way = "fresh"
    text: str = ""
    reasoning: str = ""
    unseen: int = 0
    cached: bool = False
    pieces: tuple[Said, ...] = ()
    counted: tuple[int, int] | None = None
    ending: Ending
    reason: str = ""
    title: str = ""
    detail: str = ""
    lasted: bool = False
    last: bool = False


class Reading(Part):
    """What a router had understood of the question."""

    route: str
    complexity: Complexity
    confidence: float
    reasoning: str

    def understood(self) -> Understood:
        """As the router takes it."""
        return Understood(self.route, self.complexity, self.confidence, self.reasoning)


class Recording(Part):
    """A turn as it is played again: where it began, what engines said, why somebody stopped it, if so, and whether it came too late.

    *reading* is how its question was understood, if it had to be read.
    """

    turn: str
    stage: Stage = "router"
    takes: tuple[Take, ...] = ()
    cancelled: str | None = None
    expires: bool = False
    reading: Reading | None = None


def recorded(record: Record, fleet: Fleet) -> Recording:
    """What is kept of a turn, as something to be played; *fleet* tells whether its question was read.

    Raises ``BadRequest`` when it had not ended, or its question is not kept.
    """
    if record.asked is None:
        raise BadRequest(f"the question of {record.turn} is not kept: the log must be switched on (CAPIBARA_LOG__ENABLED)")
    if record.end is None:
        raise BadRequest(f"{record.turn} has not ended: a capsule holds whole turns")
    stopped = next((each.message.reason for each in record.of(CancelTurn)), None)
    by_hand = isinstance(record.end, Done) and record.end.finish_reason == "cancelled"
    overdue = isinstance(record.end, Failed) and stopped == EXPIRED and not record.dead
    takes = tuple(_takes(record))
    late = any(take.ending == "late" or (take.last and take.ending == "failed" and _passes(take.title)) for take in takes)
    return Recording(
        turn=record.turn,
        stage=begins_at(record),
        takes=takes,
        cancelled=stopped if by_hand or overdue else None,
        expires=late or (isinstance(record.end, Failed) and record.end.title == "turn expired" and not overdue),
        reading=_reading(record, fleet),
    )


def _reading(record: Record, fleet: Fleet) -> Reading | None:
    """What the router understood: the decision holds it, unless a name or a rule had decided."""
    if record.asked is None or record.routed is None:
        return None
    try:
        if not needs_reading(record.asked.request, fleet):
            return None
    except CapibaraError:  # it could not be served by this fleet
        return None
    made = record.routed.decision
    reasons = made.reasoning.partition(_VOTE)[0]
    return Reading(route=made.route_name, complexity=made.complexity, confidence=made.confidence, reasoning=reasons)


def fault(title: str, detail: str) -> CapibaraError:
    """The error of ours that bears *title*; a plain one if none does."""
    return _BY_TITLE.get(title, CapibaraError)(detail)


def _passes(title: str) -> bool:
    """Whether an error of that *title* is tried again until the turn's time is up."""
    return isinstance(fault(title, ""), EngineFault)


_KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CapibaraError)]
_BY_TITLE: dict[str, type[CapibaraError]] = {kind("").title: kind for kind in _KINDS}


# --- attempt by attempt ---------------------------------------------------------------------------------------


def _takes(record: Record) -> Iterator[Take]:
    """Every attempt, in order."""
    said: list[Output] = []
    facts = [each.message for each in record.attempts]
    calls = record.calls
    output = list(record.said())
    for place, call in enumerate(calls):
        until = calls[place + 1].entry.when if place + 1 < len(calls) else float("inf")
        heard = [(entry.when, event) for entry, event in output if call.entry.when <= entry.when < until]
        fact = _fact(facts, call.message)
        walk = _Walk(record, call, fact, said, is_last=place + 1 == len(calls))
        for when, event in heard:
            walk.hear(when - record.began, event)
        walk.end()
        yield from walk.takes


def _fact(facts: list[ExpertCalled], call: CallExpert) -> ExpertCalled | None:
    """How *call* ended, taken out of *facts*; none when nobody lived to tell."""
    name = call.request.model or call.expert
    found = next((fact for fact in facts if fact.expert == name), None)
    if found:
        facts.remove(found)
    return found


@dataclass
class _Open:
    """An attempt that goes on: what the client held when it began, its number if the client was told, and what was said since."""

    holds: Held
    way: Way = "fresh"
    number: int | None = None
    pieces: list[Said] = field(default_factory=list)

    @property
    def shown(self) -> int:
        return sum(not piece.loading for piece in self.pieces)


class _Walk:
    """One call, output by output; *fact* tells how it ended, if anything does. *said* is all that the client got, and grows."""

    def __init__(self, record: Record, call: Told[CallExpert], fact: ExpertCalled | None, said: list[Output], *, is_last: bool) -> None:
        self._record, self._call, self._fact, self._said, self._is_last = record, call.message, fact, said, is_last
        self._expert = call.message.request.model or call.message.expert
        self._held = len(said), held(said)
        self._open = _Open(self._held[1])
        self._begun = False
        self._hidden: int | None = None  # the number of an attempt of which nothing was seen, while nothing else has been heard
        self._passing = ""  # why it was passed on
        self._final: Usage | None = None
        self.takes: list[Take] = []

    def hear(self, at: float, output: Output) -> None:
        """One more event."""
        match output:
            case Token(text=text, reasoning=reasoning):
                self._piece(Said(at=round(at, 6), text=text, reasoning=reasoning or ""))
            case ToolCalled(index=index, id=id_, name=name, arguments=arguments):
                self._piece(Said(at=round(at, 6), tool=Fragment(index=index, id=id_, name=name, arguments=arguments)))
            case Loading():
                self._piece(Said(at=round(at, 6), loading=True))
            case Continued(how=how, attempt=attempt):
                self._goes_on(how)
                self._open.number = attempt
                self._fill_before(attempt)
            case Reset():
                self._goes_on("reset")
            case Waiting(stage="caller", title=title, reason=reason, attempt=attempt):
                self._waits(title, reason, attempt)
            case Usage() as usage if self._is_final(usage):
                self._final = usage
                return  # what the last attempt began with is without it
            case Usage() as usage:
                self._reach(usage.attempts, "skip")  # only of one that repeats is anything unseen
                self._said.append(usage)  # the next one begins with it
                self._close("failed", title=EngineBroke("").title, usage=usage, lasted=bool(self.takes))
                self._hidden = usage.attempts
                return
        self._said.append(output)

    def _is_final(self, usage: Usage) -> bool:
        """Whether *usage* is told with the end, and not of an attempt whose words nobody saw."""
        last = next((output for _, output in reversed(list(self._record.said())) if isinstance(output, Usage)), None)
        return last is usage and (isinstance(self._record.end, Done) or usage.attempts <= self._holds().attempts)

    def _piece(self, piece: Said) -> None:
        self._begun, self._hidden = True, None
        self._open.pieces.append(piece)

    def _goes_on(self, way: Way) -> None:
        """An attempt says its first word; whatever went on before has ended without one."""
        if self._open.shown:
            self._close_silently()
        self._open.way = way
        self._begun, self._hidden = True, None

    def _reach(self, attempt: int, way: Way | None) -> None:
        """What is told now is of the *attempt* of that number, which goes on this *way*: an open one that does not ended without a word."""
        number = self._open.number
        if self._open.shown and (number < attempt if number else way not in {None, self._open.way}):
            self._close_silently()
            self._open.way, self._begun = way or "fresh", True
        self._fill_before(attempt)

    def _waits(self, title: str, reason: str, attempt: int) -> None:
        """The attempt before has failed, for this *reason*."""
        passes_on = not self._is_last and self._call.passed >= len(self._call.alternatives)
        failed = attempt - self._call.passed if passes_on else attempt - 1
        if passes_on and self._fact:
            self._passing = reason
        elif self._hidden is not None and failed + self._call.passed <= self._hidden:
            self.takes[-1] = self.takes[-1].model_copy(update={"title": title, "detail": reason, "lasted": False})
            self._hidden = None
        elif not passes_on or self._begun or len(self.takes) < failed:
            self._reach(failed + self._call.passed, None)
            self._fill(failed - 1)
            self._close("failed", title=title, detail=reason)

    def end(self) -> None:
        """The call is over: it was passed on, or the turn ended."""
        if not self._is_last:
            self._passed_on()
            return
        match self._record.end:
            case Done(finish_reason="cancelled"):
                if self._fact:
                    self._reach(self._fact.attempt, self._fact.continued or "fresh")
                if self._begun or self._fact:
                    self._fill_by_number()
                    self._close("stopped", usage=self._usage())
            case Done(finish_reason=reason, cached=cached):
                self._fill_by_number()
                self._close("finished", reason=reason, usage=self._usage(), cached=bool(cached), last=True)
            case Failed() as failed:
                self._failed(failed)

    def _passed_on(self) -> None:
        fact = self._fact
        title = fact.outcome.removeprefix(PASSED_ON) if fact else EngineBroke("").title
        if self._hidden is not None and (fact is None or fact.attempt <= self._hidden):
            last = self.takes.pop()
            self._break_before(title)
            self.takes.append(last.model_copy(update={"title": title, "detail": self._passing or last.detail}))
        elif fact and (self._begun or len(self.takes) < fact.attempt - self._call.passed):
            self._reach(fact.attempt, fact.continued or "fresh")
            self._break_before(title)
            self._close("failed", title=title, detail=self._passing)

    def _break_before(self, title: str) -> None:
        """An engine that breaks is asked again at once: only the second time the call is passed on with that *title*."""
        if title == EngineBroke("").title:
            self._fill(1)

    def _failed(self, failed: Failed) -> None:
        letter = next((each.message for each in self._record.dead if each.message.stage == "caller"), None)
        title, detail = (letter.title, letter.detail) if letter else (failed.title, failed.detail)
        if title != "turn expired":
            self._close("failed", title=title, detail=detail, last=True)
        elif self._begun:
            self._close("late", last=True)

    def _fill_by_number(self) -> None:
        known = self._fact or self._usage()
        self._fill_before(1 if known is None else known.attempt if isinstance(known, ExpertCalled) else known.attempts)

    def _fill_before(self, attempt: int) -> None:
        """This is the *attempt* of that number; the least that it can be after all that the client saw tells nothing."""
        if attempt > self._open.holds.attempts + 1:
            self._fill(attempt - self._call.passed - 1)

    def _fill(self, failed: int) -> None:
        """So many attempts have failed before this one: those that left no trace failed at once, and were repeated at once."""
        while len(self.takes) < min(failed, _MOST_SILENT):
            going, self._open = self._open, _Open(self._holds())
            begun = self._begun
            self._close_silently()
            self._open, self._begun = going, begun

    def _close_silently(self) -> None:
        """An attempt ended, and nothing tells how: by a fault of the engine, unless that would have been passed on or told."""
        again = bool(self.takes)
        lost = (again and bool(self._call.alternatives)) or self._open.way == "skip"
        self._close("lost" if lost else "failed", title="" if lost else EngineBroke("").title, lasted=again)

    def _close(
        self,
        ending: Ending,
        *,
        usage: Usage | None = None,
        reason: str = "",
        title: str = "",
        detail: str = "",
        cached: bool = False,
        lasted: bool = False,
        last: bool = False,
    ) -> None:
        holds, way, shown = self._open.holds, self._open.way, self._open.shown
        counted, unseen = _made(usage, holds, way, shown, cached=cached, finished=ending == "finished")
        # It says all again where nothing tells how it would have gone on, and something was made.
        way = "skip" if way == "fresh" and unseen and holds.kept else way
        take = Take(
            expert=self._expert,
            way=way,
            text=holds.text if way != "reset" else "",
            reasoning=holds.reasoning if way != "reset" else "",
            unseen=unseen,
            cached=cached,
            pieces=tuple(self._open.pieces),
            counted=counted,
            ending=ending,
            reason=reason,
            title=title,
            detail=detail,
            lasted=lasted,
            last=last,
        )
        self.takes.append(take)
        self._open, self._begun = _Open(self._holds()), False

    def _holds(self) -> Held:
        """What the client holds now."""
        if self._held[0] != len(self._said):
            self._held = len(self._said), held(self._said)
        return self._held[1]

    def _usage(self) -> Usage | None:
        return self._final or next((output for output in reversed(self._said) if isinstance(output, Usage)), None)


def _made(usage: Usage | None, holds: Held, way: Way, shown: int, *, cached: bool, finished: bool) -> tuple[tuple[int, int] | None, int]:
    """What an engine must have counted for *usage* to come out, or none; and how many pieces of it nobody saw."""
    if usage is None:
        return None, int(way == "skip" and shown > 0)
    made = usage.completion_tokens if cached else max(0, usage.burnt_tokens - holds.made)
    hidden = max(0, made - shown)
    kept = holds.kept if way in {"prefill", "skip"} else 0
    plain = usage.prompt_tokens == 0 and usage.completion_tokens == kept + shown and (way in {"skip", "fresh"} or hidden == 0)
    if plain or not finished:
        return None, hidden if way == "skip" or holds.kept else 0
    prompt = usage.prompt_tokens + (holds.kept if way == "prefill" else 0)
    return (prompt, made), int(way == "skip")
