"""Writing server-sent events: everything that is there goes out in one write, and a dead or stalled client is let go."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from capibara_flow.domain.turns import created
from capibara_flow.edge.asked import Place
from capibara_flow.ports import Batch, Feed
from capibara_flow.telemetry import OPEN_STREAMS
from topics.output import event_of

#: Turns one batch into the bytes of its events; the batch's sequence becomes the ``id:`` of its last event.
Encode = Callable[[Batch], bytes]

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_STALLED_SECONDS = 60.0


def native(batch: Batch, had: int = 0) -> bytes:
    """Events of the native stream: the stored lines themselves, under their names, without the first that a reader *had*.

    The last one's id is the batch's sequence, that of the first ones ``SEQUENCE-1``, ``SEQUENCE-2``.
    """
    *before, last = batch.lines
    end = b"id: %d\nevent: %b\ndata: %b\n\n" % (batch.sequence, event_of(last).encode(), last)
    if not before:
        return end
    lines = [(number, line) for number, line in enumerate(before, 1) if number > had]
    return b"".join(b"id: %d-%d\nevent: %b\ndata: %b\n\n" % (batch.sequence, n, event_of(line).encode(), line) for n, line in lines) + end


def greeting(turn: str, principal: str) -> bytes:
    """The first event for who opens a turn natively; nobody keeps it, so it has no id."""
    first = {"turn": turn, "created": created(turn), "principal": principal}
    return b"event: turn\ndata: %s\n\n" % json.dumps(first).encode()


def behind(place: Place) -> Encode:
    """``native`` for who goes on at *place*."""
    if not place.lines:
        return native
    return lambda batch: native(batch, place.lines if batch.sequence == place.sequence + 1 else 0)


@asynccontextmanager
async def opened(request: web.Request, headers: dict[str, str], heartbeat: float, room: int) -> AsyncIterator["Stream"]:
    """A prepared event stream with its heartbeat, for the length of a block, which a client that leaves ends in silence.

    With *room* bytes waiting to be sent, whoever wants to write more waits too.
    """
    response = web.StreamResponse(headers={**HEADERS, **headers})
    await response.prepare(request)
    stream = Stream(request, response, room)
    beat = asyncio.create_task(stream.beat(heartbeat))
    with OPEN_STREAMS.track_inprogress():
        try:
            yield stream
        except ConnectionError:
            stream.cut()  # the client has gone: nothing went wrong, and there is nobody to tell
        except Exception:
            # A second response inside the first would be read as part of it: cut the connection instead.
            stream.cut()
            raise
        finally:
            beat.cancel()


def _noticed(drained: asyncio.Future[None]) -> None:
    """Nobody waits for it: a connection that was lost meanwhile is no news to report, whoever writes next hears of it."""
    if not drained.cancelled():
        drained.exception()


class Stream:
    """One client's open event stream."""

    def __init__(self, request: web.Request, response: web.StreamResponse, room: int) -> None:
        self.response = response
        self._request = request
        self._room = room
        if request.transport:
            request.transport.set_write_buffer_limits(high=room)
        self._copying = asyncio.timeout(None)
        self._stopped = False
        self._writing_since: float | None = None
        self._loop = asyncio.get_running_loop()

    async def write(self, data: bytes) -> None:
        """Send *data*; waits while the client's buffer is full."""
        self._writing_since = self._loop.time()
        await self.response.write(data)
        self._writing_since = None

    async def copy(self, feed: Feed, encode: Encode, after: int = 0) -> Batch | None:
        """Write everything behind sequence *after* to the final batch; none if it did not come, or was stopped before."""
        last: Batch | None = None

        def take(batch: Batch) -> bool:
            nonlocal last
            if not self._roomy or (batch.sequence > after and not self._write_now(encode(batch))):
                return False
            if batch.final:
                last = batch
            return True

        feed.tap(take)
        try:
            async with self._copying:
                async for arrived in feed:
                    if fresh := [batch for batch in arrived if batch.sequence > after]:
                        await self.write(b"".join(map(encode, fresh)))
                    if self._stopped:
                        break
                    if arrived and arrived[-1].final:
                        last = arrived[-1]
        except TimeoutError:
            if not self._copying.expired():
                raise
        return None if self._stopped else last

    def stop(self) -> None:
        """Whatever is being copied: copy no more of it. What an encoder has just returned is still written."""
        self._stopped = True
        self._copying.reschedule(self._loop.time())

    @property
    def _roomy(self) -> bool:
        transport = self._request.transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() < self._room

    def _write_now(self, data: bytes) -> bool:
        """Send *data* without a task having to wake for it; false when the connection is broken."""
        writing = self.response.write(data)
        try:
            # The one step that it takes while the client's buffer has room.
            drained: asyncio.Future[None] = writing.send(None)
        except (StopIteration, asyncio.CancelledError):  # the latter of somebody who waited for the buffer to drain before us
            return True
        except ConnectionResetError:
            return False
        writing.close()  # all is written, it only waits for the buffer to drain
        # As a task does with what its coroutine yields: all who wait for one buffer share the future, and the next could not await it.
        drained._asyncio_future_blocking = False
        drained.add_done_callback(_noticed)
        return True

    async def beat(self, seconds: float) -> None:
        """A comment now and then keeps proxies from closing; a client that takes nothing for long is cut off, and may resume."""
        while True:
            await asyncio.sleep(seconds)
            if self._writing_since is None:
                await self._say_alive()
            elif self._loop.time() - self._writing_since > _STALLED_SECONDS:
                self.cut()

    async def _say_alive(self) -> None:
        try:
            async with asyncio.timeout(_STALLED_SECONDS):
                await self.response.write(b": heartbeat\n\n")
        except TimeoutError:
            self.cut()
        except ConnectionError:
            return  # the client has gone: whoever writes next hears of it

    def cut(self) -> None:
        """Break the connection off: the client sees a stream without its end, and may resume."""
        if self._request.transport:
            self._request.transport.abort()
