"""What a text tells by its form: its words and their pieces, the cues in it, its signs. Pure, without any model."""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log1p, sqrt

#: Characters of a text that its form is read from: what is asked for stands in its beginning or its end.
_READ = 3000

#: Words of a beginning, in which a cue tells more than elsewhere.
_HEAD = 6

#: How many places the hashed terms of a text share.
PLACES = 4096


def fold(text: str) -> str:
    """*text* in small letters and without accents; of a long one its two ends."""
    cut = text if len(text) <= _READ else f"{text[: _READ // 2]}\n{text[-_READ // 2 :]}"
    plain = "".join(each for each in unicodedata.normalize("NFKD", cut.lower()).lower() if not unicodedata.combining(each))
    return plain[: 2 * _READ]  # one sign may be eighteen letters once it is taken apart


def terms(folded: str) -> dict[int, float]:
    """The words, pairs of words and pieces of three and four letters of a folded text: a sparse vector of length 1 in ``PLACES`` places.

    Places and signs are hashed (Weinberger et al., 2009, "Feature hashing for large scale multitask learning").
    """
    vector: dict[int, float] = {}
    for term, count in Counter(_terms(folded)).items():
        code = zlib.crc32(term.encode())
        place = code % PLACES
        vector[place] = vector.get(place, 0.0) + (1 if code >> 31 else -1) * (1 + log1p(count - 1))
    length = sqrt(sum(value * value for value in vector.values())) or 1.0
    return {place: value / length for place, value in vector.items()}


def _terms(folded: str) -> Iterator[str]:
    words = re.findall(r"\w+|[^\w\s]", folded)
    for word in words:
        yield f"w{word}"
        spaced = f" {word} "
        for size in (3, 4):
            yield from (spaced[start : start + size] for start in range(len(spaced) - size + 1) if len(spaced) > size)
    yield from (f"b{first} {second}" for first, second in pairwise(words))


def cued(folded: str, cues: Sequence[re.Pattern[str]]) -> list[float]:
    """Two numbers from 0 to 1 for each cue: how often it is there, and whether the text begins with it."""
    head = " ".join(folded.split()[:_HEAD])
    numbers = []
    for cue in cues:
        count = sum(1 for _ in cue.finditer(folded))
        numbers += [min(1.0, (1 + count) / 2) if count else 0.0, float(bool(cue.search(head)))]
    return numbers


def form(folded: str) -> list[float]:
    """Nine numbers from 0 to 1 on signs and structure: code, formulas, digits, question, length, brevity, quotation, lines, enumeration."""
    size, words = max(1, len(folded)), folded.split()
    return [
        min(1.0, 8 * sum(each in "{}[]();<>=_#$&|\\" for each in folded) / size),
        min(1.0, 8 * sum(each in "+-*/^=()√∫∑π%|<>" for each in folded) / size),
        min(1.0, 5 * sum(each.isdigit() for each in folded) / size),
        float("?" in folded or "¿" in folded),
        min(1.0, len(words) / 30),
        float(len(words) <= 2),
        float(any(each in folded for each in '"«“')),
        float("\n" in folded),
        min(1.0, folded.count(",") / 4),
    ]
