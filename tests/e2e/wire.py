"""A TCP wire that tests can cut and hold."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Wire:
    """A TCP wire to *target* that can be cut, and that can be held after certain bytes have passed to the client.

    *held* is what it was held at, once that has happened; *broken* lets nobody through any more.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._hold_after: re.Pattern[bytes] | None = None
        self.held: re.Match[bytes] | None = None
        self.cuts = 0
        self.broken = False

    def hold_after(self, pattern: bytes) -> None:
        """Let nothing more pass a connection on which *pattern* (a regular expression) has passed; only once."""
        self._hold_after = re.compile(pattern)

    def cut(self) -> None:
        """Close all connections now."""
        self.cuts += 1
        for writer in list(self._writers):
            writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The base URL of the wire's near end."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.close()
            self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.broken:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer, watched=False), self._carry(far_reader, writer, watched=True))
        finally:
            self._writers -= {writer, far_writer}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, watched: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                found = self._hold_after.search(data) if watched and self._hold_after else None
                writer.write(data[: found.end()] if found else data)
                await writer.drain()
                if found:
                    self._hold_after, self.held = None, found
                    await writer.wait_closed()
        writer.close()
