"""Writing server-sent events: everything that is there goes out in one write, and a dead or stalled client is let go."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from capibara_flow.ports import Batch
from capibara_flow.telemetry import OPEN_STREAMS
from topics.output import event_of

#: Turns one batch into the bytes of its events; the batch's sequence becomes the ``id:`` of its last event.
Encode = Callable[[Batch], bytes]

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_STALLED_SECONDS = 60.0


def native(batch: Batch) -> bytes:
    """Events of the native stream: the stored lines themselves, under their names."""
    events = [f"event: {event_of(line)}\ndata: ".encode() + line + b"\n\n" for line in batch.lines]
    events[-1] = b"id: %d\n%s" % (batch.sequence, events[-1])
    return b"".join(events)


@asynccontextmanager
async def opened(request: web.Request, headers: dict[str, str], heartbeat: float) -> AsyncIterator["Stream"]:
    """A prepared event stream with its heartbeat, for the length of a block."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    await response.prepare(request)
    stream = Stream(request, response)
    beat = asyncio.create_task(stream.beat(heartbeat))
    with OPEN_STREAMS.track_inprogress():
        try:
            yield stream
        finally:
            beat.cancel()


class Stream:
    """One client's open event stream."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self.response = response
        self._request = request
        self._writing_since: float | None = None

    async def write(self, data: bytes) -> None:
        """Send *data*; waits while the client's buffer is full."""
        self._writing_since = asyncio.get_running_loop().time()
        await self.response.write(data)
        self._writing_since = None

    async def copy(self, batches: AsyncIterator[Sequence[Batch]], encode: Encode) -> bool:
        """Write everything to the final batch; whether it came."""
        async for arrived in batches:
            await self.write(b"".join(map(encode, arrived)))
            if arrived[-1].final:
                return True
        return False

    async def beat(self, seconds: float) -> None:
        """A comment now and then keeps proxies from closing; a client that takes nothing for long is cut off, and may resume."""
        while True:
            await asyncio.sleep(seconds)
            if self._writing_since is None:
                await self.response.write(b": heartbeat\n\n")
            elif asyncio.get_running_loop().time() - self._writing_since > _STALLED_SECONDS and self._request.transport:
                self._request.transport.abort()
