"""Any model of Hugging Face that sentence-transformers can load, by name or from a folder (extra ``embeddings``: PyTorch)."""

import numpy as np

from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Vectors

_TOKENS = 512  # where a model tells no limit of its own


class HuggingFaceModel:
    """The model called *name*, or the one in that folder; what it wants before a question or a passage is put there.

    Loading takes seconds, and a download where the model is not on this machine yet. Raises ``CannotStart``.
    """

    at_once = 1

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415  heavy: only for whom it is chosen
        except ImportError as error:
            raise CannotStart(f"sentence-transformers:{name} needs the extra: `pip install 'capibara-flow[embeddings]'`") from error
        try:
            self._model = SentenceTransformer(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise CannotStart(f"sentence-transformers cannot load {name!r}: {error}") from error
        self.name = name
        self.dimension = int(self._model.encode([""]).shape[1])
        self.longest = 16 * int(self._model.max_seq_length or _TOKENS)

    def encode(self, texts: list[str], kind: Kind) -> Vectors:
        encode = self._model.encode_query if kind == "query" else self._model.encode_document
        return np.asarray(encode(texts, show_progress_bar=False, convert_to_numpy=True), dtype=np.float32)
