"""A NATS client with a fast lane for tokens.

nats-py queues every message for a task of its subscription and turns its headers into a dictionary; for a token that costs more than all
else at the door. ``TokenClient`` hands the messages of chosen subscriptions over where they are parsed, with their headers as they came,
and sends messages whose headers were encoded once. Some private parts of nats-py 2.x are used, all held by a test.
"""

import asyncio
import math
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionClosedError, NoRespondersError, OutboundBufferLimitError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from capibara_flow.tasks import ended

#: Takes subject, raw headers (empty when there are none) and data, at once: whatever comes behind it waits.
Hear = Callable[[bytes, bytes, bytes], None]
#: Bytes that the system has not taken yet, from which on nats-py's flusher waits for it: asyncio's own limit.
_MUCH = 64 * 1024


def encoded(headers: Mapping[str, str]) -> bytes:
    """*headers* as they stand on the wire (NATS ADR-4)."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def header(raw: bytes, name: bytes) -> bytes:
    """The value of the header *name* in *raw*, empty when it is not there; where it stands twice, what the broker added last."""
    start = raw.rfind(b"\r\n" + name + b": ")
    if start < 0:
        return b""
    start += len(name) + 4
    return raw[start : raw.index(b"\r\n", start)]


def fields(raw: bytes) -> dict[str, str]:
    """All headers in *raw*; as ``header`` finds them."""
    pairs = (line.partition(": ") for line in raw.decode(errors="replace").split("\r\n")[1:] if line)
    return {name: value for name, _, value in pairs}


def status(raw: bytes) -> bytes:
    """The inline status of a message from the server itself (``503``, ``204``...), empty for an ordinary one."""
    return raw[9:12] if raw[8:9] == b" " else b""


def description(raw: bytes) -> str:
    """The words after the inline status."""
    return raw[13 : raw.index(b"\r\n")].decode(errors="replace")


async def flushed(client: Client, seconds: float = 10) -> None:
    """Return when the broker has taken all that *client* sent: nats-py's PING overtakes what is queued, so the second one counts.

    Raises what nats-py's ``flush`` does, after *seconds* each time; to give up waiting harms nothing.
    """
    for _ in range(2):
        await asyncio.shield(client.flush(timeout=seconds))  # type: ignore[arg-type]  # typed as whole seconds; a cancelled one would end its reading


def _expire(coming: "asyncio.Future[Any]") -> None:
    if not coming.done():
        coming.set_exception(NatsTimeoutError())


class TokenClient(Client):
    """``nats.aio.client.Client`` with ``listen`` and ``send``, and without detours for what else it sends and asks.

    *returned* is the loop's time at which the connection last came back after an outage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.returned = -math.inf
        self._leaving = False
        self._inbox, self._inbox_id = "", 0
        self._coming: dict[bytes, asyncio.Future[tuple[bytes, bytes, bytes]]] = {}
        self._ears: dict[int, Hear] = {}
        self._loop = asyncio.get_running_loop()
        # What ears have instead of a queue and a reader of their own, which nobody would use: 4 kB each, in a cycle of references.
        self._nobody: asyncio.Future[Any] = self._loop.create_future()
        self._nothing: asyncio.Queue[Any] = asyncio.Queue()

    async def connect(self, *servers: Any, **options: Any) -> None:
        """As nats-py's."""

        told = options.get("reconnected_cb")

        async def returned() -> None:
            self.returned = self._loop.time()
            if told:
                await told()

        await super().connect(*servers, **{**options, "reconnected_cb": returned})
        self._inbox = self.new_inbox()
        self._inbox_id = (await self._unread(f"{self._inbox}.*"))._id

    @property
    def clustered(self) -> bool:
        """Whether the broker is one of several: then others may be cut off from it while we are not."""
        return bool(self._server_info.get("cluster"))

    async def request(
        self, subject: str, payload: bytes = b"", timeout: float = 0.5, old_style: bool = False, headers: dict[str, Any] | None = None
    ) -> Msg:
        """As nats-py's, always in the new style, but the reply wakes nobody on its way.

        And a cancellation is heard that comes together with it, which ``asyncio.wait_for`` of Python 3.11 would swallow.
        """
        token, coming = secrets.token_hex(8), self._loop.create_future()  # whoever answered one is not to know the next
        self._coming[token.encode()] = coming
        timer: asyncio.TimerHandle | None = None
        try:
            await self.publish(subject, payload, reply=f"{self._inbox}.{token}", headers=headers)
            timer = self._loop.call_later(timeout, _expire, coming)
            answered, raw, data = await coming
        finally:
            if timer:
                timer.cancel()
            del self._coming[token.encode()]
        if status(raw) == b"503":
            raise NoRespondersError
        reply: Msg = self._build_message(0, answered, b"", data, await self._process_headers(raw))
        return reply

    def _replied(self, subject: bytes, headers: bytes, data: bytes) -> None:
        coming = self._coming.get(subject.rsplit(b".", 1)[1])
        if coming and not coming.done():
            coming.set_result((subject, headers, data))

    async def listen(self, subject: str, hear: Hear) -> Subscription:
        """Subscribe to *subject*; end it with ``deafen``."""
        subscription = await self._unread(subject)
        self._ears[subscription._id] = hear
        return subscription

    async def _unread(self, subject: str) -> Subscription:
        subscription = await self.subscribe(subject, future=self._nobody)
        subscription._pending_queue = self._nothing
        return subscription

    async def deafen(self, subscription: Subscription) -> None:
        """End what ``listen`` began."""
        self._ears.pop(subscription._id, None)
        if self.is_connected:
            with suppress(NatsError):  # the connection is being closed
                await subscription.unsubscribe()
        else:
            self._subs.pop(subscription._id, None)  # nothing to tell the broker: it is not subscribed anew after a reconnect

    async def close(self) -> None:
        """Close the connection for good, also while it looks for a server."""
        if not self.is_connected:
            # nats-py would write what it kept for the broker to a connection that is gone, fail, and leave the rest open.
            self._pending_data_size = 0
        search = self._reconnection_task
        try:
            await super().close()
        except asyncio.CancelledError:  # of the search, when both waited for the end of the old connection
            if (current := asyncio.current_task()) and current.cancelling():
                raise
        if search is not asyncio.current_task():
            await ended(search, again=0.05)

    def send(self, subject: str, payload: bytes, *, reply: str, headers: bytes) -> None:
        """Publish *payload* with already ``encoded`` *headers*; it leaves with all else of this pass of the loop.

        Raises ``OutboundBufferLimitError`` when there is no connection and too much is kept for the next one.
        """
        if self.is_closed:
            raise ConnectionClosedError
        if not self.is_connected and len(payload) + self._pending_data_size > self._max_pending_size:
            raise OutboundBufferLimitError
        size = len(headers)
        command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject.encode(), reply.encode(), size, size + len(payload), headers, payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        self._leave_soon()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        if force_flush or not self.is_connected:
            return await super()._flush_pending(force_flush)
        self._leave_soon()
        return None

    def _leave_soon(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._loop.call_soon(self._leave)

    def _leave(self) -> None:
        """Write what is pending, as nats-py's flusher would, but without a future, a queue and a task; the flusher waits when it must.

        A pass of the loop later than ``send``, like the flusher: to write at once joins less, which costs broker and door a fifth more.
        """
        self._leaving = False
        if not self._pending_data_size or not self.is_connected:
            return  # the flusher was there before, or it is kept for the next connection
        # None of a WebSocket, which has only the flusher.
        writer: asyncio.StreamWriter | None = getattr(self._transport, "_io_writer", None)
        if writer is None or writer.transport.get_write_buffer_size() > _MUCH:
            if self._flush_queue is not None and self._flush_queue.empty():
                self._flush_queue.put_nowait(self._loop.create_future())
        elif not writer.is_closing():
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            writer.write(b"".join(pending))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        if hear := self._ears.get(sid):
            try:
                hear(subject, headers or b"", data)
            except Exception as error:  # noqa: BLE001  it would end nats-py's reading from this connection, for ever and in silence
                await self._error_cb(error)
        elif sid == self._inbox_id:
            self._replied(subject, headers or b"", data)
        else:
            await super()._process_msg(sid, subject, reply, data, headers)
