"""PDF (by pypdf): the text of its pages, lines joined to paragraphs, what is repeated at the edges of pages left out."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from pypdf import PdfReader
from pypdf.errors import DependencyError, PdfReadError, PyPdfError

from capibara_flow.domain.parsed import Block, Parsed, cleaned, plain_blocks
from capibara_flow.engines.parsing.media import PDF
from capibara_flow.errors import DocumentRefused

#: Beginnings and ends of pages that are on more than this share of them, and on three at least, are headers and footers.
_REPEATED, _PAGES = 0.5, 3
_HYPHEN = re.compile(r"(?<=[a-záéíóúüñ])-\n(?=[a-záéíóúüñ])")
_ENDS = re.compile(r"[.!?…:;\"”»)]$")
_STARTS = re.compile(r"(?:[-*•·‣–—]|\(?\d{1,3}[.)])\s")


def parse(data: bytes, declared: str | None = None) -> Parsed:
    """*data* as the text of its pages; raises ``DocumentRefused`` when it is encrypted, broken, or pictures only."""
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentRefused("the PDF is encrypted: save it without a password first")
        pages = [cleaned(page.extract_text() or "").strip() for page in reader.pages]
        title, updated, outline = _title(reader), _updated(reader), _outline(reader, reader.outline)
    except (DependencyError, NotImplementedError) as error:
        raise DocumentRefused("the PDF is encrypted: save it without a password first") from error
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, ArithmeticError, AssertionError) as error:
        # The reader meets broken files with whatever breaks in it.
        raise DocumentRefused(f"the PDF is broken: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    if not any(any(each.isalnum() for each in page) for page in pages):
        raise DocumentRefused("the PDF has no text, only pictures perhaps: run a text recognition (OCR) over it first")
    text, starts = _joined(_without_edges(pages))
    blocks = _with_outline(text, starts, outline) if outline else plain_blocks(text)
    return Parsed(text, blocks, title, updated=updated, media_type=PDF)


def _title(reader: PdfReader) -> str:
    told = reader.metadata.title if reader.metadata else None
    return " ".join(cleaned(str(told)).split()) if told else ""


def _updated(reader: PdfReader) -> datetime | None:
    told = reader.metadata
    with suppress(ValueError, PdfReadError):
        return (told.modification_date or told.creation_date) if told else None
    return None


def _outline(reader: PdfReader, entries: Iterable[Any], level: int = 1) -> list[tuple[int, int, str]]:
    """Page, level and title of the entries of a table of contents."""
    found: list[tuple[int, int, str]] = []
    for entry in entries:
        if isinstance(entry, list):
            found += _outline(reader, entry, level + 1) if level < 6 else []
        else:
            page = reader.get_destination_page_number(entry)
            if page is not None and entry.title:
                found.append((page, level, " ".join(cleaned(str(entry.title)).split())))
    return found


def _without_edges(pages: Sequence[str]) -> list[str]:
    lines = [[line.strip() for line in page.split("\n") if line.strip()] or [""] for page in pages]
    if len(pages) < _PAGES:
        return list(pages)
    edges = Counter(edge for page in lines for edge in {_same(page[0]), _same(page[-1])})
    repeated = {edge for edge, count in edges.items() if count >= _PAGES and count > _REPEATED * len(pages)}
    return [_trimmed(page, repeated) for page in pages]


def _same(line: str) -> str:
    """A line as it is on every page, whatever its number."""
    return re.sub(r"\d+", "#", line)


def _trimmed(page: str, repeated: set[str]) -> str:
    lines = page.split("\n")
    while lines and (not lines[0].strip() or _same(lines[0].strip()) in repeated):
        lines.pop(0)
    while lines and (not lines[-1].strip() or _same(lines[-1].strip()) in repeated):
        lines.pop()
    return "\n".join(lines)


def _joined(pages: Sequence[str]) -> tuple[str, list[int]]:
    """The text of all *pages*, and where each begins."""
    pieces: list[str] = []
    starts, at = [], 0
    for page in pages:
        starts.append(at)
        piece = _paragraphs(page) + "\n\n"
        pieces.append(piece)
        at += len(piece)
    return "".join(pieces), starts


def _paragraphs(page: str) -> str:
    """A page with its lines joined, where a paragraph goes on in the next line."""
    lines = [line.strip() for line in _HYPHEN.sub("", page).split("\n")]
    width = max((len(line) for line in lines), default=0)
    written: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        goes_on = before and line and len(before) > 0.6 * width and not _STARTS.match(line)
        if goes_on and not (_ENDS.search(before) and len(before) < 0.85 * width):
            written.append(f" {line}")
        else:
            written.append(f"\n{'' if not before or not line or _STARTS.match(line) else chr(10)}{line}")
    return "".join(written).strip()


def _with_outline(text: str, starts: Sequence[int], outline: Sequence[tuple[int, int, str]]) -> tuple[Block, ...]:
    """The plain blocks, with the entries of the table of contents as headings where they are found on their pages."""
    blocks: list[Block] = []
    at = 0
    for page, level, title in outline:
        begin = max(at, starts[page]) if page < len(starts) else at
        end = starts[page + 1] if page + 1 < len(starts) else len(text)
        if found := _line_of(title, text, begin, end):
            blocks += _moved(text, at, found[0])
            blocks.append(Block(*found, "heading", level, title))
            at = found[1]
    return (*blocks, *_moved(text, at, len(text)))


def _line_of(title: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    """Where *title* stands, as a line with a number before it perhaps, or at least at the beginning of one."""
    words = r"\s+".join(map(re.escape, title.split()))
    for behind in (r"[ \t]*$", r"(?!\w)"):
        if found := re.compile(rf"^[ \t]*(?:[\d.]{{1,12}}[ \t]+)?{words}{behind}", re.MULTILINE).search(text, start, end):
            return found.span()
    return None


def _moved(text: str, start: int, end: int) -> list[Block]:
    return [
        Block(start + each.start, start + each.end, "list" if each.kind == "list" else "paragraph")
        for each in plain_blocks(text[start:end])
    ]
