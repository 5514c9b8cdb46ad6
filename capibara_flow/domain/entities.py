"""What passages name: people, places, works, told by how names are written in Spanish and English. Pure, without any model.

A name is a run of words with capital letters, with the particles that stand inside of names ("of the", "de la", "von"). What is only
capital because a sentence begins is told by small words and by the other places where the document has the word.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from capibara_flow.domain.bm25 import SMALL, fold, words_of
from topics.knowledge import Mention, Passage

#: Of one passage, so many names are kept at most, of so many words each.
MOST, LONGEST = 96, 12

_TOKEN = re.compile(r"[^\W_]+(?:[.’'&-][^\W_]+)*")
_POSSESSIVE = re.compile(r"[’'][sS]$")
_QUOTED = re.compile(r"[\"“«]\s{0,2}([^\"“”«»\n]{2,100}?)\s{0,2}[\"”»]|(?<![*\w])\*{1,2}([^*\n]{2,100})\*{1,2}(?![*\w])")
_BETWEEN = re.compile(r"[ \t\u00a0]{1,3}|[ \t]?\n[ \t]?")
_AFTER_DOT = re.compile(r"\.[ \t\u00a0]{0,3}")
_COMMA = re.compile(r", {1,2}")
_BREAK = re.compile(r"[.!?…:;•|¿¡]|\n[ \t]*(?:\n|[-*#])|^[\s>#*-]*$")
_PARENTHESIS = re.compile(r"\s*[(\[（][^()\[\]（）]{1,80}[)\]）]\s*$")
_ROMAN = re.compile(r"[IVXLCDM]{1,7}")

#: What stands inside of names: between their words strongly ("Duke of Bavaria"), or in titles of works ("Come Dance with Me").
_STRONG = frozenset("of de del do da dos das di du des della von van der den zu af bin ibn al y' d l of' la las los el le the".split())
_LINKS = frozenset("of de del do da dos das di du des della von van af bin ibn".split())
_WEAK = frozenset("in on at for to with from a an and en con por para sin sobre un una y e and & no me".split())
_DOTTED = frozenset("st sta sto dr dra mr mrs ms sr sra jr mt prof gen col capt lt sgt rev hon ste ft no vol".split())
_RANKS = frozenset(
    """
    king queen prince princess duke duchess count countess earl baron baroness lord lady sir dame emperor empress pope saint st bishop
    archbishop cardinal father sister brother president senator governor minister general colonel captain doctor dr professor prof mr mrs
    ms miss don doña rey reina príncipe princesa duque duquesa conde condesa marqués marquesa barón emperador emperatriz papa san santa
    santo obispo arzobispo cardenal padre presidente presidenta senador ministro ministra general coronel capitán doctor doctora profesor
    profesora señor señora sr sra margrave tsar tsarina sultan crown
    """.split()
)
_FOLDED_RANKS = frozenset(map(fold, _RANKS))
#: Words that begin sentences or stand in every text with a capital, and are no names alone.
_COMMON = SMALL | frozenset(
    """
    however although though therefore thus moreover furthermore meanwhile instead despite according several many some such since until
    during later early then today now here there first second third one two three four five six seven eight nine ten next last see note
    another each every both either neither because while whereas upon among within without following given let please yes perhaps often
    ademas tambien asimismo sin embargo aunque segun mientras entonces luego despues antes durante hoy ahora aqui alli primero segundo
    tercero uno dos tres cuatro cinco varios varias muchos muchas algunos algunas cada ambos debido gracias hacia hasta tras vea nota
    actualmente posteriormente finalmente generalmente finally originally currently recently usually generally january february march
    april may june july august september october november december enero febrero marzo abril mayo junio julio agosto septiembre octubre
    noviembre diciembre monday tuesday wednesday thursday friday saturday sunday lunes martes miercoles jueves viernes sabado domingo
    chapter section figure table page example capitulo seccion figura tabla pagina ejemplo mr mrs ms dr sr sra i ii iii iv
    """.split()
)


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    start: int
    end: int
    opens: bool

    @property
    def capital(self) -> bool:
        return self.text[0].isupper()


@lru_cache(maxsize=1 << 16)
def _plain(word: str) -> str:
    """*word* folded; a text has the same ones again and again."""
    return fold(word)


def folded(name: str) -> str:
    """The key of an entity: the words of *name* in small letters and without accents, with one space between them; without an article."""
    words = words_of(name)
    if len(words) > 1 and words[0] in ("the", "el", "la", "los", "las", "a", "an"):
        words = words[1:]
    return " ".join(words)


def names_of_title(title: str) -> list[str]:
    """What the subject of a document may be called: its title, also without a parenthesis at its end or what follows a comma."""
    bare = _PARENTHESIS.sub("", title).strip() or title
    head = bare.partition(",")[0].strip()
    names = [title.strip(), bare]
    if len(words_of(head)) > 1:
        names.append(head)
    return [name for name in dict.fromkeys(names) if _worthy(folded(name))]


def _worthy(key: str) -> bool:
    words = key.split()
    return 0 < len(words) <= LONGEST and len(key) > 1 and any(word not in _COMMON and not word.isdigit() for word in words)


def mentions(passages: Sequence[Passage], title: str = "", known: Iterable[str] = ()) -> list[Mention]:
    """What the *passages* of one document mention, by passage; all of them are about what the *title* says.

    *known* are names that count wherever they stand, titles of other documents, say. Time is linear in the length of the text.
    """
    texts = [list(_words(passage.text)) for passage in passages]
    usual = _usual(texts)
    titles = {folded(name): name for name in names_of_title(title)}
    wanted = _Known.of(known)
    found: list[Mention] = []
    for passage, words in zip(passages, texts, strict=True):
        here = {key: Mention(passage.id, key, name, about=True) for key, name in titles.items()}
        for name in (*_names(passage.text, words, usual), *wanted.within(passage.text)):
            key = folded(name)
            if len(here) < MOST and key not in here and key not in _FOLDED_RANKS and _worthy(key):
                here[key] = Mention(passage.id, key, name)
        found += here.values()
    return found


def entities_of(text: str) -> list[str]:
    """The names in a question or any short *text*, as they are written there."""
    words = list(_words(text))
    return [name for name in dict.fromkeys(_names(text, words, _usual([words]))) if _worthy(folded(name))]


def candidates(text: str, longest: int = LONGEST) -> list[str]:
    """The keys that runs of words in *text* would have, the longest first: for a question without any capital letter."""
    words = words_of(text)[:256]
    runs = (words[at : at + size] for size in range(min(longest, len(words)), 0, -1) for at in range(len(words) - size + 1))
    return list(dict.fromkeys(" ".join(run) for run in runs if _worthy(" ".join(run))))


def _words(text: str) -> Iterator[_Word]:
    before = None
    for found in _TOKEN.finditer(text):
        gap = text[before.end() : found.start()] if before else ""
        opens = before is None or (
            gap != " " and bool(_BREAK.search(gap)) and not (gap.startswith(".") and _dotted(before[0]) and "\n" not in gap)
        )
        yield _Word(found[0], found.start(), found.end(), opens)
        before = found


def _dotted(word: str) -> bool:
    """Whether a full stop behind *word* belongs to it: an initial, or a title."""
    return (len(word) == 1 and word.isupper()) or word.lower() in _DOTTED or bool(re.fullmatch(r"(?:[A-Z]\.){1,4}[A-Z]", word))


def _usual(texts: Iterable[Sequence[_Word]]) -> "_Usage":
    small, capital = Counter[str](), Counter[str]()
    for words in texts:
        small.update(_plain(word.text) for word in words if not word.capital)
        capital.update(_plain(word.text) for word in words if word.capital and not word.opens)
    return _Usage(frozenset(word for word, count in small.items() if count > capital[word]), frozenset(capital))


@dataclass(frozen=True, slots=True)
class _Usage:
    """How a document writes words: more often *small* than with a capital inside of a sentence, and at all with such a *capital*."""

    small: frozenset[str]
    capital: frozenset[str]


def _names(text: str, words: Sequence[_Word], usual: _Usage) -> Iterator[str]:
    runs = list(_runs(text, words, usual))
    for run in runs:
        yield from _variants(text, run)
    for before, run in pairwise(runs):
        if _COMMA.fullmatch(text, before[-1].end, run[0].start) and len(before) + len(run) <= LONGEST:
            yield text[before[0].start : run[-1].end]
    for quoted in _QUOTED.finditer(text):
        name = (quoted[1] or quoted[2] or "").strip(" ,.;:")
        if name[:1].isupper() and len(name.split()) <= LONGEST:
            yield name


def _runs(text: str, words: Sequence[_Word], usual: _Usage) -> Iterator[list[_Word]]:
    """Names as their words; those of a title in small letters are inside, never at an end."""
    run: list[_Word] = []
    inside: list[_Word] = []
    for word in words:
        joined = bool(run) and len(run) < 2 * LONGEST and not _apart(text, (inside or run)[-1], word)
        if run and not joined:
            yield from _kept(run, usual)
            run, inside = [], []
        if word.capital or (run and not inside and word.text[0].isdigit() and len(word.text) <= 4):
            run += [*inside, word]
            inside = []
        elif run and len(inside) < 2 and _plain(word.text) in _STRONG | _WEAK:
            inside.append(word)
        elif run:
            yield from _kept(run, usual)
            run, inside = [], []
    yield from _kept(run, usual)


def _apart(text: str, before: _Word, word: _Word) -> bool:
    if _BETWEEN.fullmatch(text, before.end, word.start):
        return False
    return not (_dotted(before.text) and _AFTER_DOT.fullmatch(text, before.end, word.start))


def _kept(run: Sequence[_Word], usual: _Usage) -> Iterator[list[_Word]]:
    """*run* without the words at its beginning that are only capital because a sentence begins."""
    left = list(run)
    while left and (not left[0].capital or ((left[0].opens or len(left) == 1) and _only_opens(left[0], usual, alone=len(left) == 1))):
        left.pop(0)
    if left and (len(left) > 1 or not _ROMAN.fullmatch(left[0].text) or len(left[0].text) > 4):
        yield left


def _only_opens(word: _Word, usual: _Usage, *, alone: bool) -> bool:
    """Whether *word* is no name but begins a sentence; *alone*, it has to be seen as a name elsewhere."""
    plain = _plain(word.text)
    return plain in _COMMON or plain in usual.small or (alone and word.opens and plain not in usual.capital)


def _variants(text: str, run: Sequence[_Word]) -> Iterator[str]:
    """All that a run may name: the whole, its parts between small words, and these without ranks, numbers and possessives."""
    parts = list(_parts(run))
    whole = [run] if len(parts) == 1 or len(run) <= LONGEST else []
    for part in (*whole, *parts, *_linked(run)):
        name = text[part[0].start : part[-1].end]
        yield _POSSESSIVE.sub("", name)
        if len(part) > 1 and _plain(part[0].text) in _FOLDED_RANKS and part[1].capital:
            yield _POSSESSIVE.sub("", text[part[1].start : part[-1].end])
        if len(part) > 1 and part[-1].text.isdigit():
            yield text[part[0].start : part[-2].end]


def _parts(run: Sequence[_Word]) -> Iterator[list[_Word]]:
    """The pieces between small words, and behind a possessive; "University" is none in "University of Bath"."""
    part: list[_Word] = []
    for word in run:
        if not word.capital and not word.text[0].isdigit():
            if len(part) > 1 or (part and _plain(word.text) not in _LINKS):
                yield part
            part = []
            continue
        part.append(word)
        if _POSSESSIVE.search(word.text):
            yield part
            part = []
    if part:
        yield part


def _linked(run: Sequence[_Word]) -> Iterator[list[_Word]]:
    """The pieces that hang together by "of" and its like, where other small words stand in the run as well."""
    piece: list[_Word] = []
    for word in run:
        if word.capital or word.text[0].isdigit() or _plain(word.text) in _STRONG:
            piece.append(word)
            continue
        yield from _within(piece)
        piece = []
    if len(piece) < len(run):
        yield from _within(piece)


def _within(piece: list[_Word]) -> Iterator[list[_Word]]:
    while piece and not piece[-1].capital:
        piece.pop()
    while piece and not piece[0].capital:
        piece.pop(0)
    if any(_plain(word.text) in _LINKS for word in piece):
        yield piece


@dataclass(frozen=True)
class _Known:
    """Names to look for by their folded words."""

    keys: frozenset[str]
    longest: int

    @classmethod
    def of(cls, names: Iterable[str]) -> "_Known":
        keys = frozenset(filter(_worthy, map(folded, names)))
        return cls(keys, max((len(key.split()) for key in keys), default=0))

    def within(self, text: str) -> Iterator[str]:
        """Those that stand in *text*, the longest at each place."""
        words = words_of(text) if self.keys else []
        at = 0
        while at < len(words):
            sizes = range(min(self.longest, len(words) - at), 0, -1)
            size = next((size for size in sizes if " ".join(words[at : at + size]) in self.keys), 0)
            if size:
                yield " ".join(words[at : at + size])
            at += size or 1
