"""How much a question asks for: learned from examples of the four levels, on its meaning and words first and its length last.

simple          one fact, one step, small talk: known without thinking
moderate        a short explanation, or a small piece of work
complex         several requirements or steps, or a subject gone into deeply
very_complex    a whole system, design, proof or project of many parts, which takes an expert
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from capibara_flow.domain.calibration import fit_sharpness, softmax
from capibara_flow.domain.learning import Examples, Numbers, Weights, one_hot, ridge
from capibara_flow.domain.routes import FEWEST, LEVELS, Routes
from topics.chat import Complexity

if TYPE_CHECKING:
    from capibara_flow.ports import Vectors

#: What this measures; its vectors are learned from the same examples, but length and signs have little to say.
WEIGHTS = Weights(meaning=3.0, words=0.2, signs=0.03)
PENALTY = 0.05

#: What shows that much is asked for, or little, beside the routes' own cues.
VOCABULARY = (
    r"\b(system\w*|sistema\w*|archite\w+|arquite\w+|design\w*|disen\w+|complete|complet[oa]s?|full|entir\w+|enter[oa]s?|whole|comprehensive"
    r"|exhaustiv\w*|integral|distribu\w+|scal(e|able|ing)|escal(a|able)\w*|from scratch|desde cero|prove|proof|demuestr\w+|demostra\w+"
    r"|strateg\w+|estrateg\w+|framework|platform\w*|plataform\w*|engine|motor|compil\w+|protocol\w*|theorem\w*|teorema\w*|multi\w+"
    r"|in depth|deeply|a fondo|rigor\w*|everything|todo sobre)\b",
    r"\b(just|only|solo|solamente|nada mas|simplemente"
    r"|quick\w*|rapid\w+|short|cort[oa]s?|breve\w*|brief\w*|one (word|line)|una (palabra|frase|linea))\b",
    r"\b(explain\w*|expli\w+|why|por ?que|xq|function|funcion|difference|diferencia|example|ejemplo|compar\w+|pros|ventajas)\b",
    r"\b(and|y|with|con|then|luego|ademas|also|each|cada|every|steps?|pasos?|including|incluy\w+)\b",
)


@dataclass(frozen=True)
class Scale:
    """What was learned of the four levels."""

    examples: Examples
    weights: Numbers
    sharpness: float

    @classmethod
    def learn(cls, routes: Routes, vectors: "Vectors", words: Numbers | None = None) -> Self:
        """Learn from the examples of ``routes.labelled`` that have a level; *vectors* are the embeddings of all of them.

        *words* are the hashed words of all of them, if somebody has them: what is shared takes no memory of its own.
        Raises ``ValueError`` when the routes do not tell of complexity.
        """
        if not routes.tells_complexity:
            raise ValueError(f"each of {', '.join(LEVELS)} needs {FEWEST} examples")
        examples = Examples.of([each.text for each in routes.labelled], vectors, VOCABULARY, WEIGHTS, words)
        kept = [place for place, each in enumerate(routes.labelled) if each.level]
        levels = [LEVELS.index(each.level) for each in routes.labelled if each.level]
        found, unseen = ridge(examples.mutual(kept), one_hot(levels, len(LEVELS)), PENALTY)
        weights = np.zeros((len(examples), len(LEVELS)), np.float32)  # an example without a level has no say
        weights[kept] = found
        return cls(examples, weights, fit_sharpness(unseen, np.array(levels)).sharpness)

    def measure(self, text: str, vector: Numbers) -> tuple[Complexity, dict[Complexity, float]]:
        """The level of *text*, whose embedding is *vector*, and the shares of all four."""
        shares = softmax(self.examples.likeness(text, vector) @ self.weights, self.sharpness)
        return LEVELS[int(shares.argmax())], {level: round(float(share), 4) for level, share in zip(LEVELS, shares, strict=True)}


def by_length(texts: Sequence[str], levels: Sequence[Complexity]) -> "Lengths":
    """The baseline that ``Scale`` is held against: the level whose examples are most often about as long."""
    return Lengths(np.log([max(1, len(text.split())) for text in texts]), np.array([LEVELS.index(level) for level in levels]))


@dataclass(frozen=True)
class Lengths:
    """The logarithms of the words of examples, and their levels."""

    logarithms: Numbers
    levels: Numbers

    def measure(self, text: str, width: float = 0.2) -> Complexity:
        """The level whose examples lie most densely about this length (Gaussian kernel on the log of words), however many it has."""
        nearness = np.exp(-((self.logarithms - np.log(max(1, len(text.split())))) ** 2) / (2 * width**2))
        density = [float(nearness[self.levels == level].mean()) for level in range(len(LEVELS))]
        return LEVELS[int(np.argmax(density))]
