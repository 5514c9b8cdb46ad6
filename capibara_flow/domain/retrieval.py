"""Figures of retrieval: recall, normalised discounted gain, and the interval in which a mean lies. Pure."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from math import log2

#: What is right: groups of passages, of each of which one is wanted (a title that two passages have, say).
Gold = Sequence[AbstractSet[str]]


def recall(found: Sequence[str], gold: Gold, k: int) -> float:
    """The share of what is right among the first *k* that were found."""
    return sum(not group.isdisjoint(found[:k]) for group in gold) / max(1, len(gold))


def ndcg(found: Sequence[str], gold: Gold, k: int = 10) -> float:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen, 2002) of the first *k*: 1 when all that is right comes first."""
    left, gain = list(gold), 0.0
    for place, passage in enumerate(found[:k]):
        if hit := next((group for group in left if passage in group), None):
            left.remove(hit)
            gain += 1 / log2(place + 2)
    return gain / (sum(1 / log2(place + 2) for place in range(min(k, len(gold)))) or 1.0)


def interval(values: Sequence[float], draws: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (Efron, 1979) of the mean of *values*; each of *draws* says which of them are drawn."""
    means = sorted(sum(values[index] for index in draw) / len(draw) for draw in draws if draw)
    if not means:
        return 0.0, 1.0
    return means[int(0.025 * (len(means) - 1))], means[round(0.975 * (len(means) - 1))]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which *share* of *values* lie; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
