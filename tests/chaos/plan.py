"""What is asked in a run of chaos, and when: all of it follows from the seed. Pure."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

#: Experts of the installation: one whose engine goes on from given words, one whose engine says all again, and one that is soon busy.
PREFILLER, REPEATER, NARROW = "prefiller", "repeater", "narrow"
Deed = Literal["stay", "cancel", "leave"]


@dataclass(frozen=True)
class Pattern:
    """How a run of chaos goes: times in seconds, *turns* in all, at most *at_once* of them together.

    Answers last from *shortest* to *longest* at one word every *pace*; *ack_wait*, *abandon* and *graceful* are settings of the
    processes; a fault hits within *window* after the first turn began. *notice* is how long a run may go on beyond *abandon*.
    """

    turns: int = 60
    seed: int = 0
    ack_wait: float = 2.0
    abandon: float = 4.0
    notice: float = 2.0
    graceful: float = 1.0
    pace: float = 0.025
    shortest: float = 2.0
    longest: float = 5.0
    window: tuple[float, float] = (0.4, 2.0)
    at_once: int = 24

    def chance(self, *parts: object) -> Random:
        """A source of chance for one *part* of the run, the same for the same seed."""
        return Random(":".join(map(str, (self.seed, *parts))))

    def rounds(self, turns: int) -> list[int]:
        """*turns* in rounds that are not too large, one at least."""
        count = max(1, -(-turns // self.at_once))
        return [turns // count + (number < turns % count) for number in range(count)]


@dataclass(frozen=True)
class Ask:
    """One question of one client, *starts* seconds after its round; what it does *after* that many seconds, unless it stays."""

    number: int
    upto: int
    expert: str
    starts: float
    deed: Deed = "stay"
    after: float = 0.0

    @property
    def question(self) -> str:
        """No other turn has the same: engines tell runs apart by it."""
        return f"cuenta hasta {self.upto} (turno {self.number})"


@dataclass(frozen=True)
class Occasion:
    """For what questions are made up: so many *turns*, numbered by *numbers*, around a fault that hits at *moment* (seconds)."""

    pattern: Pattern
    chance: Random
    turns: int
    numbers: Iterator[int]
    moment: float

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """Each turn's place and number."""
        return enumerate(itertools.islice(self.numbers, self.turns))

    @property
    def length(self) -> int:
        """How far an answer counts."""
        return int(self.chance.uniform(self.pattern.shortest, self.pattern.longest) / self.pattern.pace)


Asking = Callable[[Occasion], list[Ask]]


def steadily(occasion: Occasion) -> list[Ask]:
    """Clients that wait for their answers, some of whom ask just when the fault hits.

    Every third asks an expert whose engine cannot go on from given words.
    """
    asks = []
    for place, number in occasion.places:
        early = occasion.chance.uniform(0, occasion.moment)
        starts = max(0, occasion.moment - occasion.chance.uniform(0, 0.01)) if place % 4 == 3 else early
        asks.append(Ask(number, occasion.length, REPEATER if place % 3 == 2 else PREFILLER, starts))
    return asks


def changing_their_minds(occasion: Occasion) -> list[Ask]:
    """Two clients keep a busy expert busy; of the others every second cancels in the queue behind them, the rest while they read.

    What they cancel would last so long that nobody could take its end for an obeyed cancel.
    """
    asks, endless = [], int(3 * occasion.pattern.longest / occasion.pattern.pace)
    for place, number in occasion.places:
        if place < 2:
            asks.append(Ask(number, occasion.length, NARROW, 0.0))
        else:
            expert, starts = (NARROW, PREFILLER, NARROW, REPEATER)[place % 4 - 2], occasion.chance.uniform(0.1, 0.3)
            after = occasion.chance.uniform(0.3, 0.6) * occasion.pattern.shortest
            asks.append(Ask(number, endless, expert, starts, "cancel", after))
    return asks


def going_away(occasion: Occasion) -> list[Ask]:
    """Every second client leaves for good, in the middle of an answer that would last much longer than it may be left alone."""
    asks = []
    for place, number in occasion.places:
        starts = occasion.chance.uniform(0, 0.3)
        if place % 2:
            asks.append(Ask(number, occasion.length, PREFILLER, starts))
        else:
            upto = int((occasion.pattern.abandon * 2 + 8) / occasion.pattern.pace)
            asks.append(Ask(number, upto, PREFILLER, starts, "leave", occasion.chance.uniform(0.3, 0.6) * occasion.pattern.shortest))
    return asks
