"""What an engine's pieces amount to: output events for the client, and an account of the call."""

from collections.abc import Sequence

from capibara_flow.ports import Finish, Piece, Tally, Text, ToolFragment
from topics.chat import ExpertCalled
from topics.output import Done, Output, Reset, Token, ToolCalled, Usage


class Account:
    """One call of one expert, as it goes on; times are seconds since the epoch."""

    def __init__(self, *, turn: str, branch: str, expert: str, attempt: int, started: float, burnt: int = 0) -> None:
        self._turn, self._branch, self._expert = turn, branch, expert
        self._attempt, self._started, self._burnt = attempt, started, burnt
        self._first: float | None = None
        self._pieces = 0
        self._tally: Tally | None = None
        self.finish_reason: str | None = None

    def take(self, piece: Piece, now: float) -> Output | None:
        """The output that *piece* becomes, if the client shall see any of it."""
        match piece:
            case Text(text, reasoning):
                self._note(now)
                return Token(turn=self._turn, text=text, reasoning=reasoning or None)
            case ToolFragment(index, id_, name, arguments):
                self._note(now)
                return ToolCalled(turn=self._turn, index=index, id=id_, name=name, arguments=arguments)
            case Tally():
                self._tally = piece
            case Finish(reason):
                self.finish_reason = reason
        return None

    def _note(self, now: float) -> None:
        self._pieces += 1
        if self._first is None:
            self._first = now

    @property
    def first_token_seconds(self) -> float | None:
        """From the start of the call to its first piece, if one came."""
        return None if self._first is None else self._first - self._started

    @property
    def usage(self) -> Usage:
        """Tokens as the engine counted them; pieces stand in where it did not (a cancelled call, say)."""
        tally = self._tally or Tally(0, self._pieces)
        return Usage(
            turn=self._turn,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            burnt_tokens=self._burnt,
            attempts=self._attempt,
        )

    def done(self, now: float) -> Done:
        """The final event; a call that was stopped before it finished is ``cancelled``."""
        timings = {"total_seconds": round(now - self._started, 4)}
        if self.first_token_seconds is not None:
            timings["first_token_seconds"] = round(self.first_token_seconds, 4)
        return Done(turn=self._turn, finish_reason=self.finish_reason or "cancelled", model_id=self._expert, timings=timings)

    def event(self, now: float) -> ExpertCalled:
        """The fact for the log."""
        usage = self.usage
        return ExpertCalled(
            turn=self._turn,
            expert=self._expert,
            branch=self._branch,
            attempt=self._attempt,
            outcome=self.finish_reason or "cancelled",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            started=self._started,
            first_token=self._first,
            ended=now,
        )


def burnt(said: Sequence[Output]) -> int:
    """How many pieces earlier attempts made that a new start throws away."""
    return sum(isinstance(output, Token | ToolCalled) for output in said)


def must_reset(said: Sequence[Output]) -> bool:
    """Whether the client holds text of an earlier attempt that a new start must take back."""
    last_text = max((n for n, output in enumerate(said) if isinstance(output, Token | ToolCalled)), default=-1)
    last_reset = max((n for n, output in enumerate(said) if isinstance(output, Reset)), default=-1)
    return last_text > last_reset
