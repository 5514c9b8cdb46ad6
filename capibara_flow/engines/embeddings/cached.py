"""Vectors that are remembered: the same question is asked more than once."""

import asyncio
import hashlib
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.ports import Embedder, Vectors
from capibara_flow.tasks import ended
from capibara_flow.telemetry import EMBEDDING_HITS, EMBEDDING_MISSES

_Key = tuple[str, bytes]
#: Characters: no model reads further.
_READ = 128 * 1024


class CachedEmbedder:
    """``ports.Embedder`` before *inner*: remembers *capacity* vectors, those asked for last; equal texts at one time are embedded once.

    No text is kept, only its digest. Who gives up waiting does not take the vector from others who wait for it.
    """

    def __init__(self, inner: Embedder, capacity: int) -> None:
        self._inner = inner
        self._capacity = capacity
        self._known: OrderedDict[_Key, Vectors] = OrderedDict()
        self._coming: dict[_Key, asyncio.Future[Vectors]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def model(self) -> str:
        return self._inner.model

    @property
    def dimension(self) -> int:
        return self._inner.dimension

    async def embed(self, texts: Sequence[str], kind: Kind = "query") -> Vectors:
        if not texts:
            return await self._inner.embed(texts, kind)
        missing: dict[_Key, str] = {}
        rows = [self._look(key, text, missing) for key, text in await _keyed(texts, kind)]
        EMBEDDING_MISSES.inc(len(missing))
        EMBEDDING_HITS.inc(len(rows) - len(missing))
        if missing:
            task = asyncio.create_task(self._fill(missing, kind))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return np.stack([row if isinstance(row, np.ndarray) else await asyncio.shield(row) for row in rows])

    async def aclose(self) -> None:
        await ended(*self._tasks)
        for promise in self._coming.values():
            promise.cancel()
        self._coming.clear()
        self._known.clear()
        await self._inner.aclose()

    def _look(self, key: _Key, text: str, missing: dict[_Key, str]) -> "Vectors | asyncio.Future[Vectors]":
        """The vector of *key*, or the promise of it; a new promise is put down among the *missing*."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key not in self._coming:
            missing[key] = text
            self._coming[key] = asyncio.get_running_loop().create_future()
        return self._coming[key]

    async def _fill(self, missing: dict[_Key, str], kind: Kind) -> None:
        """Keep the promises of *missing*; an error is told to all who wait, and remembered by nobody."""
        try:
            rows = await self._inner.embed(list(missing.values()), kind)
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            for key in missing:
                promise = self._coming.pop(key)
                promise.set_exception(error)
                promise.exception()  # who waited may have gone: then nobody else would ever look at it
            return
        for key, row in zip(missing, rows, strict=True):
            self._remember(key, row)
            self._coming.pop(key).set_result(row)

    def _remember(self, key: _Key, row: Vectors) -> None:
        self._known[key] = row.copy()  # its own memory: a row of a batch would keep all of the batch
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)


async def _keyed(texts: Sequence[str], kind: Kind) -> list[tuple[_Key, str]]:
    """*texts* by their keys, with what no model tells apart written one way; others get their turn in between."""
    keyed: list[tuple[_Key, str]] = []
    for place, text in enumerate(texts):
        normal = unicodedata.normalize("NFC", text[:_READ]).strip()
        keyed.append(((kind, hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()), normal))
        if place % 16 == 15:
            await asyncio.sleep(0)
    return keyed
