"""BM25 as sparse vectors: what a passage weighs is known from it alone, what a question weighs from the statistics of a store. Pure.

Robertson and Zaragoza, 2009, "The Probabilistic Relevance Framework: BM25 and Beyond": a term's part of the score is its rarity (*idf*)
times its saturated frequency, tf / (tf + k1 (1 - b + b length / usual length)). The second factor is the passage's vector and the first
the question's, so that their product is the score. The usual length is a constant, for passages are cut to a size: a vector never has
to be made again when other passages come or go. The factor k1 + 1, which changes no order, is left out: no weight is above 1.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log

from capibara_flow.ports import Spread
from topics.knowledge import Passage

#: Saturation, length normalisation and the usual length of a passage in words.
K1, B, USUAL = 1.2, 0.4, 100

#: Words of a question that are looked for; a longer one repeats itself.
_WORDS = 256

#: Characters that tell the language of a text.
_TOLD = 1000

_WORD = re.compile(r"\w+")
_STEMMERS = {
    "ca": "catalan", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "eu": "basque", "fi": "finnish",
    "fr": "french", "hu": "hungarian", "it": "italian", "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish", "tr": "turkish",
}  # fmt: skip

_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")

_SPANISH = frozenset(
    "a al algo ante aquel aquella aunque cada como con cual cuales cuando cuanta cuantas cuanto cuantos de del desde donde dos e el ella "
    "ellas ellos en entre era eran es esa esas ese eso esos esta estaba estan estas este esto estos fue fueron ha habia han hasta hay la "
    "las le les lo los mas me mi mientras muy ni no nos o otra otras otro otros para pero poco por porque pues que quien quienes se sea "
    "segun ser si sido sin sobre son su sus tambien tan tanto te tenia tiene tienen toda todas todo todos tu tus un una unas uno unos y "
    "ya yo".split()
)
_ENGLISH = frozenset(
    "a about after all also am an and any are as at be been before being between both but by can could did do does during each for from "
    "had has have he her here him his how i if in into is it its me more most my no nor not of on or other our out over own s same she so "
    "some such t than that the their them then there these they this those through to too under until up us very was we were what when "
    "where which while who whom whose why will with would you your".split()
)
#: Words that are in every text and tell nothing of it.
SMALL = _SPANISH | _ENGLISH
#: Words that tell one language from the other: those that both have tell nothing.
_TELLING = {"es": _SPANISH - _ENGLISH, "en": _ENGLISH - _SPANISH}


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a question: as written, folded (*plain*), and the terms that it may stand under; *telling* if it is looked for."""

    text: str
    plain: str
    terms: tuple[int, ...]
    telling: bool


def searchable(passage: Passage) -> str:
    """The text by which *passage* is found: its own below what it is called, so that a piece knows what it is a piece of."""
    above = dict.fromkeys(each for each in (passage.title, *passage.headings) if each)
    return "\n".join((*above, passage.text))


def fold(text: str) -> str:
    """*text* in small letters, composed and without accents, as people also write it."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return plain if plain.isascii() else "".join(each for each in plain if not unicodedata.combining(each))


def words_of(text: str) -> list[str]:
    """The words of *text*, folded."""
    return [_plain(word) for word in _WORD.findall(text)]


def language_of(text: str) -> str:
    """``es`` or ``en`` by the small words of *text* and its signs, empty where these do not tell."""
    words = words_of(text[:_TOLD])
    counts = {name: sum(word in telling for word in words) for name, telling in _TELLING.items()}
    counts["es"] += 2 * len(re.findall("[¿¡ñ]", text[:_TOLD]))
    best, other = sorted(counts, key=lambda name: -counts[name])
    return best if counts[best] > counts[other] else ""


def passage_weights(text: str, language: str = "") -> dict[int, float]:
    """The sparse vector of a passage: by term, its saturated frequency, from 0 to 1.

    Words are stemmed by *language* (ISO 639-1; told from the text when it is empty). Those that are written with a capital stand there
    unstemmed as well: names are the same in any language.
    """
    words, told = _WORD.findall(text), language or language_of(text)
    counts: Counter[int] = Counter()
    for word in words:
        plain, stem = _places(word, told)
        counts[stem] += 1
        if plain != stem and word[0].isupper():
            counts[plain] += 1
    pressure = K1 * (1 - B + B * len(words) / USUAL)
    return {term: count / (count + pressure) for term, count in counts.items()}


def question_words(question: str, language: str = "") -> list[Word]:
    """The words of *question* in order. Where no language can be told, both Spanish and English stems are looked for.

    Small words are *telling* only where there are no others, or where a capital in the middle makes a name of them.
    """
    words = [each[0] for each in zip(_WORD.findall(question), range(_WORDS), strict=False)]
    plain = [fold(word) for word in words]
    told = language or language_of(question)
    tongues = (told,) if told else ("es", "en")
    small = [word in SMALL and not (index and words[index][0].isupper()) for index, word in enumerate(plain)]
    return [
        Word(
            word,
            plain[index],
            tuple(dict.fromkeys(place for each in tongues for place in _places(word, each))),
            all(small) or not small[index],
        )
        for index, word in enumerate(words)
    ]


def question_weights(words: Sequence[Word], spread: Spread) -> dict[int, float]:
    """The sparse vector of a question: the rarity of each telling word, as a share of all of them.

    A word that no passage has keeps its share: a passage in another language, which has only the names, scores low.
    """
    rarities = {word.terms: rarity(word, spread) for word in words if word.telling}
    whole = sum(rarities.values()) or 1.0
    weights: dict[int, float] = {}
    for terms, each in rarities.items():
        for term in terms:
            weights[term] = max(weights.get(term, 0.0), each / whole)
    return {term: weight for term, weight in weights.items() if spread.containing.get(term)}


def rarity(word: Word, spread: Spread) -> float:
    """The inverse document frequency of *word*, by the most usual of its terms: above 0, and greatest where no passage has it."""
    containing = min(spread.passages, max(spread.containing.get(term, 0) for term in word.terms))
    return log(1 + (spread.passages - containing + 0.5) / (containing + 0.5))


def product(weights: Mapping[int, float], passage: Mapping[int, float]) -> float:
    """What a store would say of a passage, for those that it was not asked about."""
    return sum(weight * passage.get(term, 0.0) for term, weight in weights.items())


def coverage(text: str, language: str, words: Sequence[Word], spread: Spread, above: str = "") -> float:
    """Which share of the question's telling words, by rarity, stand in one sentence of *text* (what stands *above* it counts in each).

    From 0 to 1. What answers a question has its words together; a passage that has them all over may be about anything.
    """
    rarities = {word.terms: rarity(word, spread) for word in words if word.telling}
    whole = sum(rarities.values()) or 1.0
    told = language or language_of(text)
    heading = _terms(above, told)
    best = 0.0
    for sentence in _SENTENCE.split(text):
        there = _terms(sentence, told) | heading
        best = max(best, sum(each for terms, each in rarities.items() if not there.isdisjoint(terms)))
    return best / whole


def _terms(text: str, language: str) -> set[int]:
    return {place for word in _WORD.findall(text) for place in _places(word, language)}


@lru_cache(maxsize=1 << 16)
def _plain(word: str) -> str:
    return fold(word)


@lru_cache(maxsize=1 << 16)
def _places(word: str, language: str) -> tuple[int, int]:
    """The terms of *word*: folded, and its Snowball stem (the same in a language without a stemmer). Texts have the same words again."""
    plain = fold(word)
    name = _STEMMERS.get(language)
    if not name:
        return _id(plain), _id(plain)
    import Stemmer  # noqa: PLC0415  who has no documents need not have it

    return _id(plain), _id(str(Stemmer.Stemmer(name, 0).stemWord(plain)))


def _id(term: str) -> int:
    """A term's place, from 0 to 2^32 - 3, below what stores take and what they may need for themselves.

    Two of a million terms meet once in a few thousand.
    """
    return zlib.crc32(term.encode("utf-8", "surrogatepass")) % (2**32 - 2)
