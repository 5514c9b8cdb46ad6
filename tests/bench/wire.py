"""What mock engine and load generator agree on: how a request says its pace, and how a token proves itself.

The pace stands in the text of the user's message, because that survives every proxy; the number of tokens is ``max_tokens``.
A token is ``<index>:<CLOCK_MONOTONIC in ns when the engine sent it> ``, the first one also carries the id of its request. So a client on
the same machine sees each token's way through the system, and a token lost, doubled, moved or led to somebody else is noticed.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import orjson

_PACE = re.compile(r"bench gap_ms=([\d.]+)( in step)? id=([\w-]+)(?: tokens=(\d+))?( in paragraphs)?")
#: Words in a paragraph, where an answer has some.
_PARAGRAPH = 60


@dataclass(frozen=True)
class Ask:
    """One request: *tokens* tokens, *gap_ms* milliseconds apart (0: as fast as can be).

    *in_step* with all others, as an engine with continuous batching makes them: one token for everybody at each step. *paragraphs* are
    for who looks at the answer: a blank line takes the place of a space now and then.
    """

    ident: str
    tokens: int
    gap_ms: float = 0
    stream: bool = True
    usage: bool = True
    in_step: bool = False
    paragraphs: bool = False

    @property
    def question(self) -> str:
        """The text that asks for it, of somebody who cannot say ``max_tokens``."""
        return f"{self._pace} tokens={self.tokens}{' in paragraphs' if self.paragraphs else ''}"

    @property
    def _pace(self) -> str:
        return f"bench gap_ms={self.gap_ms:g}{' in step' if self.in_step else ''} id={self.ident}"

    def body(self, model: str) -> bytes:
        """The JSON body in OpenAI's chat dialect."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": self._pace}],
            "max_tokens": self.tokens,
            "stream": self.stream,
        }
        if self.stream and self.usage:
            body["stream_options"] = {"include_usage": True}
        return orjson.dumps(body)

    @classmethod
    def read(cls, body: bytes) -> "Ask":
        """Parse a request body; raises ``ValueError`` when it is not a chat request. Whatever names no pace is answered at once."""
        try:
            raw = orjson.loads(body)
            pace = _PACE.search(_text(raw["messages"][-1]["content"]))
            return cls(
                ident=pace[3] if pace else "anybody",
                tokens=int(raw.get("max_tokens") or raw.get("max_completion_tokens") or (pace and pace[4]) or 16),
                gap_ms=float(pace[1]) if pace else 0,
                stream=bool(raw.get("stream")),
                in_step=bool(pace and pace[2]),
                paragraphs=bool(pace and pace[5]),
                usage=bool((raw.get("stream_options") or {}).get("include_usage")),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat request: {error!r}") from error


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def token(index: int, ident: str) -> str:
    """The text of token *index*, sent now."""
    return f"{index}:{time.monotonic_ns()}:{ident} " if index == 0 else f"{index}:{time.monotonic_ns()} "


def in_paragraphs(text: str, index: int) -> str:
    """*text* of token *index*, as it stands in an answer of paragraphs: a blank line behind the last word of each, JSON-escaped."""
    return text if (index + 1) % _PARAGRAPH else text[:-1] + r"\n\n"


def chunk(data: bytes) -> bytes:
    """*data* as one chunk of an HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Transcript:
    """What one client was told, in whatever pieces; knows at any time what is wrong with it."""

    ask: Ask
    count: int = 0
    errors: list[str] = field(default_factory=list)
    delays_ns: list[int] = field(default_factory=list)
    finish: str | None = None
    usage: int | None = None
    done: bool = False
    _rest: str = ""

    def feed(self, text: str, at: int) -> None:
        """Take *text* that arrived at *at* (CLOCK_MONOTONIC, ns)."""
        *words, self._rest = (self._rest + text).split(" ")
        for word in words:
            self._take(word, at)

    def _take(self, word: str, at: int) -> None:
        index, _, rest = word.partition(":")
        sent, _, ident = rest.partition(":")
        if index != str(self.count):
            self.complain(f"token {word!r} where {self.count} was due")
        elif self.count == 0 and ident != self.ask.ident:
            self.complain(f"the answer is somebody else's: {ident!r}")
        if index.isdigit() and sent.isdigit():
            self.count = int(index) + 1
            self.delays_ns.append(at - int(sent))

    def complain(self, what: str) -> None:
        """Note an error."""
        self.errors.append(f"{self.ask.ident}: {what}")

    def back_to(self, count: int) -> None:
        """Forget what came behind the first *count* tokens: it will be told again."""
        self.count, self._rest = count, ""
        del self.delays_ns[count:]

    def close(self) -> None:
        """The answer is over: complain about what is missing."""
        if self._rest:
            self.complain(f"it ends with half a token: {self._rest!r}")
        if len(self.delays_ns) != self.ask.tokens:
            self.complain(f"{len(self.delays_ns)} tokens of {self.ask.tokens}")
        if self.finish is None:
            self.complain("no finish_reason")
        if self.ask.stream and not self.done:
            self.complain("no [DONE]")
        if (self.ask.usage or not self.ask.stream) and self.usage != self.ask.tokens:
            self.complain(f"usage says {self.usage} tokens, not {self.ask.tokens}")
