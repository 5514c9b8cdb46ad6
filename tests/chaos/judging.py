"""What a client got against what it should have got: pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise


def counted(upto: int) -> str:
    """The answer of an engine that counts *upto* a number: no part of it repeats, so every slip shows."""
    return "".join(f"{number} " for number in range(1, upto + 1))


@dataclass(frozen=True)
class Slips:
    """How many characters are there that should not be, and how many are not that should."""

    duplicated: int = 0
    missing: int = 0


def slips(expected: str, got: str, *, complete: bool) -> Slips:
    """Where *got* is not *expected*; what was not *complete* may end early, but may not skip anything before."""
    start = _common(expected, got)
    if start == len(got) and (not complete or start == len(expected)):
        return Slips()
    expected, got = expected[start:], got[start:]
    blocks = SequenceMatcher(None, expected, got, autojunk=False).get_matching_blocks()
    matched = sum(block.size for block in blocks)
    wanted = len(expected)
    if not complete:
        last = max((block for block in blocks if block.size), key=lambda block: block.a, default=None)
        wanted = last.a + last.size if last else 0
    return Slips(duplicated=len(got) - matched, missing=wanted - matched)


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True, order=True)
class Pause:
    """How long (seconds) no text came, beyond the normal pace, and from when on (on the clock of the arrivals)."""

    seconds: float = 0.0
    since: float = 0.0


def longest_pause(arrivals: Sequence[float], pace: float) -> Pause:
    """The longest pause between two pieces of text that *arrived*; an undisturbed answer has one every *pace* seconds."""
    return max((Pause(after - before - pace, before) for before, after in pairwise(arrivals)), default=Pause())
