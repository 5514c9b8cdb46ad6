"""Which route a question takes: learned from the examples of a routes file, with a confidence that is calibrated on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from capibara_flow.domain.calibration import fit_sharpness, softmax
from capibara_flow.domain.learning import Examples, Numbers, Weights, one_hot, ridge
from capibara_flow.domain.routes import DEFAULT, Routes

if TYPE_CHECKING:
    from capibara_flow.ports import Vectors

WEIGHTS = Weights(meaning=1.5, words=0.3, signs=0.04)
PENALTY = 0.015

#: Of the file's own examples, left out in turn, so many are less familiar than the limit under which a question belongs to no route.
_STRANGE = 0.001

#: The limit is never above the middle between what is like nothing (0) and an example itself (1): in a file whose examples say nearly
#: the same again and again, all else would seem strange.
_HALFWAY = 0.5


@dataclass(frozen=True)
class Match:
    """The route of a question, how sure that is (0 to 1), the next best route, and the shares of all, ``default`` among them.

    *familiarity* is the higher, the more the question is like something in the file: what is asked for elsewhere has little.
    """

    route: str
    confidence: float
    runner_up: str
    scores: dict[str, float]
    familiarity: float


@dataclass(frozen=True)
class Semantics:
    """What was learned of a routes file; every question is compared with every example.

    The classes are the groups within the routes (topics, levels); *pooling* makes one score a route of them, whatever told the
    examples apart best. A question whose *familiarity* is under *limit* belongs to no route, whatever the shares.
    """

    names: tuple[str, ...]
    examples: Examples
    weights: Numbers
    pooling: "Pooling"
    sharpness: float
    limit: float

    @classmethod
    def learn(cls, routes: Routes, vectors: "Vectors") -> Self:
        """Learn from ``routes.labelled``, whose embeddings are *vectors* in the same order; 3,000 examples take about three seconds."""
        labelled = routes.labelled
        if len(vectors) != len(labelled):
            raise ValueError(f"{len(vectors)} vectors for {len(labelled)} examples")
        examples = Examples.of([each.text for each in labelled], vectors, tuple(routes.cues.values()), WEIGHTS)
        groups = sorted({(each.route, each.group) for each in labelled})
        place = {group: number for number, (_, group) in enumerate(groups)}
        owners = [routes.names.index(route) for route, _ in groups]
        weights, unseen = ridge(examples.mutual(), one_hot([place[each.group] for each in labelled], len(groups)), PENALTY)
        labels = np.array([routes.names.index(each.route) for each in labelled])
        tried = [Pooling(tuple(owners), len(routes.names), best) for best in (False, True)]
        fits = [fit_sharpness(pooling(unseen), labels) for pooling in tried]
        best = min(range(len(tried)), key=lambda index: fits[index].loss)
        inside = np.sort(_familiarity(tried[best](unseen))[labels != len(routes.names) - 1])
        limit = min(_HALFWAY, float(inside[int(_STRANGE * len(inside))]))
        return cls(routes.names, examples, weights, tried[best], fits[best].sharpness, limit)

    def choose(self, text: str, vector: Numbers) -> Match:
        """The route of *text*, whose embedding is *vector*; takes some milliseconds."""
        scores = self.pooling(self.examples.likeness(text, vector) @ self.weights)
        shares = softmax(scores, self.sharpness)
        order = [self.names[index] for index in np.argsort(-shares, kind="stable")]
        familiarity = float(_familiarity(scores))
        found = {name: round(float(share), 4) for name, share in zip(self.names, shares, strict=True)}
        confidence = found[order[0]]
        if familiarity < self.limit and order[0] != DEFAULT:
            # What the best share leaves is the chance that this is right.
            order, confidence = [DEFAULT, *(name for name in order if name != DEFAULT)], max(found[DEFAULT], 1 - confidence)
        return Match(order[0], confidence, order[1], found, familiarity)


@dataclass(frozen=True)
class Pooling:
    """Scores of groups (..., groups) become scores of routes (..., routes), *owners* being the route of each group.

    A route is as good as its *best* group where groups are kinds of their own, such as intents; otherwise their sum tells more.
    """

    owners: tuple[int, ...]
    routes: int
    best: bool

    def __call__(self, scores: Numbers) -> Numbers:
        """The scores of the routes; one without groups has 0."""
        pooled = np.zeros((*scores.shape[:-1], self.routes), np.float32)
        for route in set(self.owners):
            own = scores[..., [group for group, owner in enumerate(self.owners) if owner == route]]
            pooled[..., route] = own.max(axis=-1) if self.best else own.sum(axis=-1)
        return pooled


def _familiarity(scores: Numbers) -> Numbers:
    """The best route's score less that of none."""
    return np.asarray(scores[..., :-1].max(axis=-1) - scores[..., -1], np.float32)


def centroids(routes: Routes, vectors: "Vectors") -> tuple[tuple[str, ...], Numbers]:
    """One mean vector for each route (and for none where the file has examples of it): the baseline that ``Semantics`` is held against."""
    labelled = routes.labelled
    names = tuple(name for name in routes.names if any(each.route == name for each in labelled))
    means = np.stack([_mean([vector for each, vector in zip(labelled, vectors, strict=True) if each.route == name]) for name in names])
    return names, means


def _mean(vectors: Sequence[Numbers]) -> Numbers:
    mean = np.mean(vectors, axis=0)
    return np.asarray(mean / max(1e-9, float(np.linalg.norm(mean))), np.float32)
