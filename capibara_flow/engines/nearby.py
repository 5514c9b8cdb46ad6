"""The vectors and terms of one scope in memory, searched exactly: what Milvus Lite does row by row in Python, numpy does at once."""

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from capibara_flow.ports import Vectors
from topics.knowledge import Hit

_FIRST = 256
_LOW = 1 << 16
#: No weight stands under a term of a row that went: space is made when so many are left, and more than what is in use.
_GONE = 4096


class Nearby:
    """Rows by key, each of a passage: unit vectors of *dimension* numbers, and weights by term. May be used from several threads.

    It takes 4 bytes a number and 12 bytes a term, and up to twice that while it grows.
    """

    def __init__(self, dimension: int) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}
        self._keys: list[str] = []
        self._passages: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._dense: Vectors = np.zeros((_FIRST, dimension), np.float32)
        self._terms = np.zeros(_FIRST, np.uint32)
        self._weights: Vectors = np.zeros(_FIRST, np.float32)
        self._owners = np.zeros(_FIRST, np.int32)
        self._used = 0
        self._gone = 0

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, key: str, passage: str, dense: "Vectors | Sequence[float]", sparse: Mapping[int, float]) -> None:
        """Keep a row; one that was there under the key is gone."""
        with self._lock:
            self._drop(key)
            place = self._places[key] = len(self._keys)
            self._keys.append(key)
            self._passages.append(passage)
            if place == len(self._dense):
                self._dense = np.concatenate((self._dense, np.zeros_like(self._dense)))
            row = np.asarray(dense, np.float32)
            self._dense[place] = row / (float(np.linalg.norm(row)) or 1.0)
            self._spans.append(self._append(place, sparse))

    def forget(self, keys: Iterable[str]) -> None:
        """Keep no row with one of these *keys*."""
        with self._lock:
            for key in keys:
                self._drop(key)

    def nearest(self, vector: Vectors, limit: int) -> list[Hit]:
        """The *limit* rows with the greatest cosine, the best first; of equals the one whose passage's id is the least."""
        row = np.asarray(vector, np.float32).reshape(-1)
        with self._lock:
            scores = self._dense[: len(self._keys)] @ (row / (float(np.linalg.norm(row)) or 1.0))
            return self._best(np.minimum(scores, 1.0), limit)

    def matching(self, terms: Mapping[int, float], limit: int) -> list[Hit]:
        """The *limit* rows with the greatest product with *terms*, of those that have one of them."""
        wanted = np.fromiter(sorted(terms), np.uint32, len(terms))
        asked = np.fromiter((terms[term] for term in sorted(terms)), np.float32, len(terms))
        with self._lock:
            # A table by the lower half of a term first: nearly all are told by it, at a tenth of the price of looking each one up.
            table = np.zeros(_LOW, bool)
            table[wanted % _LOW] = True
            maybe = np.flatnonzero(table[self._terms[: self._used].astype(np.uint16)])
            at = np.searchsorted(wanted, self._terms[maybe]).clip(max=max(len(wanted) - 1, 0))
            same = (wanted[at] == self._terms[maybe]) if len(wanted) else np.zeros(len(maybe), bool)
            maybe, at = maybe[same], at[same]
            scores = np.bincount(self._owners[maybe], self._weights[maybe] * asked[at], len(self._keys)).astype(np.float32)
            return self._best(scores, limit, above=0.0)

    def _best(self, scores: Vectors, limit: int, above: float = -np.inf) -> list[Hit]:
        if limit < len(scores):
            least = np.partition(scores, len(scores) - limit)[len(scores) - limit] if limit else np.inf
            places = np.flatnonzero((scores >= least) & (scores > above))
        else:
            places = np.flatnonzero(scores > above)
        hits = [Hit(self._passages[place], float(scores[place])) for place in places]
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage))[:limit]

    def _append(self, place: int, sparse: Mapping[int, float]) -> tuple[int, int]:
        start, end = self._used, self._used + len(sparse)
        while end > len(self._terms):
            self._terms = np.concatenate((self._terms, np.zeros_like(self._terms)))
            self._weights = np.concatenate((self._weights, np.zeros_like(self._weights)))
            self._owners = np.concatenate((self._owners, np.zeros_like(self._owners)))
        self._terms[start:end] = np.fromiter(sparse.keys(), np.uint32, len(sparse))
        self._weights[start:end] = np.fromiter(sparse.values(), np.float32, len(sparse))
        self._owners[start:end] = place
        self._used = end
        return start, end

    def _drop(self, key: str) -> None:
        """Let the last row take the place of the one with *key*."""
        if (place := self._places.pop(key, None)) is None:
            return
        start, end = self._spans[place]
        self._weights[start:end] = 0.0
        self._owners[start:end] = 0
        self._gone += end - start
        last = len(self._keys) - 1
        if place != last:
            self._dense[place] = self._dense[last]
            for each in (self._keys, self._passages):
                each[place] = each[last]
            self._spans[place] = self._spans[last]
            self._places[self._keys[place]] = place
            self._owners[slice(*self._spans[place])] = place
        for every in (self._keys, self._passages, self._spans):
            every.pop()
        if self._gone > max(_GONE, self._used // 2):
            self._close_up()

    def _close_up(self) -> None:
        """Take out the terms of rows that went."""
        kept = [np.arange(start, end) for start, end in self._spans]
        places = np.concatenate([np.zeros(0, np.int64), *kept])
        self._terms, self._weights, self._owners = self._terms[places], self._weights[places], self._owners[places]
        ends = np.cumsum([end - start for start, end in self._spans]).tolist()
        self._spans = list(zip([0, *ends], ends, strict=False))
        self._used, self._gone = len(places), 0
        if not len(places):
            self._terms, self._weights, self._owners = np.zeros(_FIRST, np.uint32), np.zeros(_FIRST, np.float32), np.zeros(_FIRST, np.int32)
