"""Bytes become text: by a byte order mark, by what is declared, as UTF-8, or by what the bytes look like."""

import codecs
import re

from charset_normalizer import from_bytes

from capibara_flow.domain.parsed import cleaned
from capibara_flow.errors import DocumentRefused

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([a-zA-Z0-9_:.\-]{2,40})")
_STRAY = "capibara-stray-byte"

#: Of a text, at most this share are bytes that UTF-8 does not know, when it is UTF-8 or a Latin one; and controls, when it is text at all.
_STRAYS, _CONTROLS = 0.25, 0.01
_SAMPLE = 256 * 1024
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    """A byte that is no UTF-8, as Windows-1252 has it (as the Web reads Latin-1)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error(_STRAY, _as_windows)


def decoded(data: bytes, declared: str | None = None, *, meta: bool = False) -> str:
    """*data* as clean text; *declared* is its media type with a charset perhaps, *meta*: HTML names one in its head.

    Raises ``DocumentRefused`` for what is no text in any encoding that can be told.
    """
    text = _decoded(data, _declared(data, declared, meta))
    sample = text[:_SAMPLE]
    if sum(1 for _ in _CONTROL.finditer(sample)) > _CONTROLS * len(sample):
        raise DocumentRefused("it is binary, not a text: text, Markdown, HTML, PDF and DOCX can be read")
    return cleaned(text)


def _declared(data: bytes, declared: str | None, meta: bool) -> str | None:
    named = _CHARSET.search((declared or "").encode()) or (_CHARSET.search(data[:4096]) if meta else None)
    try:
        return codecs.lookup(named[1].decode()).name if named else None
    except LookupError:
        return None


def _decoded(data: bytes, declared: str | None) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    if (wide := _wide(data)) or (declared and declared not in ("utf-8", "ascii") and _is_text(declared)):
        return data.decode(wide or declared or "", errors="replace")
    return _guessed(data)


def _is_text(encoding: str) -> bool:
    """Whether *encoding* is one of characters: Python has others, such as ``zlib`` and ``base64``."""
    try:
        return isinstance("a".encode(encoding), bytes)
    except (LookupError, UnicodeError):
        return False


def _wide(data: bytes) -> str | None:
    """UTF-16 without a mark: every other byte of a European text is zero."""
    sample = data[:4096]
    odd, even = sample[1::2].count(0), sample[::2].count(0)
    if max(odd, even) * 4 < len(sample):
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _guessed(data: bytes) -> str:
    text = data.decode("utf-8", errors=_STRAY)
    sample = data[:_SAMPLE]
    letters = sum(1 for _ in re.finditer(rb"[A-Za-z\x80-\xff]", sample)) or 1
    strays = sum(1 for each in sample.decode("utf-8", errors="surrogateescape") if "\udc80" <= each <= "\udcff")
    if strays <= _STRAYS * letters:
        return text
    best = from_bytes(sample).best()
    if best is None:
        raise DocumentRefused("its encoding cannot be told: save it as UTF-8")
    return data.decode(best.encoding, errors="replace")
