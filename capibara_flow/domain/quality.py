"""Figures of quality, each with its formula: accuracy with its interval, F1, calibration error, area under the ROC curve."""

from collections.abc import Sequence
from math import sqrt


def accuracy(truth: Sequence[object], told: Sequence[object]) -> float:
    """The share that is right; 0 of nothing."""
    return sum(one == other for one, other in zip(truth, told, strict=True)) / max(1, len(truth))


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of *count* trials, at 95 % by default."""
    if not count:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def per_class(truth: Sequence[str], told: Sequence[str]) -> dict[str, dict[str, float]]:
    """Count, precision, recall and F1 of each class that is in *truth* or *told*."""
    figures = {}
    for name in sorted({*truth, *told}):
        hits = sum(one == other == name for one, other in zip(truth, told, strict=True))
        there, said = list(truth).count(name), list(told).count(name)
        figures[name] = {
            "n": there,
            "precision": round(hits / said, 4) if said else 0.0,
            "recall": round(hits / there, 4) if there else 0.0,
            "f1": round(2 * hits / (there + said), 4),
        }
    return figures


def macro_f1(truth: Sequence[str], told: Sequence[str]) -> float:
    """The mean F1 over the classes of *truth*, each counting the same; 0 of nothing."""
    figures = per_class(truth, told)
    present = [figures[name]["f1"] for name in sorted(set(truth))]
    return sum(present) / max(1, len(present))


def confusion(truth: Sequence[str], told: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each true class, how often which one was told."""
    table: dict[str, dict[str, int]] = {}
    for one, other in zip(truth, told, strict=True):
        row = table.setdefault(one, {})
        row[other] = row.get(other, 0) + 1
    return {name: dict(sorted(row.items())) for name, row in sorted(table.items())}


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error (Guo et al., 2017): the gap of confidence and accuracy in each bin, weighted by its size."""
    sorted_in: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for confidence, hit in zip(confidences, right, strict=True):
        sorted_in[min(bins - 1, int(confidence * bins))].append((confidence, hit))
    gaps = [abs(sum(confidence - hit for confidence, hit in each)) for each in sorted_in]
    return sum(gaps) / max(1, len(right))


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float | None:
    """How often one of *inside* scores higher than one of *outside*, ties counting half; none when either is empty."""
    if not inside or not outside:
        return None
    wins = sum((one > other) + 0.5 * (one == other) for one in inside for other in outside)
    return wins / (len(inside) * len(outside))
