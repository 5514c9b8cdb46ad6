"""Vectors that are kept on the disk by what they are of: whoever embeds the same library again waits no second time."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Embedder, Vectors

_AT_ONCE = 64


class KeptEmbedder:
    """``ports.Embedder`` before *inner*: vectors are kept in *folder*, one file a model, each under the SHA-256 of kind and text.

    No text is kept. *told* hears how many more are there. Raises ``CannotStart`` when the folder cannot be used.
    """

    def __init__(self, inner: Embedder, folder: Path, told: Callable[[int], None] = lambda _: None) -> None:
        self._inner = inner
        self._told = told
        name = "".join(each if each.isalnum() or each in "-_." else "_" for each in inner.model)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._kept = sqlite3.connect(folder / f"{name}.sqlite", check_same_thread=False, timeout=30)
            with self._kept:
                self._kept.execute("CREATE TABLE IF NOT EXISTS vectors (digest BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise CannotStart(f"vectors cannot be kept in {folder}: {error}") from error

    @property
    def model(self) -> str:
        return self._inner.model

    @property
    def dimension(self) -> int:
        return self._inner.dimension

    async def embed(self, texts: Sequence[str], kind: Kind = "query") -> Vectors:
        rows = [np.zeros((0, self.dimension), np.float32)]
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            rows.append(await self._some(some, [_digest(text, kind) for text in some], kind))
            self._told(len(some))
        return np.concatenate(rows)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._kept.close)
        await self._inner.aclose()

    async def _some(self, texts: Sequence[str], digests: Sequence[bytes], kind: Kind) -> Vectors:
        known = await asyncio.to_thread(self._known, digests)
        missing = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}
        if missing:
            fresh = await self._inner.embed(list(missing.values()), kind)
            await asyncio.to_thread(self._keep, list(zip(missing, fresh, strict=True)))
            known.update(zip(missing, fresh, strict=True))
        return np.stack([known[digest] for digest in digests])

    def _known(self, digests: Sequence[bytes]) -> dict[bytes, Vectors]:
        marks = ",".join("?" * len(digests))
        found = self._kept.execute(f"SELECT digest, vector FROM vectors WHERE digest IN ({marks})", digests)  # noqa: S608  marks only
        rows = {digest: np.frombuffer(vector, np.float32) for digest, vector in found}
        return {digest: row for digest, row in rows.items() if len(row) == self.dimension}

    def _keep(self, rows: Sequence[tuple[bytes, Vectors]]) -> None:
        with self._kept:
            self._kept.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", [(digest, row.tobytes()) for digest, row in rows])


def _digest(text: str, kind: Kind) -> bytes:
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest()
