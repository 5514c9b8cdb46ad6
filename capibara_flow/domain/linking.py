"""From the names in a question to passages over two hops: which entities it names, and where these lead. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log

from capibara_flow.domain.bm25 import Word, rarity
from capibara_flow.ports import Spread
from topics.knowledge import Mention

#: Words that the name of an entity has at most, of those that are looked for.
LONGEST = 12


@dataclass(frozen=True, slots=True)
class Path:
    """How a passage is reached from the question: *strength* from 0 to 1, *over* the passage that led there (empty: none)."""

    strength: float
    over: str = ""
    firmness: float = 1.0


def names(words: Sequence[Word]) -> dict[str, list[tuple[int, int]]]:
    """What in a question could be the name of an entity, folded, and where it stands: runs of words, the ends excluded.

    A single word has to be written as a name, or with a digit, unless nothing in the question is; small words alone are no name.
    """
    written = any(_capital(word) for word in words[1:])
    found: dict[str, list[tuple[int, int]]] = {}
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + LONGEST) + 1):
            run = words[start:end]
            if any(word.telling for word in run) and (len(run) > 1 or _single(run[0], written)):
                found.setdefault(" ".join(word.plain for word in run), []).append((start, end))
    return found


def _capital(word: Word) -> bool:
    return word.text[:1].isupper()


def _single(word: Word, written: bool) -> bool:
    return len(word.plain) > 1 and (_capital(word) or not written or any(each.isdigit() for each in word.plain))


def linked(words: Sequence[Word], degrees: Mapping[str, int], spread: Spread) -> dict[str, float]:
    """The entities that the question names, of those that somebody mentions (*degrees*): each with its share of the question's rarity.

    Of names within each other only the longest counts: who asks for "Lothair II" does not mean every Lothair.
    """
    places = {name: where for name, where in names(words).items() if degrees.get(name)}
    taken: set[int] = set()
    strengths: dict[str, float] = {}
    each = [rarity(word, spread) for word in words]
    whole = sum(each) or 1.0
    runs = sorted(((start, end, name) for name, where in places.items() for start, end in where), key=lambda run: (run[0] - run[1], run[0]))
    for start, end, name in runs:
        if taken.isdisjoint(range(start, end)):
            taken.update(range(start, end))
            strengths[name] = max(strengths.get(name, 0.0), sum(each[start:end]) / whole)
    return strengths


def scarcity(degree: int, passages: int) -> float:
    """From 1 for an entity that one passage mentions towards 0 for one that all mention."""
    return log(1 + max(1, passages) / max(1, degree)) / log(1 + max(1, passages))


def first_hop(
    entities: Mapping[str, float], mentions: Iterable[Mention], degrees: Mapping[str, int], passages: int, mentioning: float
) -> dict[str, Path]:
    """The passages about what the question names, and those that only mention it, which count *mentioning* times that."""
    paths: dict[str, Path] = {}
    for mention in mentions:
        strength = entities.get(mention.entity, 0.0) ** 0.5
        if not mention.about:
            strength *= mentioning * scarcity(degrees.get(mention.entity, 1), passages)
        if strength > paths.get(mention.passage, Path(0.0)).strength:
            paths[mention.passage] = Path(strength)
    return paths


def leading(seeds: Mapping[str, Path], mentioned: Iterable[Mention], degrees: Mapping[str, int], passages: int) -> list[str]:
    """The entities that the *seeds* mention and others as well, those first that are rare and whose seed is strong."""
    worth: dict[str, float] = {}
    for mention in mentioned:
        if degrees.get(mention.entity, 0) > 1 and mention.passage in seeds:
            each = seeds[mention.passage].strength * scarcity(degrees[mention.entity], passages)
            worth[mention.entity] = max(worth.get(mention.entity, 0.0), each)
    return sorted(worth, key=lambda entity: (-worth[entity], entity))


def second_hop(
    seeds: Mapping[str, Path],
    mentioned: Iterable[Mention],
    mentions: Iterable[Mention],
    degrees: Mapping[str, int],
    *,
    passages: int,
    mentioning: float,
) -> dict[str, Path]:
    """The passages about what the *seeds* mention, by how rarely it is mentioned: what a question means that names it only indirectly.

    *mentioned* is what the seeds mention, *mentions* who mentions that.
    """
    ways: dict[str, list[tuple[str, float]]] = {}
    for mention in mentioned:
        if mention.passage in seeds:
            ways.setdefault(mention.entity, []).append((mention.passage, seeds[mention.passage].strength))
    paths: dict[str, Path] = {}
    for mention in mentions:
        firmness = scarcity(degrees.get(mention.entity, 1), passages) * (1.0 if mention.about else mentioning)
        for seed, strength in ways.get(mention.entity, ()):
            path = Path(strength * firmness, seed, firmness)
            if seed != mention.passage and path.strength > paths.get(mention.passage, Path(0.0)).strength:
                paths[mention.passage] = path
    return paths
