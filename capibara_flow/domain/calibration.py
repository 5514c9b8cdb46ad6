"""Confidence that means what it says: of the answers given with confidence p, a share p is right."""

from dataclasses import dataclass

import numpy as np

from capibara_flow.domain.learning import Numbers

#: Sharpnesses that are tried, evenly spread on a logarithmic scale.
_TRIED = np.geomspace(0.5, 60, 80)


def softmax(scores: Numbers, sharpness: float) -> Numbers:
    """Shares that add up to 1 along the last axis."""
    shifted = np.exp(sharpness * (scores - scores.max(axis=-1, keepdims=True)))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


@dataclass(frozen=True)
class Fit:
    """A *sharpness* and the mean logarithmic loss that is left with it."""

    sharpness: float
    loss: float


def fit_sharpness(scores: Numbers, labels: Numbers) -> Fit:
    """The factor on *scores* (n, classes) whose softmax makes the *labels* (n,) likeliest: the inverse of Guo et al.'s temperature (2017).

    Every class counts the same. Give scores of examples that were left out when they were computed, or all confidence is too high.
    """
    rows, rarity = np.arange(len(scores)), 1 / np.bincount(labels)[labels]
    fits = [Fit(float(tried), float(np.average(-np.log(softmax(scores, tried)[rows, labels] + 1e-9), weights=rarity))) for tried in _TRIED]
    return min(fits, key=lambda fit: fit.loss)
