"""Going on with an answer that an earlier attempt began: what the client holds decides how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from capibara_flow.errors import CapibaraError, TurnExpired
from capibara_flow.ports import Abilities, Piece, Text
from topics.chat import ChatMessage, ChatRequest
from topics.output import Continued, Done, Failed, Output, Reset, Routed, Token, ToolCalled, Usage, Waiting

#: ``fresh``: nothing to go on with. ``prefill``: the engine goes on from the very words. ``skip``: it says all again, and what repeats is
#: held back; should it say something else, that is told after a ``Reset``. ``reset``: the client throws away what it has.
Way = Literal["fresh", "prefill", "skip", "reset"]


@dataclass(frozen=True)
class Held:
    """What a client holds of an answer, and what that took: *kept* pieces, *made* ones with those thrown away, and *attempts*."""

    text: str = ""
    reasoning: str = ""
    calls: bool = False
    kept: int = 0
    made: int = 0
    attempts: int = 0
    ended: bool = False


def held(said: Sequence[Output]) -> Held:
    """What *said*, all output of a branch in order, amounts to for the client."""
    last_reset = max((place for place, output in enumerate(said) if isinstance(output, Reset)), default=-1)
    kept = [output for output in said[last_reset + 1 :] if _is_piece(output)]
    tokens = [output for output in kept if isinstance(output, Token)]
    return Held(
        text="".join(token.text for token in tokens),
        reasoning="".join(token.reasoning or "" for token in tokens),
        calls=len(tokens) < len(kept),
        kept=len(kept),
        made=_made(said),
        attempts=_attempts(said),
        ended=any(output.final for output in said),
    )


def _attempts(said: Sequence[Output]) -> int:
    """All attempts that are known: as many as were told, and those that said something since."""
    known, going = 0, False
    for output in said:
        match output:
            case Continued(attempt=attempt):
                known, going = max(known + 1, attempt), True
            case Reset():
                known, going = known + 1, True
            case Token() | ToolCalled():
                known, going = known + (not going), True
            case Usage(attempts=attempts):
                known, going = max(known, attempts), False
            case Waiting(stage="caller", attempt=following):
                known, going = max(known, following - 1), False
    return known


def _made(said: Sequence[Output]) -> int:
    """All tokens that are known to have been made: the last account of them, and the pieces that came behind it."""
    accounts = [(place, output.burnt_tokens) for place, output in enumerate(said) if isinstance(output, Usage)]
    place, made = accounts[-1] if accounts else (-1, 0)
    return made + sum(_is_piece(output) for output in said[place + 1 :])


def _is_piece(output: Output) -> bool:
    return isinstance(output, Token | ToolCalled)


def failing(turn: str, said: Sequence[Output], error: CapibaraError) -> tuple[Output, ...]:
    """The end of a turn that *error* ends, after all that was *said*: what it took, and what it waited for in vain."""
    holds = held(said)
    usage = Usage(turn=turn, completion_tokens=holds.kept, burnt_tokens=holds.made, attempts=holds.attempts)
    waited = next((output.reason for output in reversed(said) if isinstance(output, Waiting)), "")
    detail = str(error) if waited in str(error) else f"{error}; it waited, for: {waited}"
    retryable = error.retryable or (bool(waited) and isinstance(error, TurnExpired))
    failed = Failed(turn=turn, title=error.title, status=error.status, detail=detail, retryable=retryable)
    return (usage, failed) if holds.made else (failed,)


def stopped(turn: str, said: Sequence[Output]) -> tuple[Usage, Done]:
    """The end of a turn that somebody else stops, after all that was *said*."""
    holds = held(said)
    expert = next((output.model_id for output in said if isinstance(output, Routed)), "")
    usage = Usage(turn=turn, completion_tokens=holds.kept, burnt_tokens=holds.made, attempts=max(1, holds.attempts))
    return usage, Done(turn=turn, finish_reason="cancelled", model_id=expert)


def way_on(holds: Held, request: ChatRequest, abilities: Abilities) -> Way:
    """How an engine of these *abilities* goes on.

    A grammar would begin anew behind a prefill, and break the JSON; tool calls and reasoning cannot be handed to an engine half done.
    """
    if not holds.kept:
        return "fresh"
    if holds.calls:
        return "reset"
    plain = not (holds.reasoning or request.tools or request.response_format)
    return "prefill" if plain and holds.text and abilities.prefill and _ends_in_text(request) else "skip"


def continuing(request: ChatRequest, holds: Held) -> ChatRequest:
    """*request* with the beginning of its answer, for an engine that goes on from there."""
    last = request.messages[-1]
    before = last.text if _is_begun(last) else ""
    messages = request.messages[:-1] if _is_begun(last) else request.messages
    begun = ChatMessage(role="assistant", content=before + holds.text)
    return request.model_copy(update={"messages": (*messages, begun)})


def limited(request: ChatRequest, most: int) -> ChatRequest:
    """*request* with an answer of *most* tokens."""
    return request.model_copy(update={"sampling": request.sampling.model_copy(update={"max_tokens": most})})


def tokens_left(request: ChatRequest, holds: Held, abilities: Abilities) -> int | None:
    """How many tokens the answer may still have, at least 0; none: as many as it wants."""
    limit = request.sampling.max_tokens or abilities.max_tokens
    return None if limit is None else max(0, limit - holds.kept)


def _is_begun(last: ChatMessage) -> bool:
    return last.role == "assistant" and not last.tool_calls


def _ends_in_text(request: ChatRequest) -> bool:
    last = request.messages[-1]
    return not _is_begun(last) or isinstance(last.content, str)


class Repetition:
    """Holds back the pieces of an engine that says all again, as long as they repeat what the client holds."""

    def __init__(self, holds: Held) -> None:
        self._reasoning, self._text = holds.reasoning, holds.text
        self._seen: list[Piece] = []
        #: Whether all has been repeated; what comes now is new.
        self.over = not (holds.reasoning or holds.text)
        #: Whether it said something else: what ``take`` returns then replaces all that the client holds.
        self.diverged = False

    def take(self, piece: Piece) -> Sequence[Piece]:
        """What the client does not have, once *piece* has come."""
        if self.over or self.diverged:
            return (piece,)
        self._seen.append(piece)
        new = self._beyond(piece)
        if new is None:
            self.diverged = True
            return self._seen
        self.over = not (self._reasoning or self._text)
        return (new,) if new.text or new.reasoning else ()

    def _beyond(self, piece: Piece) -> Text | None:
        """What *piece* says beyond a repetition (perhaps nothing), or none when it does not repeat."""
        if not isinstance(piece, Text):
            return None  # the end, or a call, before all was repeated
        reasoning, text = _behind(self._reasoning, piece.reasoning), _behind(self._text, piece.text)
        if reasoning is None or text is None or (text[1] and reasoning[0]) or (reasoning[1] and self._text):
            return None
        self._reasoning, self._text = reasoning[0], text[0]
        return Text(text[1], reasoning[1])


def _behind(expected: str, said: str) -> tuple[str, str] | None:
    """What is still expected after *said*, and what *said* has beyond that; none when they differ."""
    length = min(len(expected), len(said))
    return (expected[length:], said[length:]) if expected[:length] == said[:length] else None
