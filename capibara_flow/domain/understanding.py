"""All that is learned of a routes file: which route a question takes, how much it asks for, and why it looks so."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from capibara_flow.domain.complexity import Scale
from capibara_flow.domain.learning import Numbers
from capibara_flow.domain.routes import DEFAULT, Routes
from capibara_flow.domain.routing import Understood
from capibara_flow.domain.semantics import Semantics

if TYPE_CHECKING:
    from capibara_flow.ports import Vectors


@dataclass(frozen=True)
class Learned:
    """What reads a question."""

    semantics: Semantics
    scale: Scale

    @classmethod
    def learn(cls, routes: Routes, vectors: "Vectors", teacher: Routes, taught: "Vectors") -> Self:
        """Learn *routes*, and complexity from *teacher*; vectors are the embeddings of their ``labelled``.

        3,000 examples take about five seconds.
        """
        semantics = Semantics.learn(routes, vectors)
        return cls(semantics, Scale.learn(teacher, taught, semantics.examples.words if teacher is routes else None))

    def read(self, text: str, vector: Numbers) -> Understood:
        """What *text* is about, whose embedding is *vector*; takes about a millisecond."""
        match = self.semantics.choose(text, vector)
        complexity, shares = self.scale.measure(text, vector)
        what = "it is like nothing in the routes" if match.route == DEFAULT else f"it is most like the examples of {match.route}"
        reasoning = f"{what} ({match.confidence:.2f}, next {match.runner_up}); it looks {complexity} ({shares[complexity]:.2f})"
        return Understood(match.route, complexity, match.confidence, reasoning)
