"""Sharing an expert between tenants: whose turn it is, and how long who comes last will wait. Pure: clocks are passed in.

The order is that of start-time fair queueing (P. Goyal, H. Vin, H. Cheng, 1996) with one turn as the unit of service: every tenant has a
tag that moves on by ``1 / weight`` with each turn of his that begins, and the one with the lowest tag is served next. With equal weights
that is round-robin. Who had nothing to ask for saves nothing up: he begins where the others are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

#: How often an estimate is refined until it agrees with itself, at most.
_ROUNDS = 32


class Shares:
    """Who is served next, of those who wait (buckets, by number)."""

    def __init__(self) -> None:
        self._tags: dict[int, float] = {}
        self._last: dict[int, int] = {}
        self._now = 0.0
        self._count = 0
        #: Of who goes on, how far a turn moves his tag.
        self._goes_on: dict[int, float] = {}

    def next(self, waiting: Iterable[int]) -> int:
        """Whose turn it is, of those *waiting*, at least one; the same again until ``begin`` is called."""
        return min(waiting, key=lambda bucket: (self._tag(bucket), self._last.get(bucket, 0)))

    def begin(self, bucket: int, weight: float = 1.0, *, more: bool = False) -> None:
        """A turn of *bucket* begins; *more* of it wait behind, though they may not be seen yet."""
        tag = self._tag(bucket)
        self._now = max(self._now, tag)
        self._tags[bucket] = tag + (step := 1 / weight)
        self._count += 1
        self._last[bucket] = self._count
        self._goes_on.pop(bucket, None)
        if more:
            self._goes_on[bucket] = step

    def _tag(self, bucket: int) -> float:
        tag = self._tags.get(bucket, self._now)
        # Whose next turn is still on its way may be late, by one turn of his: no more, for somebody else may have served the rest.
        return max(tag, self._now - self._goes_on.get(bucket, 0.0))


@dataclass(frozen=True, slots=True)
class Share:
    """One bucket at one expert: how many turns of it are *waiting*, how many began a second of late, and its *weight*."""

    waiting: int = 0
    rate: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Hands:
    """All callers of an expert together: how many calls they make at once, how long one takes on average (*seconds*).

    *left* is for each call at work how many seconds it will still take, as far as can be told.
    """

    capacity: int
    seconds: float
    left: Sequence[float] = field(default=())


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn stands: it is the *position*-th to begin (1: the next one), in about *seconds*."""

    position: int
    seconds: float


def place(mine: int, ahead: int, shares: Mapping[int, Share], hands: Hands, *, fresh: bool = False) -> Place:
    """The place of a turn of bucket *mine* with *ahead* turns of that bucket before it, while nothing else changes.

    Until it begins, another bucket is served as often as its weight allows (where it is equal, half a turn more, or none), and no more
    often than it has turns: those that wait now for
    the *position*, and for the estimate those as well that will come in that time, at the rate of late. A bucket is *fresh* that has had
    nothing at work or waiting: it begins where the others are, before any that goes on.
    """
    own = shares.get(mine, Share())
    others = [share for bucket, share in shares.items() if bucket != mine]
    bounds = [0.0 if fresh and each.waiting > 1 else (ahead + 0.5) * each.weight / own.weight for each in others]
    before = ahead + sum(min(bound, each.waiting) for bound, each in zip(bounds, others, strict=True))
    seconds = begins(before, hands)
    for _ in range(0 if fresh else _ROUNDS):
        came = sum(min(bound, each.waiting + each.rate * seconds) for bound, each in zip(bounds, others, strict=True))
        again = begins(ahead + came, hands)
        if math.isclose(again, seconds, rel_tol=0.01):
            break
        seconds = again
    return Place(int(before) + 1, seconds)


def begins(before: float, hands: Hands) -> float:
    """After how many seconds the turn begins that has *before* others to begin first, with all *hands* at work.

    The first ones begin as calls end that are at work now; from then on each hand takes the mean time for every turn.
    """
    capacity = max(1, hands.capacity)
    left = [*sorted(hands.left)[:capacity], *[hands.seconds / 2] * (capacity - len(hands.left))]
    rounds, rest = divmod(before, capacity)
    place, part = int(rest), rest - int(rest)
    low = _ends(left, place + 1)
    high = _ends(left, place + 2) if place + 1 < capacity else _ends(left, 1) + hands.seconds
    return float(rounds * hands.seconds + low + part * max(0.0, high - low))


def _ends(left: Sequence[float], number: int) -> float:
    """When the *number*-th of some calls ends that still take *left* seconds each, on average.

    Each is taken to end at any time up to twice that, so that the first of several ends earlier than any would alone: at the time by
    which ``number * n / (n + 1)`` of all *n* are to be expected, which is exact where all are alike.
    """
    goal, at = number * len(left) / (len(left) + 1), 0.0
    ended, slope = float(sum(each <= 0 for each in left)), sum(0.5 / each for each in left if each > 0)
    for each in sorted(each for each in left if each > 0):
        if slope > 0 and ended + slope * (2 * each - at) >= goal:
            break
        ended += slope * (2 * each - at)
        at, slope = 2 * each, slope - 0.5 / each
    return max(0.0, at + (goal - ended) / slope) if slope > 1e-12 and goal > ended else at


def remaining(age: float, durations: Sequence[float]) -> float:
    """How many seconds a call of this *age* will still take, if it is one of those whose *durations* were measured.

    The mean of what was left to those that lasted longer; where none did, a tenth of what it has taken already: it is an exception.
    """
    longer = [each - age for each in durations if each > age]
    return sum(longer) / len(longer) if longer else age / 10


def jain(served: Sequence[float]) -> float:
    """Jain's index of fairness (R. Jain, D. Chiu, W. Hawe, 1984): 1 when all are served alike, ``1 / n`` when one gets everything."""
    total, squares = sum(served), sum(each * each for each in served)
    return total * total / (len(served) * squares) if squares else 1.0
