"""Writing server-sent events: everything that is there goes out in one write, and a dead or stalled client is let go."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
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
    """A prepared event stream with its heartbeat, for the length of a block, which a client that leaves ends in silence."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    await response.prepare(request)
    stream = Stream(request, response)
    beat = asyncio.create_task(stream.beat(heartbeat))
    with OPEN_STREAMS.track_inprogress():
        try:
            yield stream
        except ConnectionResetError:
            stream.cut()  # the client has gone: nothing went wrong, and there is nobody to tell
        except Exception:
            # A second response inside the first would be read as part of it: cut the connection instead.
            stream.cut()
            raise
        finally:
            beat.cancel()


@asynccontextmanager
async def finishing(batches: AsyncIterator[Sequence[Batch]]) -> AsyncIterator[None]:
    """End the feed *batches* with the block: left alone, it would go on until the memory of an error's frames is freed."""
    try:
        yield
    finally:
        if isinstance(batches, AsyncGenerator):
            await batches.aclose()


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

    async def copy(self, batches: AsyncIterator[Sequence[Batch]], encode: Encode, after: int = 0) -> bool:
        """Write everything behind sequence *after* to the final batch; whether it came."""
        async for arrived in batches:
            if fresh := [batch for batch in arrived if batch.sequence > after]:
                await self.write(b"".join(map(encode, fresh)))
            if arrived[-1].final:
                return True
        return False

    async def beat(self, seconds: float) -> None:
        """A comment now and then keeps proxies from closing; a client that takes nothing for long is cut off, and may resume."""
        while True:
            await asyncio.sleep(seconds)
            if self._writing_since is None:
                await self._say_alive()
            elif asyncio.get_running_loop().time() - self._writing_since > _STALLED_SECONDS:
                self.cut()

    async def _say_alive(self) -> None:
        try:
            async with asyncio.timeout(_STALLED_SECONDS):
                await self.response.write(b": heartbeat\n\n")
        except TimeoutError:
            self.cut()
        except ConnectionResetError:
            return  # the client has gone: whoever writes next hears of it

    def cut(self) -> None:
        """Break the connection off: the client sees a stream without its end, and may resume."""
        if self._request.transport:
            self._request.transport.abort()
