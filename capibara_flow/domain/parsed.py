"""What a parser makes of a file: its text, and where the parts of its structure stand in it. Pure."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Kind = Literal["heading", "paragraph", "list", "table", "code"]

#: Characters that say nothing in a text: controls beside tab and line feed, soft hyphens, what is not a character, private marks of order.
_SILENT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffe\uffff\ud800-\udfff]+")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")

#: A line of plain text that begins a list item.
_BULLET = re.compile(r"[ \t]{0,12}(?:[-*+•·‣–—]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])[ \t]+\S")
_NUMBERED = re.compile(r"(\d{1,2}(?:\.\d{1,2}){0,4})\.?[ \t]+\S")
_CHAPTER = re.compile(
    r"(?:chapter|part|section|cap[ií]tulo|parte|secci[oó]n|anexo|appendix|annex)\s+(?:\d+|[ivxlc]+|[a-z])\b", re.IGNORECASE
)
_RULE = re.compile(r"[ \t]*(=+|-+)[ \t]*")

#: A heading is no longer than this, in characters and words.
_LONG, _WORDY = 90, 12


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a text from *start* to before *end*; a heading has its *level* (from 1) and its *title* without any markup."""

    start: int
    end: int
    kind: Kind = "paragraph"
    level: int = 0
    title: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A document as text, with its *blocks* in order.

    *language* is an ISO 639-1 code, empty where it cannot be told; *updated* is known as far as the file tells.
    """

    text: str
    blocks: tuple[Block, ...] = ()
    title: str = ""
    language: str = ""
    updated: datetime | None = None
    media_type: str = "text/plain"

    @property
    def headings(self) -> tuple[Block, ...]:
        """The blocks that are headings."""
        return tuple(block for block in self.blocks if block.kind == "heading")


def cleaned(text: str) -> str:
    """*text* in Unicode's NFC, with line feeds as line ends, and without characters that nobody can read."""
    return unicodedata.normalize("NFC", _SILENT.sub("", _LINE_ENDS.sub("\n", text)))


def plain_blocks(text: str) -> tuple[Block, ...]:
    """The blocks of a plain text: what stands between empty lines, lists by their bullets, headings by their form."""
    return tuple(block for start, end in _between_empty_lines(text) for block in _read(text, start, end))


def _between_empty_lines(text: str) -> Iterator[tuple[int, int]]:
    begun, at, end = -1, 0, 0
    while at < len(text):
        stop = text.find("\n", at)
        stop = len(text) if stop < 0 else stop
        if text[at:stop].strip():
            begun = at if begun < 0 else begun
            end = stop
        elif begun >= 0:
            yield begun, end
            begun = -1
        at = stop + 1
    if begun >= 0:
        yield begun, end


def _read(text: str, start: int, end: int) -> Iterator[Block]:
    """One block, or a heading and what follows it at once."""
    first = text.find("\n", start, end)
    first = end if first < 0 else first
    line = text[start:first].strip() if first - start <= 4 * _LONG else ""
    under = _RULE.fullmatch(text, first + 1, _line_end(text, first + 1, end)) if first < end else None
    if line and under and _short(line):
        yield Block(start, under.end(), "heading", 1 if "=" in under[1] else 2, line)
        start = under.end()
    elif line and first == end and (level := _heading_level(line)):
        yield Block(start, end, "heading", level, line)
        return
    if text[start:end].strip():
        yield Block(start, end, "list" if _BULLET.match(text, start) and first < end else "paragraph")


def _line_end(text: str, start: int, end: int) -> int:
    stop = text.find("\n", start, end)
    return end if stop < 0 else stop


def _short(line: str) -> bool:
    return len(line) <= _LONG and len(line.split()) <= _WORDY


def _heading_level(line: str) -> int:
    """The level of a *line* that stands alone, if it looks like a heading; 0 otherwise."""
    if not _short(line) or line[-1] in ".,;:!?…" or not any(each.isalpha() for each in line):
        return 0
    if numbered := _NUMBERED.match(line):
        return 1 + numbered[1].count(".") if line[numbered.end() - 1].isupper() else 0
    if _CHAPTER.match(line):
        return 1
    return 1 if line.isupper() and sum(each.isalpha() for each in line) >= 4 else 0
