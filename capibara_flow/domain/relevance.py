"""Whether what was found has anything to do with the question: a measure that does not depend on what else was found. Pure.

A cosine tells little by itself: with one model unrelated texts have 0.05 and with another 0.75, and each question has a level of its
own. So it counts from what the question reaches with ordinary texts (*ordinary*), which is how scores are normalised against a cohort in
the verification of speakers (Auckenthaler, Carey and Lloyd-Thomas, 2000, "Score Normalization for Text-Independent Speaker
Verification Systems"), here as a share of the way to 1, where both texts are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from topics.knowledge import Source

if TYPE_CHECKING:
    from capibara_flow.ports import Vectors

#: What the share of the question's words in the best sentence counts, and the share that a text in another language is granted.
WORDS, OTHER_LANGUAGE = 0.2, 0.4

#: By how much the best of unrelated passages rises when there are e times as many of them, up to so many.
RISE, MANY = 0.025, 1000

#: Below this the best source is taken for unrelated.
FLOOR = 0.1

#: The name of the measure among the parts of a source's score.
PART = "relevance"


@dataclass(frozen=True, slots=True)
class Backdrop:
    """The mean vectors of ordinary texts by language (ISO 639-1), and of all of them under the empty name: each of one row."""

    means: Mapping[str, "Vectors"]

    def levels(self, question: "Vectors") -> dict[str, float]:
        """The mean cosine of *question* (one row of length 1) with the ordinary texts of each language."""
        return {language: float(question @ mean) for language, mean in self.means.items()}


def backdrop(vectors: Mapping[str, "Vectors"]) -> Backdrop:
    """What the *vectors* of ordinary texts, by language, amount to."""
    means = {language: rows.mean(axis=0) for language, rows in vectors.items()}
    return Backdrop({**means, "": sum(means.values()) / len(means)})


def relevance(cosine: float, level: float, words: float, passages: int) -> float:
    """How much a passage has to do with a question: about 0 for the best of unrelated ones, 1 and more where all is the same.

    *cosine* is theirs and *level* the question's with ordinary texts in the passage's language; *words* is the share of the question's
    words that it has (0 to 1), and *passages* is among how many it was found.
    """
    nearness = (cosine - level) / (1 - level) if level < 1 else 1.0
    return nearness + WORDS * words - RISE * log(min(max(1, passages), MANY))


def granted(words: float, asked: str, language: str) -> float:
    """The share of *words* as it counts between a question in the language *asked* and a passage in *language* (empty: not known).

    Who asks in another language shares but names with what answers.
    """
    return words if asked and asked == language else max(words, OTHER_LANGUAGE)


def related(sources: Sequence[Source], floor: float) -> bool:
    """Whether *sources* have to do with the question: the best of them reaches *floor*, or nobody knows (0: they always have).

    It is all or nothing: what is reached over two hops need not have anything in common with the question itself.
    """
    return any(source.parts.get(PART, floor) >= floor for source in sources) if floor > 0 else bool(sources)
