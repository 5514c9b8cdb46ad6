"""A model that blocks, as an ``Embedder``: it works in threads of its own, on a few texts at a time."""

import asyncio
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, TypeAlias

import numpy as np

from capibara_flow.ports import Vectors

Kind: TypeAlias = Literal["query", "passage"]

#: Texts, and characters in all, that are embedded in one go: a question that comes while a library is read waits for no more than these.
_TEXTS, _CHARACTERS = 8, 2000


class Model(Protocol):
    """What one product does: texts, readable and not too long, become rows of any length."""

    @property
    def name(self) -> str:
        """Which space its vectors lie in."""
        ...

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        ...

    @property
    def longest(self) -> int:
        """Characters behind which it reads no more, or should not be asked to."""
        ...

    @property
    def at_once(self) -> int:
        """In how many threads it may be asked; in more than one it is given a single text a time."""
        ...

    def encode(self, texts: list[str], kind: Kind) -> Vectors:
        """One row a text; blocks."""
        ...


class ThreadedEmbedder:
    """``ports.Embedder`` by *model*, which runs in as many threads as it lets work at the same time, and only there."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._count = min(model.at_once, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="embedder")

    @property
    def model(self) -> str:
        return self._model.name

    @property
    def dimension(self) -> int:
        return self._model.dimension

    async def embed(self, texts: Sequence[str], kind: Kind = "query") -> Vectors:
        loop = asyncio.get_running_loop()
        rows = [np.zeros((0, self.dimension), np.float32)]
        # No more than there are threads: what is behind has not begun to wait when somebody else comes.
        begun: deque[asyncio.Future[Vectors]] = deque()
        try:
            for some in slices((readable(text, self._model.longest) for text in texts), 1 if self._model.at_once > 1 else _TEXTS):
                if len(begun) == self._count:
                    rows.append(await begun.popleft())
                begun.append(loop.run_in_executor(self._threads, self._encode, some, kind))
            while begun:
                rows.append(await begun.popleft())
        finally:
            for each in begun:
                each.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        return np.concatenate(rows)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _encode(self, texts: list[str], kind: Kind) -> Vectors:
        return unit(self._model.encode(texts, kind))


def slices(texts: Iterable[str], most: int = _TEXTS) -> Iterator[list[str]]:
    """*texts* in order, cut into lists of at most so many, of few characters; none is empty.

    Takes them as it goes: a library is not made ready all at once.
    """
    some: list[str] = []
    for text in texts:
        if some and (len(some) == most or sum(map(len, some)) + len(text) > _CHARACTERS):
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def readable(text: str, longest: int) -> str:
    """*text* as a tokenizer can take it: the first *longest* characters, composed accents, no NUL, no halves of surrogate pairs."""
    cut = text[:longest].replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", cut)


def unit(rows: Vectors) -> Vectors:
    """*rows* at length 1, as float32; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12), dtype=np.float32)
