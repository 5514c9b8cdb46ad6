"""Documents as requests bring them: several files of a form, one bare body, or a text inside JSON; never held in memory as a whole."""

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import content_disposition_filename, parse_content_disposition
from pydantic import TypeAdapter, ValidationError

from capibara_flow.edge.bodies import DocumentBody
from capibara_flow.edge.door import Door
from capibara_flow.errors import BadRequest
from topics.knowledge import DEFAULT_COLLECTION, Collection

_CHUNK = 64 * 1024
_MOST_FILES = 100
_LONGEST_NAME = 200
#: What a client says that does not know what it sends.
_MEANINGLESS = {"application/octet-stream", "application/x-www-form-urlencoded"}
_PLAIN, _CODINGS = {"binary", "7bit", "8bit", "identity"}, ("Content-Encoding", "Content-Transfer-Encoding")
_COLLECTION: TypeAdapter[str] = TypeAdapter(Collection)


@dataclass
class Upload:
    """One document on its way in: what is said of it, and its bytes; *size* tells how many of these have come."""

    name: str
    data: AsyncIterable[bytes]
    media_type: str = ""
    title: str = ""
    address: str = ""
    size: int = 0

    async def bytes(self) -> AsyncGenerator[bytes, None]:
        """The document; raises ``BadRequest`` when it breaks off."""
        async for chunk in _readable(self.data):
            self.size += len(chunk)
            yield chunk


def collection(request: web.Request) -> str:
    """The part of the asker's knowledge that the query names; raises ``BadRequest``."""
    return checked_collection(request.query.get("collection", DEFAULT_COLLECTION))


def checked_collection(given: str) -> str:
    """*given*, if it can be the name of a collection; raises ``BadRequest``."""
    try:
        return _COLLECTION.validate_python(given)
    except ValidationError as error:
        raise BadRequest("collection: must be 1 to 64 letters, digits, dots, hyphens or underscores") from error


async def uploads(request: web.Request, door: Door) -> AsyncIterator[Upload]:
    """The documents of *request*, each to be read before the next one; raises ``BadRequest``."""
    kind = request.content_type
    if kind.startswith("multipart/"):
        async for each in _of_form(request):
            yield each
    elif kind == "application/json":
        yield _of_json(await door.read(request, DocumentBody), request)
    else:
        yield _of_body(request)


async def _of_form(request: web.Request) -> AsyncIterator[Upload]:
    files = 0
    async for part in _readable(await _form(request)):
        if isinstance(part, MultipartReader):
            raise BadRequest("a form inside a form cannot be read: send each file as a part of its own")
        if part.filename is None:
            raise BadRequest(f"the part {clean(part.name or '', 60)!r} is no file: collection, title and address belong in the query")
        if not part.filename:
            raise BadRequest("no file was chosen")
        if any(part.headers.get(name, "binary").lower() not in _PLAIN for name in _CODINGS):
            raise BadRequest("send the parts of a form as they are: neither packed nor in base64")
        files += 1
        if files > _MOST_FILES:
            raise BadRequest(f"more than {_MOST_FILES} files at once: send the rest in another request")
        (title, address), kind = _said(request), media_type(part.headers.get("Content-Type", ""))
        yield Upload(file_name(part.filename) or "document", _chunks(part), kind, title, address)
    if not files:
        raise BadRequest("there is no file in the form")


async def _form(request: web.Request) -> MultipartReader:
    try:
        return await request.multipart()
    except ValueError as error:
        raise BadRequest(f"the form cannot be read: {error}") from error


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(_CHUNK):
        yield chunk


async def _readable(pieces: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """*pieces* of a body; raises ``BadRequest`` when they cannot be read."""
    try:
        async for piece in pieces:
            yield piece
    except (ValueError, RuntimeError, web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest("the body cannot be read: it ends too early, or is not what its headers say") from error


def _of_body(request: web.Request) -> Upload:
    title, address = _said(request)
    name = file_name(request.query.get("name") or _disposed(request) or _last(address))
    if not name:
        raise BadRequest("a document needs a name: ?name=report.pdf, or send it as a file of a form (multipart/form-data)")
    given = request.headers.get("Content-Type", "")
    return Upload(name, request.content.iter_chunked(_CHUNK), media_type(given), title, address)


def _disposed(request: web.Request) -> str:
    """The name in the header ``Content-Disposition`` (RFC 6266)."""
    _, parameters = parse_content_disposition(request.headers.get("Content-Disposition"))
    return content_disposition_filename(parameters) or ""


def _of_json(body: DocumentBody, request: web.Request) -> Upload:
    data = body.text.encode()
    title, address = _said(request)
    title, address = clean(body.title or title, 1024), clean(body.address or address, 4096)
    # Without a name the text itself is one, so that the same text again is the same document.
    name = file_name(body.name or _last(address) or title) or f"text-{hashlib.sha256(data).hexdigest()[:16]}"

    async def whole() -> AsyncIterator[bytes]:
        yield data

    return Upload(name, whole(), "" if body.name else "text/plain", title, address)


def _said(request: web.Request) -> tuple[str, str]:
    """Title and address, as the query tells them of every document of *request*."""
    return clean(request.query.get("title", ""), 1024), clean(request.query.get("address", ""), 4096)


def _last(address: str) -> str:
    """The last part of the path of *address*, or its host."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc


def media_type(given: str) -> str:
    """The media type in a ``Content-Type``, with its character set if there is one; empty when it means nothing."""
    kind = clean(given, 255)
    return "" if kind.partition(";")[0].strip().lower() in _MEANINGLESS else kind


def file_name(given: str) -> str:
    """*given* as a mere name: a relative path without ways up, control characters or blanks around, whose end is kept if it is long."""
    parts = [part for each in re.split(r"[/\\]+", given) if (part := clean(each, 4096)) not in {"", ".", ".."}]
    return "/".join(parts)[-_LONGEST_NAME:].lstrip("/ ")


def clean(text: str, most: int) -> str:
    """At most *most* characters of *text*, in one line and without what a terminal or a log would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:most]
