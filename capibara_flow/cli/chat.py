"""``capibara chat``: a client of the native stream that survives broken connections."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from rich.console import Console
from rich.text import Text

from capibara_flow.cli.dead import line
from capibara_flow.errors import CapibaraError

RESUMES = 8
CANCEL_SECONDS = 3.0
FINALS = ("done", "error")
HELP = "/new starts over, /model NAME chooses who answers (/model alone: the router), /exit leaves; Ctrl-C stops an answer"


class ChatFailed(CapibaraError):
    """The question got no answer; the message says why."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of the stream; *id* is empty unless the server sent one with it."""

    name: str
    data: dict[str, Any]
    id: str = ""


class EventReader:
    """Bytes of a ``text/event-stream`` (WHATWG HTML, section 9.2) in, events out; chunks may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, list[str]] = {}

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that *chunk* completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r").decode()))]

    def _line(self, line: str) -> ServerEvent | None:
        if line:
            name, _, value = line.partition(":")
            self._fields.setdefault(name, []).append(value.removeprefix(" "))
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        return ServerEvent(fields.get("event", ["message"])[-1], json.loads("\n".join(fields["data"])), fields.get("id", [""])[-1])


@dataclass
class Turn:
    """One question on its way: follows its answer over broken connections.

    An event without an id is held until one that has an id came behind it: what a resume repeats was then never shown. An id is a word
    that only the server understands.
    """

    session: aiohttp.ClientSession
    base: str
    id: str | None = None
    _last: str = ""
    _held: list[ServerEvent] = field(default_factory=list)

    async def events(self, body: dict[str, Any]) -> AsyncIterator[ServerEvent]:
        """Ask, and yield each event once to the final one; raises ``ChatFailed``."""
        failures, reach = 0, self.session.post(f"{self.base}/api/chat", json=body)
        while True:
            seen = self._last
            try:
                async for event in self._read(await reach):
                    yield event
                    if event.name in FINALS:
                        return
            except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError, json.JSONDecodeError) as error:
                if self.id is None:
                    raise ChatFailed(unreachable(self.base, error)) from error
            failures = 1 if self._last != seen else failures + 1
            if self.id is None or failures > RESUMES:
                raise ChatFailed(f"the connection to {self.base} broke and could not be resumed")
            await asyncio.sleep(0.1 * 2 ** (failures - 1))
            self._held.clear()
            headers = {"Last-Event-ID": self._last} if self._last else {}
            reach = self.session.get(f"{self.base}/api/chat/{self.id}/events", headers=headers)

    async def _read(self, response: aiohttp.ClientResponse) -> AsyncIterator[ServerEvent]:
        async with response:
            if response.status >= 500 and self.id is not None:
                return
            if response.status >= 400:
                raise ChatFailed(await problem(response))
            self.id = response.headers.get("X-Capibara-Turn", self.id)
            reader = EventReader()
            async for chunk in response.content.iter_any():
                for event in reader.feed(chunk):
                    self.id = event.data.get("turn", self.id)
                    self._held.append(event)
                    if not event.id and event.name not in FINALS:
                        continue
                    self._last = event.id or self._last
                    held, self._held = self._held, []
                    for each in held:
                        yield each

    async def cancel(self) -> None:
        """Ask the server to stop the turn; a server that does not answer is left alone."""
        if self.id is not None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                timeout = aiohttp.ClientTimeout(total=CANCEL_SECONDS)
                async with self.session.delete(f"{self.base}/api/chat/{self.id}", timeout=timeout):
                    pass


def unreachable(base: str, error: Exception) -> str:
    """Why *base* could not be asked, and what to do."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"nothing answers at {base}: start it with `capibara up`, or name another with --url or CAPIBARA_URL"
    return f"{base} did not answer as a chat server: {error or type(error).__name__}"


async def problem(response: aiohttp.ClientResponse) -> str:
    """A refusal in words; problem details (RFC 9457) where the server sent them."""
    try:
        details = json.loads(await response.read())
        words = f"{details['title']}: {details.get('detail', '')}"
    except (ValueError, KeyError, TypeError):
        words = f"{response.url} answered {response.status} {response.reason}"
    return f"{words} (give a key with --key or CAPIBARA_KEY)" if response.status == 401 else words


class Screen:
    """Where an answer appears: its text on standard output, all else dimmed on standard error."""

    def __init__(self, console: Console, write: Callable[[str], object]) -> None:
        self.text = ""
        self._console = console
        self._write = write
        self._reasoned = False
        self._sources: list[dict[str, Any]] = []
        self._cited: dict[str, Any] = {}

    def note(self, words: str, end: str = "\n") -> None:
        """Say something about the answer."""
        self._console.print(Text(words, style="dim"), end=end, soft_wrap=True)

    def show(self, event: ServerEvent) -> None:
        """Show *event*; raises ``ChatFailed`` for an error. Unknown ones are none of our business."""
        data = event.data
        match event.name:
            case "routed":
                self.note(f"→ {data.get('model_id')} · {data.get('route_name')}")
            case "token":
                self._token(data.get("text") or "", data.get("reasoning") or "")
            case "tool" if data.get("name"):
                self.note(f"⚙ wants {data['name']} called")
            case "queued":
                eta = f", about {data['eta_s']:g} s" if data.get("eta_s") else ""
                self.note(f"in line at {data.get('expert')}: place {data.get('position')}{eta}")
            case "sources":
                self._sources = data.get("sources") or []
                if data.get("problem"):
                    self.note(line(f"without sources: {data['problem']}"))
            case "citations":
                self._cited = data
            case "waiting":
                self.note(f"waiting: {data.get('reason')}")
            case "reset":
                self.end()
                self.note(f"the answer starts again: {data.get('reason')}")
                self.text = ""
            case "done":
                self.end()
                self._cite()
                if data.get("finish_reason") not in ("stop", "tool_calls"):
                    self.note(f"(ended by: {data.get('finish_reason')})")
            case "error":
                self.end()
                raise ChatFailed(f"{data.get('title')}: {data.get('detail')}")

    def _token(self, text: str, reasoning: str) -> None:
        if reasoning:
            self.note(reasoning, end="")
            self._reasoned = True
        if text:
            if self._reasoned:
                self.note("")
                self._reasoned = False
            self.text += text
            self._write(text)

    def _cite(self) -> None:
        """The sources that the answer cites, and the numbers that it made up."""
        for each in self._sources:
            if each.get("n") in self._cited.get("cited", ()):
                where = [part for part in (each.get("title"), each.get("url"), each.get("date")) if part]
                self.note(line(f"[{each['n']}] {' · '.join(where)}"))
        for number in self._cited.get("unknown", ()):
            self.note(f"[{number}] is none of the sources")

    def end(self) -> None:
        """End the line of an answer."""
        if self.text and not self.text.endswith("\n"):
            self._write("\n")


@dataclass
class Conversation:
    """What was said so far, and whom it is said to."""

    base: str
    model: str | None = None
    key: str | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Ask and show the answer, which is remembered only when complete.

        Raises ``ChatFailed``; ``KeyboardInterrupt`` and ``BrokenPipeError`` once the turn is cancelled.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        screen = Screen(self.console, _write)
        asyncio.run(self._ask({"messages": asked} | ({"model": self.model} if self.model else {}), screen))
        self.messages = [*asked, {"role": "assistant", "content": screen.text}]

    async def _ask(self, body: dict[str, Any], screen: Screen) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # A turn may think for long, but the server sends a heartbeat every 15 s.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            turn = Turn(session, self.base.rstrip("/"))
            try:
                async for event in turn.events(body):
                    screen.show(event)
            except asyncio.CancelledError:
                screen.end()
                await turn.cancel()
                raise
            except BrokenPipeError:
                # Nobody reads what we write (`| head`): there is no use in more of it.
                await turn.cancel()
                raise

    def talk(self) -> None:
        """Ask what the person types, until they leave."""
        self.console.print(Text(HELP, style="dim"))
        while True:
            try:
                line = input("› ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/exit":
                return
            if line:
                self._obey(line)

    def _obey(self, line: str) -> None:
        if line == "/new":
            self.messages = []
        elif line == "/model" or line.startswith("/model "):
            self.model = line.removeprefix("/model").strip() or None
        elif line.startswith("/"):
            self.console.print(Text(HELP, style="dim"))
        else:
            try:
                self.ask(line)
            except KeyboardInterrupt:
                self.console.print(Text("(stopped)", style="dim"))
            except ChatFailed as error:
                self.console.print(Text(str(error), style="red"))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
