"""DOCX (by python-docx): paragraphs, lists and tables in the order of the document."""

import io
import re
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import docx
from docx.document import Document
from docx.opc.exceptions import PackageNotFoundError
from docx.table import Table
from docx.text.paragraph import Paragraph

from capibara_flow.domain.parsed import Block, Kind, Parsed, cleaned
from capibara_flow.engines.parsing.media import DOCX
from capibara_flow.errors import DocumentRefused

#: What an archive may grow to when it is unpacked, in bytes, and how many files may be in it.
LARGEST, MOST_FILES = 256 * 1024 * 1024, 5000
_HEADING = re.compile(r"(?:heading|t[ií]tulo|encabezado)\s*([1-9])", re.IGNORECASE)
_ITEM = re.compile(r"list|lista|bullet|viñeta", re.IGNORECASE)


def parse(data: bytes, declared: str | None = None) -> Parsed:
    """*data* as the text of a document; raises ``DocumentRefused`` when it is none, broken, or grows too large."""
    _check(data)
    try:
        document = docx.Document(io.BytesIO(data))
        parts = list(_parts(document))
        properties = document.core_properties
        title, updated = str(properties.title or ""), properties.modified
    except (
        PackageNotFoundError,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
        SyntaxError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
    ) as error:
        # The reader meets broken files with whatever breaks in it.
        raise DocumentRefused(f"the DOCX is broken: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
    text, blocks = _written(parts)
    first = next((block.title for block in blocks if block.kind == "heading"), "")
    return Parsed(text, blocks, " ".join(cleaned(title).split()) or first, updated=_aware(updated), media_type=DOCX)


def _check(data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
        raise DocumentRefused(f"the DOCX is broken: {error}") from error
    if len(files) > MOST_FILES or sum(each.file_size for each in files) > LARGEST:
        raise DocumentRefused(f"unpacked it is larger than {LARGEST // 1024 // 1024} MB, or has more than {MOST_FILES} files")
    if "word/document.xml" not in {each.filename for each in files}:
        raise DocumentRefused("it is a ZIP archive, but no DOCX: text, Markdown, HTML, PDF and DOCX can be read")


def _aware(told: datetime | None) -> datetime | None:
    return told.replace(tzinfo=UTC) if told and told.tzinfo is None else told


def _parts(document: Document) -> Iterator[tuple[Kind, int, str]]:
    for part in document.iter_inner_content():
        if isinstance(part, Table):
            yield "table", 0, "\n".join(_rows(part))
        else:
            yield _paragraph(part)


def _rows(table: Table) -> Iterator[str]:
    """The rows of a table as lines; cells that reach over several columns are there once."""
    for row in table._tbl.tr_lst:
        yield " | ".join(" ".join(_text(cell).split()) for cell in row.tc_lst)


def _text(element: Any) -> str:
    """All text below *element*, with its tabs and breaks."""
    pieces = []
    for each in element.iter():
        tag = str(each.tag).rpartition("}")[2]
        if tag == "t":
            pieces.append(each.text or "")
        elif tag in ("tab", "br", "cr", "p"):
            pieces.append("\n" if tag in ("br", "cr", "p") else " ")
    return "".join(pieces)


def _paragraph(paragraph: Paragraph) -> tuple[Kind, int, str]:
    text = cleaned(_text(paragraph._p)).strip()
    style = (paragraph.style.name if paragraph.style else "") or ""
    if heading := _HEADING.match(style):
        return "heading", int(heading[1]), " ".join(text.split())
    if style.lower() in ("title", "título"):
        return "heading", 1, " ".join(text.split())
    if _ITEM.search(style) or paragraph._p.find(".//w:numPr", paragraph._p.nsmap) is not None:
        return "list", 0, f"- {text}" if text else ""
    return "paragraph", 0, text


def _written(parts: list[tuple[Kind, int, str]]) -> tuple[str, tuple[Block, ...]]:
    pieces: list[str] = []
    blocks: list[Block] = []
    at = 0
    for kind, level, said in parts:
        text = cleaned(said)
        if not text.strip():
            continue
        last = blocks[-1] if blocks else None
        goes_on = last is not None and kind == last.kind == "list"
        piece = ("\n" if goes_on else "\n\n" if last else "") + text
        end = at + len(piece)
        start = blocks.pop().start if goes_on else end - len(text)
        blocks.append(Block(start, end, kind, level, text if kind == "heading" else ""))
        pieces.append(piece)
        at = end
    return "".join(pieces), tuple(blocks)
