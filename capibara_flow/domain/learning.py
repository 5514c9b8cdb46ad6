"""Learning from some thousand examples in a second: kernel ridge regression, with the answers it gives for an example left out of it.

Every example is a prototype with a weight of its own, and the weights are chosen so that together they tell the classes apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from capibara_flow.domain.lexical import PLACES, cued, fold, form, terms

if TYPE_CHECKING:
    from capibara_flow.ports import Vectors

Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Weights:
    """How much each side of a text says when two are compared: its meaning, its words, its cues and form."""

    meaning: float = 2.0
    words: float = 0.4
    signs: float = 0.05


@dataclass(frozen=True)
class Examples:
    """Texts to compare others with: their *vectors* (n, dimension), hashed *words* (places, n) and *signs* (n, signs)."""

    vectors: Numbers
    words: Numbers
    signs: Numbers
    cues: tuple[re.Pattern[str], ...]
    weights: Weights

    @classmethod
    def of(cls, texts: Sequence[str], vectors: "Vectors", cues: Sequence[str], weights: Weights, words: Numbers | None = None) -> Self:
        """The examples *texts*; *vectors* are their embeddings of unit length, *cues* regular expressions for folded text.

        *words* are theirs where somebody has hashed them already: they are shared then, for they are the largest part.
        """
        patterns = tuple(re.compile(each) for each in cues)
        folded = [fold(text) for text in texts]
        signs = [cued(each, patterns) + form(each) for each in folded]
        known = hashed(folded) if words is None else words
        return cls(np.asarray(vectors, np.float32), known, np.asarray(signs, np.float32), patterns, weights)

    def __len__(self) -> int:
        return len(self.vectors)

    def likeness(self, text: str, vector: Numbers) -> Numbers:
        """How like *text* (with its embedding *vector*) each example is, from near 0 to 1: (n,)."""
        folded = fold(text)
        found = terms(folded)
        # Only the places that the text has: the rest would be a matrix product of zeros.
        words = np.fromiter(found.values(), np.float32, len(found)) @ self.words[list(found)]
        signs = np.asarray(cued(folded, self.cues) + form(folded), np.float32)
        return self._kernel(self.vectors @ vector, words, ((self.signs - signs) ** 2).sum(axis=1))

    def mutual(self, places: Sequence[int] | None = None) -> Numbers:
        """How like each other the examples are, all or those at *places*: (n, n)."""
        some = slice(None) if places is None else list(places)
        vectors, words, signs = self.vectors[some], self.words[:, some], self.signs[some]
        squares = (signs**2).sum(axis=1)
        apart = squares[:, None] + squares[None] - 2 * signs @ signs.T
        return self._kernel(vectors @ vectors.T, words.T @ words, apart)

    def _kernel(self, meaning: Numbers, words: Numbers, signs: Numbers) -> Numbers:
        weights = self.weights
        exponent = weights.meaning * (meaning - 1) + weights.words * (words - 1) - weights.signs * signs
        return np.asarray(np.exp(exponent), np.float32)


def hashed(folded: Sequence[str]) -> Numbers:
    """The words of folded texts, one column each: (places, n)."""
    words = np.zeros((PLACES, len(folded)), np.float32)
    for column, text in enumerate(folded):
        for place, value in terms(text).items():
            words[place, column] = value
    return words


def ridge(kernel: Numbers, targets: Numbers, penalty: float) -> tuple[Numbers, Numbers]:
    """The weights of kernel ridge regression (n, classes), and what it would say of each example had it not seen it (n, classes).

    The latter by the closed form of Cawley and Talbot (2003): the prediction without example i is y_i - a_i / (K + penalty I)^-1_ii.
    """
    inverse = np.linalg.inv(kernel + np.float32(penalty) * np.eye(len(kernel), dtype=np.float32))
    weights = inverse @ targets
    unseen = targets - weights / np.diag(inverse)[:, None]
    return weights.astype(np.float32), unseen.astype(np.float32)


def one_hot(labels: Sequence[int], classes: int) -> Numbers:
    """A row for each label, 1 at its place."""
    return np.eye(classes, dtype=np.float32)[list(labels)]
