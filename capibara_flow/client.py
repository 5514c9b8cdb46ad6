"""A client of the door's ``/api/rag`` for programs that are not asynchronous; it needs nothing but this package's base.

from capibara_flow.client import RAGClient

with RAGClient("http://127.0.0.1:5001") as rag:
    rag.ingest("handbook.pdf")
    for source in rag.search_semantic("How many days of leave are there?", n_results=5):
        print(source.n, source.title, source.url)
"""

import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote, urlencode, urlsplit

from pydantic import ValidationError

from capibara_flow.domain.flat import source_of, unflattened
from topics.grounding import DocumentFacts
from topics.knowledge import DEFAULT_COLLECTION
from topics.output import SourceShown

_RESUMES = 8
_BLOCK = 64 * 1024
_PAGE = 500
#: Seconds between signs of life of a stream; the server has one every 15 s.
_SILENCE = 60.0
_NONE: Mapping[str, str] = {}

#: Told how many bytes more of a file have been sent.
Progress = Callable[[int], None]


class RAGError(Exception):
    """What was asked was not done: *status* is the HTTP status (0: nobody answered), *retryable* whether asking again may help."""

    def __init__(self, words: str, *, status: int = 0, retryable: bool = False) -> None:
        super().__init__(words)
        self.status, self.retryable = status, retryable


@dataclass(frozen=True)
class Ingested:
    """What became of a document: *how* is ``created``, ``replaced``, ``unchanged``, or ``same`` as another one that was there already."""

    document: str
    how: str
    title: str
    passages: int
    turn: str


@dataclass(frozen=True)
class Searched:
    """What was found, the best first. Where it is not *related* enough to the question, a chat would go on without sources."""

    sources: list[SourceShown]
    related: bool


class RAGClient:
    """Searches, and brings and removes documents, at the door under *base_url*, as whoever holds *key*.

    With *enable_toon*, many sources are asked for in TOON, where the package ``toons`` is installed. *timeout* is in seconds, for a
    connection and for each answer; taking a document in may take longer. All methods raise ``RAGError``; one client serves several
    threads, as every request has a connection of its own.
    """

    def __init__(self, base_url: str, enable_toon: bool = True, key: str | None = None, timeout: float = 30.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise RAGError(f"{base_url!r} is no address of a door, such as http://127.0.0.1:5001")
        self.base_url = base_url.rstrip("/")
        self._secure, self._host, self._port, self._path = parts.scheme == "https", parts.hostname, parts.port, parts.path.rstrip("/")
        self._toons: Any = _toons() if enable_toon else None
        self._key, self._timeout = key, timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held between two requests; here for those who close what they opened."""

    def search_semantic(self, query: str, n_results: int = 10, *, collection: str = DEFAULT_COLLECTION) -> list[SourceShown]:
        """At most *n_results* sources for *query*, the best first, be they related or not."""
        return self.search(query, n_results, collection=collection).sources

    def search(self, query: str, n_results: int = 10, *, collection: str = DEFAULT_COLLECTION) -> Searched:
        """As ``search_semantic``, and whether a chat would rest on what was found."""
        accept = "application/toon, application/json;q=0.5" if self._toons else "application/json"
        body = json.dumps({"query": query, "collection": collection, "limit": n_results}).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
        with self._answer("POST", "/api/rag/search", body, headers) as response:
            flat = self._toons and response.headers.get_content_type() == "application/toon"
            text = response.read().decode()
        try:
            answer = self._toons.loads(text) if flat else json.loads(text)
            sources = [unflattened(each) if flat else source_of(each) for each in answer["sources"]]
            return Searched(sources, bool(answer.get("related", True)))
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise RAGError(f"{self.base_url} answered what is no list of sources: {error}") from error

    def ingest(
        self,
        path: str | os.PathLike[str],
        *,
        collection: str = DEFAULT_COLLECTION,
        title: str = "",
        address: str = "",
        name: str = "",
        progress: Progress | None = None,
    ) -> Ingested:
        """Bring the file at *path*, and return when it has been taken in; bringing it again does nothing twice.

        Its *address* is where it lies, unless another one is given; raises ``OSError`` when it cannot be read.
        """
        file = Path(path)
        said = {"collection": collection, "title": title, "address": address or str(file.resolve()), "name": name or file.name}
        with file.open("rb") as data:
            size = os.fstat(data.fileno()).st_size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size), "Accept": "text/event-stream"}
            reading = _Reading(data, size, progress or (lambda _: None))
            with self._answer("POST", f"/api/rag/documents?{urlencode(said)}", reading, headers, timeout=_SILENCE) as response:
                return self._followed(response)

    def documents(self, *, collection: str = DEFAULT_COLLECTION) -> list[DocumentFacts]:
        """All documents of *collection*, by id."""
        found: list[DocumentFacts] = []
        after: str | None = ""
        while after is not None:
            asked = {"collection": collection, "limit": _PAGE} | ({"after": after} if after else {})
            told = self._json("GET", f"/api/rag/documents?{urlencode(asked)}")
            found += [_facts(each) for each in told["documents"]]
            after = told["next"]
        return found

    def delete(self, id: str, *, collection: str = DEFAULT_COLLECTION) -> None:
        """Remove the document with this *id*; ``RAGError`` with status 404 says that there is none."""
        self._json("DELETE", f"/api/rag/documents/{quote(id, safe='')}?{urlencode({'collection': collection})}")

    # --- asking -------------------------------------------------------------------------------------------------------

    def _json(self, method: str, target: str) -> dict[str, Any]:
        with self._answer(method, target) as response:
            try:
                told: dict[str, Any] = json.loads(response.read())
            except ValueError as error:
                raise RAGError(f"{self.base_url} answered what is no JSON: is it a door of Capibara Flow?") from error
        return told

    @contextmanager
    def _answer(
        self,
        method: str,
        target: str,
        body: "bytes | _Reading | None" = None,
        headers: Mapping[str, str] = _NONE,
        *,
        timeout: float = 0,
    ) -> Iterator[HTTPResponse]:
        """A good answer to a request, for the length of a block."""
        connection = self._connection(timeout or self._timeout)
        own = dict(headers) | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            _send(connection, method, self._path + target, body, own)
            response = connection.getresponse()
            if response.status >= 300:
                raise _refusal(response, self.base_url)
            yield response
        except (HTTPException, TimeoutError, ConnectionError, ssl.SSLError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of a file, not of the connection
            raise RAGError(_unreachable(self.base_url, error), retryable=True) from error
        finally:
            connection.close()

    def _connection(self, timeout: float) -> HTTPConnection:
        return (HTTPSConnection if self._secure else HTTPConnection)(self._host, self._port, timeout=timeout)

    def _followed(self, response: HTTPResponse) -> Ingested:
        """What the events say to their end; a stream that breaks is taken up again."""
        turn, following = response.headers.get("X-Capibara-Turn", ""), _Following()
        if following.read(response):
            return following.result(turn)
        for failures in range(_RESUMES):
            time.sleep(0.1 * 2**failures)
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": following.last} if following.last else {})
            try:
                with self._answer("GET", f"/api/chat/{turn}/events", headers=headers, timeout=_SILENCE) as again:
                    if following.read(again):
                        return following.result(turn)
            except RAGError as error:
                if not error.retryable:
                    raise
        raise RAGError(f"the connection to {self.base_url} broke and could not be resumed: bring it again", retryable=True)


class _Following:
    """The events of a document that is being taken in (WHATWG HTML, section 9.2), over as many connections as it takes."""

    def __init__(self) -> None:
        self.last = ""
        self._told: dict[str, dict[str, Any]] = {}

    def read(self, response: HTTPResponse) -> bool:
        """Whether the last event came before the stream broke off."""
        event: dict[str, str] = {}
        try:
            while line := response.readline(1 << 20):
                name, _, value = line.decode().rstrip("\r\n").partition(":")
                if name:
                    event[name] = value.removeprefix(" ")
                elif event.get("data"):
                    self.last = event.get("id", self.last)
                    self._told[event.get("event", "")] = json.loads(event["data"])
                    if event.get("event") in {"done", "error"}:
                        return True
                if not line.strip():
                    event = {}
        except (HTTPException, OSError, ValueError):
            return False
        return False

    def result(self, turn: str) -> Ingested:
        """What became of the document; raises ``RAGError``."""
        if error := self._told.get("error"):
            raise RAGError(_words(error), status=int(error.get("status", 500)), retryable=bool(error.get("retryable")))
        if not (told := self._told.get("ingested")):
            raise RAGError("it was stopped before the document was in", status=409)
        return Ingested(told["document"], told["how"], told["title"], told["passages"], turn)


class _Reading:
    """A file that tells how it is read, and that is sent as it was when it was opened, should it grow meanwhile."""

    def __init__(self, data: BinaryIO, size: int, progress: Progress) -> None:
        self._data, self._left, self._progress = data, size, progress

    def __iter__(self) -> Iterator[bytes]:
        while self._left and (block := self._data.read(min(_BLOCK, self._left))):
            self._left -= len(block)
            yield block
            self._progress(len(block))
        if self._left:
            raise ConnectionError("the file became shorter while it was read")


def _send(connection: HTTPConnection, method: str, target: str, body: "bytes | _Reading | None", headers: Mapping[str, str]) -> None:
    """Send a request; a server that refuses a large body before its end has answered all the same."""
    connection.connect()
    try:
        connection.request(method, target, body, headers)
    except (BrokenPipeError, ConnectionResetError):
        if not isinstance(body, _Reading):
            raise


def _facts(told: Mapping[str, Any]) -> DocumentFacts:
    return DocumentFacts.model_validate({name: value for name, value in told.items() if name in DocumentFacts.model_fields})


def _refusal(response: HTTPResponse, base: str) -> RAGError:
    """Problem details (RFC 9457) as an error; else what little is known."""
    status = response.status
    try:
        details = json.loads(response.read())
        words, retryable = _words(details), bool(details.get("retryable", status >= 500 or status == 429))
    except (ValueError, KeyError, TypeError, AttributeError):
        words, retryable = f"{base} answered {status} {response.reason}", status >= 500
    return RAGError(f"{words} (give a key)" if status == 401 else words, status=status, retryable=retryable)


def _words(details: Mapping[str, Any]) -> str:
    words = f"{details['title']}: {details.get('detail', '')}"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def _unreachable(base: str, error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return f"nothing answers at {base}: start it with `capibara up`, or name another address"
    if isinstance(error, TimeoutError):
        return f"{base} did not answer in time"
    return f"{base} did not answer: {error or type(error).__name__}"


def _toons() -> Any:
    """The TOON codec, none where the extra is not installed."""
    try:
        import toons  # noqa: PLC0415  an extra: without it everything is JSON
    except ImportError:
        return None
    return toons
