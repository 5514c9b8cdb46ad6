"""How a document is cut into passages: along its headings, blocks and sentences, and never larger than an embedder can read. Pure."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from capibara_flow.domain.parsed import Block, plain_blocks

#: What counts as one word: up to twelve letters without a space, or one sign of a script that is written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD_LETTERS = 12
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,{_WORD_LETTERS}}}")

#: Where a sentence may end: marks, closing signs, and white space; or the full stop of a script without spaces.
_STOP = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s)|[。！？]++[」』”]?")
_LAST_WORD = re.compile(r"[^\s(\[\"'“«¿¡]{1,20}$")
_OPENS = re.compile(r"\s*[\"'“‘«(\[¿¡—–-]*\s*(?=(\S))")
_INITIAL = re.compile(r"(?:[^\W\d_]\.)+", re.UNICODE)
_ABBREVIATIONS = frozenset(
    """
    sr sra srta sres sras dr dra dres prof profa lic ing arq gral cnel tte sgto cap capt col gen lt sgt d dña fr ud uds vd vds
    art arts núm num nº n.º no nos pág pags págs p pp vol vols ed eds fig figs cap caps sec tel av avda c cía cia ltda esq aprox
    ej p.ej etc máx mín admón depto dpto sto sta san st ste mr mrs ms messrs jr sr rev hon pres gov sen rep vs v cf al inc ltd co
    corp bros dept est jan feb mar apr jun jul aug sep sept oct nov dec ene abr ago dic mt ft approx viz e.g i.e a.m p.m u.s u.k
    """.split()
)
#: Abbreviations that end a sentence when a capital letter follows, as often as not.
_MAY_END = frozenset("etc a.m p.m al inc ltd co corp jr no c v mar sep".split())

#: A passage is closed at a heading once it has this share of the target, and the last of a section joins the one before when smaller.
_ENOUGH, _REST = 0.3, 0.25
_TITLE_LETTERS = 200

#: So many letters are counted one after the other, to hold less memory.
_MUCH = 100_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large passages are, in words (a word of more than twelve letters counts as several): about *target*, never above *most*.

    *most* words have to fit into the window of the embedder; Spanish takes up to 1.6 tokens a word. Where a paragraph has to be cut,
    the next passage repeats its last sentence if that has at most *overlap* words.
    """

    target: int = 200
    most: int = 260
    overlap: int = 30

    def __post_init__(self) -> None:
        if not 1 <= self.target <= self.most or self.overlap < 0:
            raise ValueError("sizes of passages: 1 <= target <= most, and no overlap below 0")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage to be: ``text`` is the document's text from *start* to before *end*; *headings* lead to it, the highest first."""

    start: int
    end: int
    text: str
    headings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is never cut any more; *cut* tells that it continues the unit before it, within one block."""

    start: int
    end: int
    words: int
    path: tuple[str, ...]
    heading: bool = False
    cut: bool = False


def words_in(text: str) -> int:
    """How many words *text* has, as ``Sizes`` counts them."""
    return len(_WORD.findall(text)) if len(text) < _MUCH else sum(1 for _ in _WORD.finditer(text))


def chunks(text: str, blocks: Sequence[Block] = (), sizes: Sizes = Sizes()) -> list[Chunk]:
    """*text* as passages, in order; all but white space is in one of them (or in two that overlap).

    Time is linear in the length: about 3 MB a second. Without *blocks* the text is read as plain text.
    """
    units = list(_units(text, _complete(text, blocks or plain_blocks(text)), sizes))
    return [_chunk(text, group) for group in _joined(_groups(units, sizes), sizes)]


def _chunk(text: str, units: Sequence[_Unit]) -> Chunk:
    start, end = units[0].start, units[-1].end
    path = units[0].path
    for unit in units[1:]:
        shared = sum(1 for _ in _while_equal(path, unit.path))
        path = path[:shared]
    return Chunk(start, end, text[start:end], path)


def _while_equal(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def _complete(text: str, blocks: Sequence[Block]) -> Iterator[Block]:
    """*blocks* in order and without overlaps, and as paragraphs what stands between them."""
    at = 0
    for block in sorted(blocks, key=lambda each: each.start):
        start, end = max(block.start, at), min(block.end, len(text))
        if start >= end:
            continue
        yield Block(at, start)
        yield replace(block, start=start, end=end)
        at = end
    yield Block(at, len(text))


def _units(text: str, blocks: Iterable[Block], sizes: Sizes) -> Iterator[_Unit]:
    path: list[tuple[int, str]] = []
    for block in blocks:
        start, end = _trimmed(text, block.start, block.end)
        if start == end:
            continue
        if block.kind == "heading":
            path = [(level, title) for level, title in path if level < block.level]
            path.append((block.level, (block.title or " ".join(text[start:end].split()))[:_TITLE_LETTERS]))
        names = tuple(title for _, title in path)
        words = words_in(text[start:end])
        if words <= sizes.most:
            yield _Unit(start, end, words, names, block.kind == "heading")
        else:
            yield from _cut(text, replace(block, start=start, end=end), names, sizes)


def _cut(text: str, block: Block, path: tuple[str, ...], sizes: Sizes) -> Iterator[_Unit]:
    """A block that is too large, by its sentences, or by its lines where these are what it is made of."""
    split = sentences if block.kind in ("paragraph", "heading") else _lines
    first = True
    for start, end in split(text, block.start, block.end):
        words = words_in(text[start:end])
        pieces = [(start, end, words)] if words <= sizes.target else _by_words(text, start, end, sizes.target)
        for piece in pieces:
            yield _Unit(*piece, path, cut=not first)
            first = False


def sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The sentences of *text* from *start* to before *end*, Spanish or English, as offsets without the white space around them."""
    at = start
    for stop in _STOP.finditer(text, start, end):
        if _ends_here(text, stop, end):
            if stop.end() > at and text[at : stop.end()].strip():
                yield _trimmed(text, at, stop.end())
            at = stop.end()
    if text[at:end].strip():
        yield _trimmed(text, at, end)


def _ends_here(text: str, stop: re.Match[str], end: int) -> bool:
    if stop[0][0] != ".":
        follows = _OPENS.match(text, stop.end(), min(end, stop.end() + 40))
        return not (follows and follows[1].islower()) or stop[0][0] in "。！？"
    follows = _OPENS.match(text, stop.end(), min(end, stop.end() + 40))
    if follows is None:
        return True
    if follows[1].islower():
        return False
    word = _LAST_WORD.search(text, max(0, stop.start() - 20), stop.start())
    if word is None:
        return True
    folded = word[0].casefold()
    if folded in _ABBREVIATIONS:
        return folded in _MAY_END and follows[1].isupper()
    return not (len(folded) == 1 and word[0].isupper()) and not _INITIAL.fullmatch(f"{word[0]}.")


def _lines(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = text.find("\n", start, end)
        stop = end if stop < 0 else stop
        if text[start:stop].strip():
            yield _trimmed(text, start, stop)
        start = stop + 1


def _by_words(text: str, start: int, end: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of at most *most* words, cut at white space wherever there is some."""
    begun, last, count, gap, since = start, start, 0, -1, 0
    for word in _WORD.finditer(text, start, end):
        if word.start() > last:
            gap, since = last, 0
        if count == most:
            stop = gap if gap > begun else last
            yield (*_trimmed(text, begun, stop), count - since if stop == gap else count)
            begun, count, gap = stop, since if stop == gap else 0, -1
        count, since, last = count + 1, since + 1, word.end()
    if text[begun:end].strip():
        yield (*_trimmed(text, begun, end), count)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    return start + left, max(start + left, start + len(piece.rstrip()))


def _groups(units: Sequence[_Unit], sizes: Sizes) -> Iterator[list[_Unit]]:
    """Units that make one passage each; headings go with what follows them."""
    group: list[_Unit] = []
    words = 0
    for unit in units:
        full = words + unit.words > (sizes.most if words < sizes.target // 2 else sizes.target)
        if group and (full or (unit.heading and words >= _ENOUGH * sizes.target)):
            head, tail = _parted(group, unit, sizes)
            if head:
                yield head
            group = tail
            words = sum(each.words for each in group)
        group.append(unit)
        words += unit.words
    if group:
        yield group


def _parted(group: list[_Unit], unit: _Unit, sizes: Sizes) -> tuple[list[_Unit], list[_Unit]]:
    """*group* as what is closed before *unit*, and what of it goes on with *unit*."""
    keep = len(group)
    while keep and group[keep - 1].heading:
        keep -= 1
    tail = group[keep:]
    if tail and sum(each.words for each in tail) + unit.words <= sizes.most:
        return group[:keep], tail
    again = [group[-1]] if unit.cut and len(group) > 1 and group[-1].words <= sizes.overlap else []
    if again and again[0].words + unit.words > sizes.most:
        again = []
    return group, again


def _joined(groups: Iterable[list[_Unit]], sizes: Sizes) -> Iterator[list[_Unit]]:
    """*groups*, a small rest joined to what is before it in the same section."""
    before: list[_Unit] | None = None
    for group in groups:
        if before and _rest_of(before, group, sizes):
            before = [*before, *(unit for unit in group if unit.start >= before[-1].end)]
            continue
        if before:
            yield before
        before = group
    if before:
        yield before


def _rest_of(before: Sequence[_Unit], group: Sequence[_Unit], sizes: Sizes) -> bool:
    fresh = sum(unit.words for unit in group if unit.start >= before[-1].end)
    same = before[-1].path == group[-1].path and not any(unit.heading for unit in group)
    return same and fresh <= _REST * sizes.target and fresh + sum(unit.words for unit in before) <= sizes.most
