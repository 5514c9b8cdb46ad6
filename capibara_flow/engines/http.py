"""HTTP to engines: statuses, silences and aiohttp's errors become ours here and nowhere else."""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import aiohttp
import orjson

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.reading import Reading
from capibara_flow.engines.requests import refuse_beyond
from capibara_flow.errors import BadRequest, CapibaraError, EngineBroke, EngineBusy, EngineRefusesUs, EngineUnreachable
from capibara_flow.ports import Abilities, Piece
from capibara_flow.telemetry import log
from topics.chat import ChatRequest

#: llama-server and uvicorn close idle connections after 5 s: ours must be given up before.
KEEPALIVE_SECONDS = 4.0
#: How long a finished answer may still keep us waiting for its token count, and its connection for the very end.
TAIL_SECONDS = 2.0
DRAIN_SECONDS = 0.25
MAX_ERROR_BYTES = 64 * 1024
_BUSY = (429, 503, 529)
_GONE = (408, 502, 504)
_REFUSED_KEY = (401, 403)
#: How loud a fault is, by what was asked.
_LEVELS = {"POST": logging.WARNING, "GET": logging.DEBUG}


class Reply:
    """An open streamed answer. One timer a stream watches for silence; time that the reader spends elsewhere is not counted."""

    def __init__(self, response: aiohttp.ClientResponse, since: float, limit: float, expert: str) -> None:
        self._expert = expert
        self._response = response
        self._content = response.content
        self._loop = asyncio.get_running_loop()
        self._since: float | None = since
        self._limit = limit
        self._silent = False
        self._timer = self._loop.call_at(since + limit, self._watch)

    async def read(self) -> bytes:
        """The next bytes as they come, ``b""`` at the end; raises ``EngineBroke`` on a lost connection or a silence."""
        if self._since is None:
            self._since = self._loop.time()
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            if self._silent:
                raise EngineBroke(f"the engine has been silent for {self._limit:g} s") from error
            log.warning("engine_broke_off", expert=self._expert, error=str(error) or type(error).__name__)
            raise EngineBroke(f"the connection to the server of {self._expert} broke in the middle of the answer") from error

    def heard(self, limit: float) -> None:
        """The engine is alive; from the next ``read`` on it may be silent for at most *limit* seconds."""
        self._since = None
        if limit != self._limit:
            self._limit = limit
            self._timer.cancel()
            self._timer = self._loop.call_later(limit, self._watch)

    async def drain(self) -> None:
        """Read to the end, so that the connection can serve the next request; gives up quietly and soon."""
        with contextlib.suppress(EngineBroke, TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while await self.read():
                    pass

    def close(self) -> None:
        """Drop the connection at once unless the answer has been read to its end: this is what stops an engine."""
        self._timer.cancel()
        self._response.close()

    def _watch(self) -> None:
        now = self._loop.time()
        since = now if self._since is None else self._since
        if now - since >= self._limit:
            self._silent = True
            self._response.close()
        else:
            self._timer = self._loop.call_at(since + self._limit, self._watch)


class Client:
    """HTTP to one engine; its session is made on first use, kept alive, and closed with ``aclose`` unless it was given.

    Errors reach clients, so they name the expert; where it is served, and what went wrong there, stands in the log.
    """

    def __init__(self, expert: Expert, session: aiohttp.ClientSession | None = None) -> None:
        self._expert = expert.name
        self._timeouts = expert.timeouts
        self._limit = expert.concurrency + 8
        # An engine's proxy that compresses would hold tokens back until its block is full.
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if expert.api_key:
            self._headers["Authorization"] = f"Bearer {expert.api_key}"
        self._session = session
        self._own = session is None

    async def post(self, url: str, body: dict[str, Any]) -> Reply:
        """Send *body*; returns once the engine has accepted it, raises what ``refusal`` says otherwise."""
        try:
            raw = orjson.dumps(body)
        except TypeError as error:
            raise BadRequest(f"the request cannot be written as JSON: {error}") from error
        since = asyncio.get_running_loop().time()
        limit = self._timeouts.first_token_seconds
        try:
            async with asyncio.timeout(limit):
                response = await self._send(url, raw)
        except TimeoutError as error:
            raise EngineBroke(f"the engine has been silent for {limit:g} s") from error
        if response.status == 200:
            return Reply(response, since, limit, self._expert)
        raise await self._refusal(response)

    async def check(self, url: str) -> None:
        """Return if a GET of *url* succeeds; raises ``EngineBusy`` or ``EngineUnreachable``.

        What goes wrong is logged for debugging only: an engine that is down is looked at again and again.
        """
        limit = self._timeouts.connect_seconds
        try:
            async with asyncio.timeout(2 * limit):
                response = await self._ask("GET", url, None)
        except TimeoutError as error:
            raise self._unreachable("GET", url, f"did not tell its health within {2 * limit:g} s", error) from error
        if response.status == 200:
            response.close()
            return
        refusal = await self._refusal(response)
        raise refusal if isinstance(refusal, EngineBusy | EngineUnreachable) else EngineUnreachable(str(refusal))

    async def aclose(self) -> None:
        """Close the connections, unless the session belongs to somebody else."""
        if self._own and self._session is not None:
            await self._session.close()
            self._session = None

    async def _send(self, url: str, body: bytes) -> aiohttp.ClientResponse:
        try:
            return await self._ask("POST", url, body)
        except _StaleConnection:
            return await self._ask("POST", url, body)

    async def _ask(self, method: str, url: str, body: bytes | None) -> aiohttp.ClientResponse:
        session = self._open()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_seconds)
        try:
            return await session.request(method, url, data=body, headers=self._headers, timeout=timeout, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self._unreachable(method, url, "cannot be connected to", error) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise self._unreachable(method, url, "closed the connection before it answered", error, _StaleConnection) from error
        except aiohttp.ClientError as error:
            raise self._unreachable(method, url, "does not speak HTTP as expected", error) from error

    def _unreachable(
        self, method: str, url: str, what: str, error: Exception, kind: type[EngineUnreachable] = EngineUnreachable
    ) -> EngineUnreachable:
        log.log(_LEVELS[method], "engine_unreachable", expert=self._expert, url=url, error=str(error) or type(error).__name__)
        return kind(f"the server of {self._expert} {what}")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._limit, keepalive_timeout=KEEPALIVE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    async def _refusal(self, response: aiohttp.ClientResponse) -> CapibaraError:
        try:
            async with asyncio.timeout(self._timeouts.connect_seconds):
                body = await response.content.read(MAX_ERROR_BYTES)
        except (aiohttp.ClientError, OSError):
            body = b""
        finally:
            response.close()
        facts = {"expert": self._expert, "url": str(response.url), "status": response.status, "said": error_text(body)}
        log.log(_LEVELS[response.method], "engine_refused", **facts)
        return refusal(response.status, body, self._expert)


class _StaleConnection(EngineUnreachable):
    """The connection ended before an answer began: perhaps it was an idle one that the engine had just given up."""


def refusal(status: int, body: bytes, expert: str) -> CapibaraError:
    """Our error for an HTTP *status* other than 200, with the engine's own words where they concern the client."""
    said = error_text(body)
    if status in _BUSY:
        return EngineBusy(f"the server of {expert} is busy ({status}): {said}")
    if status in _GONE or status < 400:
        # A proxy's words: they tell of addresses behind it.
        return EngineUnreachable(f"the server of {expert} cannot be reached behind its proxy ({status})")
    if status in _REFUSED_KEY:
        return EngineRefusesUs(f"the server of {expert} refuses our key ({status})")
    if status < 500 or status == 501 or "not supported" in said:
        return BadRequest(f"the server of {expert} refused the request ({status}): {said}")
    return EngineBroke(f"the server of {expert} failed ({status}): {said}")


def error_text(body: bytes) -> str:
    """The engine's words in an error *body*: OpenAI's, Ollama's or FastAPI's form, otherwise its beginning."""
    try:
        parsed = orjson.loads(body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        return body[:300].decode("utf-8", "replace").strip() or "no reason given"
    return said_in(parsed.get("error") or parsed.get("message") or parsed.get("detail") or parsed)


def said_in(error: object) -> str:
    """The message in an ``error`` value, which is an object with a message, a text, or something else."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return str(error)[:1000]


class HttpChat(ABC):
    """A ``ports.ChatEngine`` over streaming HTTP; dialects add the address, the body, and how to read the answer."""

    health_path: ClassVar[str] = "/health"

    def __init__(self, expert: Expert, url: str, *, session: aiohttp.ClientSession | None = None) -> None:
        self.expert = expert
        self.base = url.rstrip("/")
        self._client = Client(expert, session)

    @property
    @abstractmethod
    def abilities(self) -> Abilities:
        """What this expert can do in this dialect."""

    @property
    @abstractmethod
    def chat_url(self) -> str:
        """Where requests are posted."""

    @property
    def health_url(self) -> str:
        """What answers 200 when the engine is ready."""
        return self.base.removesuffix("/v1") + self.health_path

    @abstractmethod
    def body(self, request: ChatRequest) -> dict[str, Any]:
        """The request in the dialect; raises ``BadRequest`` for what it cannot express."""

    @abstractmethod
    def reading(self) -> Reading:
        """How an answer is read."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """The answer's pieces; errors and closing as ``ports.ChatEngine`` says."""
        refuse_beyond(self.abilities, request, self.expert.name)
        reply = await self._client.post(self.chat_url, self.body(request))
        reading = self.reading()
        try:
            while not reading.over and (chunk := await _read(reply, reading)):
                if frames := reading.frames(chunk):
                    pieces = reading.pieces(frames)
                    reply.heard(self._patience(reading))
                    for piece in pieces:
                        yield piece
            for piece in reading.end():
                yield piece
            await reply.drain()
        finally:
            reply.close()

    async def health(self) -> None:
        """Return when the engine can answer; raises ``EngineUnreachable`` or ``EngineBusy``."""
        await self._client.check(self.health_url)

    async def aclose(self) -> None:
        """Close the connections to the engine."""
        await self._client.aclose()

    def _patience(self, reading: Reading) -> float:
        timeouts = self.expert.timeouts
        if reading.finish:
            return min(TAIL_SECONDS, timeouts.between_tokens_seconds)
        return timeouts.between_tokens_seconds if reading.spoke else timeouts.first_token_seconds


async def _read(reply: Reply, reading: Reading) -> bytes:
    try:
        return await reply.read()
    except EngineBroke:
        # The finish reason was the end of the answer; only its token count is missing.
        if reading.finish is None:
            raise
        return b""
