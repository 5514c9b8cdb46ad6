"""Reading an engine's answer: what the dialects share between bytes and pieces."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from capibara_flow.errors import EngineBroke
from capibara_flow.ports import Finish, Piece, Tally


class Decoder(Protocol):
    """Cuts bytes into frames, see ``sse``."""

    stray: bytes

    def feed(self, chunk: bytes) -> list[bytes]:
        """The frames completed by *chunk*; raises ``ValueError``."""
        ...

    def end(self) -> list[bytes]:
        """What was left when the stream ended."""
        ...


class Reading(ABC):
    """What has been read of one answer: a dialect adds how a *frame* is understood.

    ``Tally`` and ``Finish`` are kept for the end, so that ``Finish`` is the last piece of every complete answer.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.finish: Finish | None = None
        self.tally: Tally | None = None
        self.spoke = False
        self.over = False
        self._trouble = ""
        self._decoder = decoder

    def frames(self, chunk: bytes) -> list[bytes]:
        """The frames that *chunk* completes."""
        try:
            return self._decoder.feed(chunk)
        except ValueError as error:
            self.broken(str(error))
            return []

    def pieces(self, frames: Sequence[bytes]) -> list[Piece]:
        """What the *frames* say; after an error or the end the rest is not looked at."""
        pieces: list[Piece] = []
        frame = b""
        try:
            for frame in frames:
                self.read(frame, pieces)
                if self.over:
                    break
        # A frame of another shape than the dialect's fails in one of these ways; checking each step would cost every token.
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            self.broken(f"sent a frame that nobody understands ({error!r}): {_excerpt(frame)}")
        self.spoke = self.spoke or bool(pieces)
        return pieces

    def end(self) -> list[Piece]:
        """The last pieces, ``Finish`` at the very end; raises ``EngineBroke`` when the answer is not complete."""
        pieces = [] if self.over else self.pieces(self._decoder.end())
        if self._trouble:
            raise EngineBroke(f"the engine {self._trouble}")
        if self.finish is None:
            said = f"; its last words were: {_excerpt(self._decoder.stray)}" if self._decoder.stray else ""
            raise EngineBroke(f"the engine ended its stream without a finish reason{said}")
        return [*pieces, *([self.tally] if self.tally else []), self.finish]

    def broken(self, trouble: str) -> None:
        """Note why this answer will never be complete; ``end`` raises it once everything before has been handed out."""
        self._trouble = trouble
        self.over = True

    @abstractmethod
    def read(self, frame: bytes, pieces: list[Piece]) -> None:
        """Understand one *frame*: add to *pieces*, or set ``tally``, ``finish``, ``over``."""


def _excerpt(frame: bytes) -> str:
    return frame[:200].decode("utf-8", "replace")
