"""Cutting a byte stream into frames: server-sent events (WHATWG HTML, section 9.2) and lines of JSON, at any split."""

MAX_FRAME_BYTES = 16 * 1024 * 1024


class FrameTooLong(ValueError):
    """An engine sent more than ``MAX_FRAME_BYTES`` without ending its frame."""


class SseDecoder:
    """Feed bytes, get the payloads of the ``data:`` fields; one payload an event, several lines joined by a newline.

    Line ends may be LF, CRLF or CR. Comments and the fields ``event``, ``id`` and ``retry`` are left out. A line that
    is none of all this (a proxy's bare ``proxy error: ...``), the first one, is kept in :attr:`stray` to explain a broken stream.
    """

    def __init__(self) -> None:
        self.stray = b""
        self._rest = b""
        self._skip_newline = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events completed by *chunk*; raises ``FrameTooLong``."""
        if self._skip_newline and chunk:
            self._skip_newline = False
            chunk = chunk.removeprefix(b"\n")
        if b"\r" in chunk:
            self._skip_newline = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        head, end, self._rest = (self._rest + chunk).rpartition(b"\n\n")
        if end:
            return self._events(head)
        if len(self._rest) > MAX_FRAME_BYTES:
            raise FrameTooLong(f"more than {MAX_FRAME_BYTES} bytes without the end of an event")
        return []

    def end(self) -> list[bytes]:
        """What stood in the buffer when the stream ended: some servers leave the last blank line out."""
        rest, self._rest = self._rest, b""
        return self._events(rest)

    def _events(self, head: bytes) -> list[bytes]:
        events = []
        for block in head.split(b"\n\n"):
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(block[6:])
            elif block and (data := self._data(block)) is not None:
                events.append(data)
        return events

    def _data(self, block: bytes) -> bytes | None:
        lines = []
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"data":
                lines.append(value.removeprefix(b" "))
            elif name not in (b"", b"event", b"id", b"retry"):
                self.stray = self.stray or line
        return b"\n".join(lines) if lines else None


class LineDecoder:
    """Feed bytes, get complete lines that are not blank: newline-delimited JSON."""

    def __init__(self) -> None:
        self.stray = b""
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines completed by *chunk*; raises ``FrameTooLong``."""
        head, end, self._rest = (self._rest + chunk).rpartition(b"\n")
        if end:
            return [line for line in head.split(b"\n") if line.strip()]
        if len(self._rest) > MAX_FRAME_BYTES:
            raise FrameTooLong(f"more than {MAX_FRAME_BYTES} bytes without the end of a line")
        return []

    def end(self) -> list[bytes]:
        """What stood in the buffer when the stream ended without a newline."""
        rest, self._rest = self._rest, b""
        return [rest] if rest.strip() else []
