"""From what several finders think of passages to one order: normalised, weighted, near duplicates merged, numbered. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from capibara_flow.domain.bm25 import words_of
from capibara_flow.domain.linking import Path
from topics.knowledge import Passage, Source

_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Weights:
    """How a score is put together: ``vector * likeness + graph * link + recency * 2 ** (-age / half_life_days)``.

    The likeness itself is ``dense * meaning + lexical * words + coverage * sentence``, brought to 0..1 over the passages in question.
    What the question names, and what it leads to, is lifted towards 1: by *named* times its link, and by *hop* times the likeness of
    the passage that leads there times the rarity of the entity. A passage that only mentions an entity counts *mentioning* times one
    that is about it: nothing by default, for the words of its name are found anyway. Two passages that share *duplicate* of their
    pairs of words are one.
    """

    vector: float = 0.7
    graph: float = 0.3
    recency: float = 0.05
    half_life_days: float = 365.0
    dense: float = 1.0
    lexical: float = 0.5
    coverage: float = 1.0
    named: float = 0.5
    hop: float = 0.9
    mentioning: float = 0.0
    duplicate: float = 0.9


@dataclass(frozen=True, slots=True)
class Found:
    """What the finders think, by passage: *dense* cosines (*floor*: the one that says nothing), shares of words, paths in the graph."""

    dense: Mapping[str, float]
    floor: float = 0.0
    lexical: Mapping[str, float] = field(default_factory=dict)
    coverage: Mapping[str, float] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)


def likeness(found: Found, ids: Iterable[str], weights: Weights) -> dict[str, float]:
    """How like the question the passages *ids* are by meaning and words, not normalised yet.

    Cosines count from the floor to the best one; shares of words count as they are, so that words which only happen to be shared,
    with a question in another language, say, do not weigh more than they should.
    """
    best = max(found.dense.values(), default=0.0)
    width = best - found.floor
    scores = {}
    for id in ids:
        meaning = max(0.0, found.dense.get(id, found.floor) - found.floor) / width if width > 0 else float(id in found.dense)
        scores[id] = weights.dense * meaning + weights.lexical * found.lexical.get(id, 0.0) + weights.coverage * found.coverage.get(id, 0.0)
    return scores


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """*scores* from 0 (the least) to 1 (the greatest); all 1 where they are equal."""
    low, high = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
    return {id: (score - low) / (high - low) if high > low else 1.0 for id, score in scores.items()}


def ranked(found: Found, updated: Mapping[str, float], now: float, weights: Weights) -> list[tuple[str, float, dict[str, float]]]:
    """The passages *updated* (seconds since the epoch; 0: unknown) by score, the best first: id, score, and its parts by name."""
    vector = normalised(likeness(found, updated, weights))
    strongest = max((path.strength for path in found.paths.values()), default=0.0) or 1.0
    links = {id: path.strength / strongest for id, path in found.paths.items()}
    lifts = {id: _lift(path, links[id], vector, weights) for id, path in found.paths.items()}
    vector = {id: value + (1 - value) * lifts.get(id, 0.0) for id, value in vector.items()}
    rows = []
    for id, when in updated.items():
        link = links.get(id, 0.0)
        fresh = 2.0 ** (-max(0.0, now - when) / (weights.half_life_days * _DAY)) if when > 0 else 0.0
        score = weights.vector * vector[id] + weights.graph * link + weights.recency * fresh
        parts = {"vector": vector[id], "graph": link, "recency": fresh}
        if id in found.dense:
            parts["dense"] = found.dense[id]
        parts["lexical"] = found.lexical.get(id, 0.0)
        rows.append((id, score, {name: round(value, 4) for name, value in parts.items()}))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def _lift(path: Path, link: float, vector: Mapping[str, float], weights: Weights) -> float:
    """How far towards 1 the way to a passage lifts its likeness: over another one by the likeness of that one, else by the link itself."""
    return weights.hop * path.firmness * vector.get(path.over, 0.0) if path.over else weights.named * link


def distinct(order: Iterable[str], passages: Mapping[str, Passage], limit: int, duplicate: float) -> list[str]:
    """The first *limit* of *order* that are there and do not say what one before them said already."""
    kept: list[tuple[str, frozenset[tuple[str, str]]]] = []
    for id in order:
        if len(kept) == limit:
            break
        if (passage := passages.get(id)) is None:
            continue
        pairs = _pairs(passage.text)
        if all(_shared(pairs, others) < duplicate for _, others in kept):
            kept.append((id, pairs))
    return [id for id, _ in kept]


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairwise(("", *words_of(text), "")))


def _shared(one: frozenset[tuple[str, str]], other: frozenset[tuple[str, str]]) -> float:
    """Jaccard's index: the share of what is in either that is in both."""
    return len(one & other) / (len(one | other) or 1)


def numbered(rows: Sequence[tuple[str, float, dict[str, float]]], kept: Sequence[str], passages: Mapping[str, Passage]) -> list[Source]:
    """The *kept* passages as sources, from 1 in the order of *rows*."""
    wanted = set(kept)
    chosen = [row for row in rows if row[0] in wanted]
    return [Source(n, passages[id], round(score, 4), parts) for n, (id, score, parts) in enumerate(chosen, 1)]
