"""One consumer's standing request: asks the broker for messages, notices when requests or the consumer got lost, and asks anew.

The protocol is that of ``$JS.API.CONSUMER.MSG.NEXT`` (NATS ADR-9 and ADR-13), with idle heartbeats.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from capibara_flow.tasks import ended
from capibara_flow.telemetry import log

_NANO = 1_000_000_000


@dataclass(frozen=True)
class Asking:
    """How a request stands: for *expires* seconds, with a *heartbeat* every so many."""

    expires: float = 30.0
    heartbeat: float = 2.0


class Inlet:
    """The requests of one process to the consumer *durable* of *stream*, which *ensure* creates.

    *wanted* tells how many messages it may still be sent, *enough* of how many more it is worth to ask; each goes to *arrived*.
    """

    def __init__(
        self,
        client: Client,
        stream: str,
        durable: str,
        *,
        ensure: Callable[[], Awaitable[None]],
        wanted: "Callable[[Inlet], int]",
        enough: Callable[[], int],
        arrived: "Callable[[Inlet, Msg], Awaitable[None]]",
        asking: Asking,
    ) -> None:
        self.durable = durable
        self._client = client
        self._api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._ensure, self._wanted, self._enough, self._arrived, self._asking = ensure, wanted, enough, arrived, asking
        self._request = {"expires": int(asking.expires * _NANO), "idle_heartbeat": int(asking.heartbeat * _NANO)}
        #: How many messages the standing requests are for.
        self.asked = 0
        self._even = self._heard = 0.0
        self._inbox = ""
        self._open = False
        self._subscription: Subscription | None = None
        self._renewal: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Take from now on: provision, subscribe and ask."""
        self._open = True
        self.renew_soon()

    async def shut(self) -> None:
        """Ask for nothing; what came before the broker knows is given back."""
        self._open = False
        await ended(self._renewal)
        await self._hang_up()

    async def _hang_up(self) -> None:
        """Without interest in its inbox the broker drops our standing request; what came before it knew goes through ``_receive``."""
        subscription, self._subscription = self._subscription, None
        if subscription:
            with suppress(NatsError, TimeoutError):
                await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py

    async def ask(self) -> None:
        """Ask for what is wanted and not asked for yet."""
        want = self._wanted(self) - self.asked if self._open and self._subscription else 0
        # Several small requests would each be answered with their own statuses: wait until it is worth it.
        if want > 0 and (self.asked == 0 or want >= self._enough()):
            if self.asked == 0:
                self._even = self._heard = self._now()
            self.asked += want
            await self._client.publish(self._api, json.dumps({"batch": want, **self._request}).encode(), reply=self._inbox)

    async def _receive(self, message: Msg) -> None:
        self._heard = self._now()
        headers = message.headers or {}
        status = headers.get("Status")
        if status is None or message.reply.startswith("$JS.ACK"):
            if self._open:
                self.asked = max(0, self.asked - 1)
                await self._arrived(self, message)
            else:
                await message.nak()  # it came to a closing door: somebody else may have it at once
        elif status == "408":  # the request expired: some of what we asked for did not come
            left = int(headers.get("Nats-Pending-Messages", 0) or 0)
            self.asked = max(0, self.asked - (left or self.asked))
            await self.ask()
        elif status != "100":  # 503, 404, 409: the consumer, its stream or its leader is gone, or the broker leaves
            self.renew_soon()

    def renew_soon(self) -> None:
        """Provision, and ask anew."""
        if self._open and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        """Provision until it works, then ask from a fresh inbox: answers to older requests no longer count."""
        pause = 0.05 if self._inbox else 0.0
        while self._open:
            await asyncio.sleep(pause)
            try:
                await self._ensure()
                await self.afresh()
                await self._client.flush()
            except (NatsError, TimeoutError) as error:
                log.warning("consumer_unavailable", durable=self.durable, error=repr(error))
                pause = 0.5
            else:
                return

    async def afresh(self) -> None:
        """Take back what was asked for, and ask for what is wanted now."""
        await self._hang_up()
        self._inbox = self._client.new_inbox()
        self._subscription = await self._client.subscribe(self._inbox, cb=self._receive)
        self.asked = 0
        self._heard = self._now()
        await self.ask()

    def look(self) -> None:
        """Start over when requests got lost.

        That is so when nothing is heard although something is wanted, and, should only some of several be lost (with the leader of a
        cluster, say), when what we asked for neither came nor expired.
        """
        now = self._now()
        silent = self._wanted(self) > 0 and now - self._heard > 2.5 * self._asking.heartbeat
        overdue = self.asked and now - self._even > 2 * self._asking.expires
        if silent or overdue:
            self.renew_soon()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
