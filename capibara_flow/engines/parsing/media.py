"""Which format a file has: told by its first bytes, then by its declared media type, then by its name."""

from pathlib import PurePath

from capibara_flow.errors import DocumentRefused

TEXT, MARKDOWN, HTML, PDF = "text/plain", "text/markdown", "text/html", "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"

_SUFFIXES = {
    ".txt": TEXT, ".text": TEXT, ".log": TEXT, ".rst": TEXT, ".csv": TEXT, ".tsv": TEXT,
    ".md": MARKDOWN, ".markdown": MARKDOWN, ".mdown": MARKDOWN, ".mkd": MARKDOWN,
    ".html": HTML, ".htm": HTML, ".xhtml": HTML, ".pdf": PDF, ".docx": DOCX,
}  # fmt: skip
_DECLARED = {TEXT: TEXT, MARKDOWN: MARKDOWN, "text/x-markdown": MARKDOWN, HTML: HTML, "application/xhtml+xml": HTML, PDF: PDF, DOCX: DOCX}

#: What some files begin with that we have no parser for.
_OTHERS = {
    b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image", b"RIFF": "sound or video", b"\x7fELF": "a program",
    b"MZ\x90": "a program", b"\x1f\x8b": "compressed by gzip", b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz",
    b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"\x28\xb5\x2f\xfd": "compressed by Zstandard", b"OggS": "sound or video",
    b"ID3": "sound", b"SQLite format 3": "a database", b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document (.doc, .xls, .ppt), or an encrypted one",
}  # fmt: skip
_SUPPORTED = "text, Markdown, HTML, PDF and DOCX can be read"

#: How far into a file its first sign of being a PDF may stand (as the readers of PDF allow).
_PDF_WITHIN = 1024


def media_of(data: bytes, name: str = "", declared: str | None = None) -> str:
    """The media type of a file with the content *data*; raises ``DocumentRefused`` for formats that nobody here can read."""
    if b"%PDF-" in data[:_PDF_WITHIN]:
        return PDF
    if data.startswith(b"PK\x03\x04"):
        return _zipped(name, declared)
    for first, what in _OTHERS.items():
        if data.startswith(first):
            raise DocumentRefused(f"it is {what}: {_SUPPORTED}")
    asked = _DECLARED.get((declared or "").partition(";")[0].strip().lower())
    suffix = _SUFFIXES.get(PurePath(name).suffix.lower())
    media = suffix if asked in (None, TEXT) and suffix else asked
    if media in (PDF, DOCX):
        raise DocumentRefused(f"it is called {media.rpartition('/')[2].rpartition('.')[2]}, but its content is not: is the file broken?")
    return media or _guessed(data)


def _zipped(name: str, declared: str | None) -> str:
    suffix = PurePath(name).suffix.lower()
    if suffix in ("", ".docx") or DOCX in (declared or ""):
        return DOCX
    raise DocumentRefused(f"it is a ZIP archive: {_SUPPORTED}; unpack it first")


def _guessed(data: bytes) -> str:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return HTML if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) else TEXT
