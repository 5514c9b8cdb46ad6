"""What an engine's pieces amount to: output events for the client, and an account of the call."""

from collections.abc import Sequence

from capibara_flow.domain.continuing import Held, Repetition, Way
from capibara_flow.ports import Finish, Load, Piece, Recalled, Tally, Text, ToolFragment
from topics.chat import ExpertCalled
from topics.output import Continued, Done, Loading, Output, Reset, Token, ToolCalled, Usage

_NOBODY = Held()


class Account:
    """One call of one expert, as it goes on; times are seconds since the epoch.

    *holds* is what earlier attempts left with the client, *way* how this one goes on from there.
    """

    def __init__(
        self, *, turn: str, branch: str, expert: str, attempt: int, started: float, holds: Held = _NOBODY, way: Way = "fresh"
    ) -> None:
        self._turn, self._branch, self._expert = turn, branch, expert
        self._attempt, self._started, self._holds = max(attempt, holds.attempts + 1), started, holds
        self._way: Way = way
        self._repetition = Repetition(holds) if way == "skip" else None
        self._told = way == "fresh"
        self._first: float | None = None
        self._made = self._shown = 0
        self._tally: Tally | None = None
        self._recalled = False
        self._text: list[str] = []
        self.finish_reason: str | None = None

    def take(self, piece: Piece, now: float) -> Sequence[Output]:
        """The output that *piece* becomes, as far as the client shall see any of it."""
        match piece:
            case Text() | ToolFragment():
                self._made += 1
            case Load(eta_s):  # news of the engine, no part of its answer
                return (Loading(turn=self._turn, expert=self._expert, eta_s=eta_s),)
            case Recalled():
                self._recalled = True
                return ()
        if self._repetition is None:
            return self._show(piece, now)
        new = self._repetition.take(piece)
        if self._repetition.diverged:
            self._way = "reset"
        if self._repetition.over or self._repetition.diverged:
            self._repetition = None
        return [output for each in new for output in self._show(each, now)]

    def _show(self, piece: Piece, now: float) -> Sequence[Output]:
        output: Output
        match piece:
            case Text(text, reasoning):
                output = Token(turn=self._turn, text=text, reasoning=reasoning or None)
                self._text.append(text)
            case ToolFragment(index, id_, name, arguments):
                output = ToolCalled(turn=self._turn, index=index, id=id_, name=name, arguments=arguments)
            case Tally():
                self._tally = piece
                return ()
            case Finish(reason):
                self.finish_reason = reason
                return ()
        self._shown += 1
        if self._first is None:
            self._first = now
        return (output,) if self._told else (*self._marks(), output)

    def _marks(self) -> Sequence[Output]:
        """How this attempt goes on, said once, before its first word."""
        if self._told:
            return ()
        self._told = True
        match self._way:
            case "prefill" | "skip" as how:
                return (Continued(turn=self._turn, how=how, expert=self._expert, attempt=self._attempt),)
        return (Reset(turn=self._turn, reason="the answer starts anew after a fault"),)

    @property
    def way(self) -> Way:
        """How this attempt went on from earlier ones, as far as it is known now."""
        return self._way

    @property
    def text(self) -> str:
        """The words that the client has."""
        return ("" if self._way == "reset" and self._told else self._holds.text) + "".join(self._text)

    @property
    def untold(self) -> bool:
        """Whether nothing of this attempt has reached the client."""
        return self._shown == 0

    @property
    def unseen(self) -> bool:
        """Whether the engine made some that was held back."""
        return self._made > self._shown

    @property
    def first_token_seconds(self) -> float | None:
        """From the start of the call to its first new piece, if one came."""
        return None if self._first is None else self._first - self._started

    @property
    def usage(self) -> Usage:
        """Tokens as the engine counted them; pieces stand in where it did not (a cancelled call, say)."""
        made = self._tally.completion_tokens if self._tally else self._made
        prompt = self._tally.prompt_tokens if self._tally else 0
        return Usage(
            turn=self._turn,
            prompt_tokens=max(0, prompt - self._holds.kept) if self._way == "prefill" else prompt,
            completion_tokens=self._billed(made),
            burnt_tokens=self._holds.made + (0 if self._recalled else made),
            attempts=self._attempt,
        )

    def _billed(self, made: int) -> int:
        """The tokens that the client has of an answer to which this attempt *made* that many."""
        if self._repetition is not None or (self._way == "reset" and not self._told):
            return self._holds.kept  # stopped before it changed anything
        if self._way == "prefill":
            return self._holds.kept + made
        if self._way == "skip" and not self._tally:
            return self._holds.kept + self._shown
        return made

    def ending(self, now: float) -> Sequence[Output]:
        """The last output; a call that was stopped before it finished is ``cancelled``."""
        timings = {"total_seconds": round(now - self._started, 4)}
        if self.first_token_seconds is not None:
            timings["first_token_seconds"] = round(self.first_token_seconds, 4)
        reason, cached = self.finish_reason or "cancelled", self._recalled or None
        done = Done(turn=self._turn, finish_reason=reason, model_id=self._expert, cached=cached, timings=timings)
        marks = self._marks() if self.finish_reason else ()
        return (*marks, self.usage, done)

    def event(self, now: float, outcome: str | None = None) -> ExpertCalled:
        """The fact for the log; *outcome* unless the engine or a cancellation ended the call."""
        usage = self.usage
        return ExpertCalled(
            turn=self._turn,
            expert=self._expert,
            branch=self._branch,
            attempt=self._attempt,
            outcome=outcome or self.finish_reason or "cancelled",
            continued=None if self._way == "fresh" else self._way,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            burnt_tokens=usage.burnt_tokens,
            started=self._started,
            cached=self._recalled,
            first_token=self._first,
            ended=now,
        )
