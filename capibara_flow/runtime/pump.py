"""Permit-bounded pulling: asks the broker for exactly as many messages as there are free hands.

One standing request with idle heartbeats; when the consumer or its stream disappears, or the broker forgets our request,
everything is provisioned anew. The protocol is that of ``$JS.API.CONSUMER.MSG.NEXT`` (NATS ADR-9 and ADR-13).
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from capibara_flow.runtime.gating import Gate
from capibara_flow.telemetry import log

_NANO = 1_000_000_000


class Pump:
    """Feeds *handle* with at most *permits* messages at once, and none while *gate* is shut; *ensure* creates what is missing."""

    def __init__(
        self,
        client: Client,
        stream: str,
        durable: str,
        *,
        permits: int,
        handle: Callable[[Msg], Awaitable[object]],
        ensure: Callable[[], Awaitable[None]],
        gate: Gate | None = None,
        expires: float = 30.0,
        heartbeat: float = 2.0,
    ) -> None:
        self._client = client
        self._api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._durable = durable
        self._handle = handle
        self._ensure = ensure
        self._gate = gate
        self._permits = self._free = permits
        self._request = {"expires": int(expires * _NANO), "idle_heartbeat": int(heartbeat * _NANO)}
        self._expires, self._heartbeat = expires, heartbeat
        self._asked = 0
        self._even = 0.0
        self._inbox = ""
        self._running = False
        self._heard = 0.0
        self._jobs: set[asyncio.Task[None]] = set()
        self._at_work: set[str] = set()
        self._subscription: Subscription | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._porter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Provision, subscribe and ask for the first messages."""
        self._running = True
        self._watchdog = asyncio.create_task(self._watch())
        if self._gate:
            self._porter = asyncio.create_task(self._mind(self._gate))
        self._renew_soon()

    async def unsubscribe(self) -> None:
        """Take no more; messages at work go on. Named as FastStream's subscriptions call it."""
        self._running = False
        for task in (self._watchdog, self._renewal, self._porter):
            if task:
                task.cancel()
        await self._hang_up()

    async def finish(self, seconds: float) -> None:
        """Wait *seconds* for what is at work; what is not done then is cancelled, and so handed over."""
        if self._jobs:
            _, late = await asyncio.wait(self._jobs, timeout=seconds)
            for job in late:
                job.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    @property
    def _wants(self) -> bool:
        return self._running and (self._gate is None or self._gate.is_open)

    async def _mind(self, gate: Gate) -> None:
        """Ask for nothing while *gate* is shut; what is at work goes on."""
        while True:
            await gate.until_shut()
            if self._renewal and not self._renewal.done():
                self._renewal.cancel()
                await asyncio.wait({self._renewal})
            await self._hang_up()
            await gate.until_open()
            self._renew_soon()

    async def _hang_up(self) -> None:
        """Without interest in its inbox the broker drops our standing request; what came before it knew goes through ``_receive``."""
        subscription, self._subscription = self._subscription, None
        if subscription:
            with suppress(NatsError, TimeoutError):
                await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py

    async def _ask(self) -> None:
        want = self._free - self._asked
        # Several small requests would each be answered with their own statuses: wait until half of the hands are free.
        if self._wants and want > 0 and (self._asked == 0 or want * 2 >= self._permits):
            if self._asked == 0:
                self._even = self._now()
            self._asked += want
            await self._client.publish(self._api, json.dumps({"batch": want, **self._request}).encode(), reply=self._inbox)

    async def _receive(self, message: Msg) -> None:
        self._heard = self._now()
        headers = message.headers or {}
        status = headers.get("Status")
        if status is None or message.reply.startswith("$JS.ACK"):
            if self._wants:
                await self._take(message)
            else:
                await message.nak()  # it came to a closing door: somebody else may have it at once
        elif status == "408":  # the request expired: some of what we asked for did not come
            left = int(headers.get("Nats-Pending-Messages", 0) or 0)
            self._asked = max(0, self._asked - (left or self._asked))
            await self._ask()
        elif status != "100":  # 503, 404, 409: the consumer, its stream or its leader is gone, or the broker leaves
            self._renew_soon()

    async def _take(self, message: Msg) -> None:
        self._asked = max(0, self._asked - 1)
        # A stream that was created anew counts from one again: the time it was stored tells two messages apart.
        which = f"{message.metadata.sequence.stream} {message.metadata.timestamp.timestamp()}"
        if which in self._at_work:
            # This process was paused for longer than the broker waits. What it was doing it goes on with, and settles.
            log.info("work_goes_on", durable=self._durable, subject=message.subject)
            await self._ask()
            return
        self._free -= 1
        self._at_work.add(which)
        job = asyncio.create_task(self._work(message, which))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _work(self, message: Msg, which: str) -> None:
        try:
            await self._handle(message)
        finally:
            self._at_work.discard(which)
            self._free += 1
            if self._client.is_connected:
                with suppress(NatsError):  # the watchdog sees that nobody asks
                    await self._ask()

    def _renew_soon(self) -> None:
        if self._wants and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Provision until it works, then ask from a fresh inbox: answers to older requests no longer count."""
        pause = 0.05 if self._inbox else 0.0
        while self._wants:
            await asyncio.sleep(pause)
            try:
                await self._ensure()
                await self._hang_up()
                self._inbox = self._client.new_inbox()
                self._subscription = await self._client.subscribe(self._inbox, cb=self._receive)
                self._asked = 0
                self._heard = self._now()
                await self._ask()
                await self._client.flush()
            except (NatsError, TimeoutError) as error:
                log.warning("consumer_unavailable", durable=self._durable, error=repr(error))
                pause = 0.5
            else:
                return

    async def _watch(self) -> None:
        """Start over when requests got lost.

        That is so after a reconnect, when nothing is heard although hands are free, and, should only some of several be lost (with the
        leader of a cluster, say), when what we asked for neither came nor expired.
        """
        reconnects = self._client.stats["reconnects"]
        while True:
            await asyncio.sleep(self._heartbeat / 2)
            now, before, reconnects = self._now(), reconnects, self._client.stats["reconnects"]
            silent = self._free and now - self._heard > 2.5 * self._heartbeat
            overdue = self._asked and now - self._even > 2 * self._expires
            if silent or overdue or reconnects != before:
                self._renew_soon()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
