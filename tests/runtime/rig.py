"""What the runtime's tests share: clients by role, commands to send, stages to watch, lines that lose things."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from capibara_flow.runtime import brokers, connection, provision
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.client import Hear, TokenClient
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.hops import Handler, Stage
from capibara_flow.runtime.output import stored
from capibara_flow.settings import NatsSettings, Settings, WorkerSettings
from topics.chat import CallExpert, ChatMessage, ChatRequest, RouteTurn
from topics.flow import hop
from topics.output import Output, Token, parse
from topics.streams import Consumer, Layout, caller_consumer, router_consumer

QUESTION = ChatRequest(messages=(ChatMessage(role="user", content="hola"),))
EXPERT = caller_consumer("phi")


class Rig:
    """A broker with its streams, and clients of every role."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.broker = broker
        self.settings = Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords), worker=WorkerSettings(graceful_seconds=1))
        self.clients: list[TokenClient] = []
        self.admin: JetStreamContext

    async def start(self) -> None:
        """Provision: no consumer but the two of the map."""
        self.admin = (await self.client("provisioner")).jetstream(timeout=10)
        await provision.apply(self.admin, Layout(), (router_consumer(), EXPERT))

    async def client(self, role: str) -> TokenClient:
        """One more connection of *role*."""
        self.clients.append(await connection.connect(self.settings, role))
        return self.clients[-1]

    async def stop(self) -> None:
        """Close every connection."""
        for client in self.clients:
            await client.close()

    async def restart(self, away: float = 0) -> None:
        """Kill the broker, and bring it back on the same port after *away* seconds."""
        await asyncio.to_thread(self.broker.kill)
        await asyncio.sleep(away)
        await asyncio.to_thread(self.broker.restart)

    async def ask(self, turn: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> None:
        """Let the door send a ``RouteTurn``, or a *body* that should be one."""
        body = RouteTurn(turn=turn, request=QUESTION).model_dump_json().encode() if body is None else body
        edge = next((each for each in self.clients if each.options["name"] == "capibara-edge"), None) or await self.client("edge")
        await edge.jetstream().publish(f"cf.work.{turn}.router", body, headers={"content-type": "application/json", **(headers or {})})

    async def call(self, turn: str, expert: str = "phi") -> None:
        """Let a router send a ``CallExpert``."""
        command = CallExpert(turn=turn, expert=expert, bucket=0, request=QUESTION)
        router = next((each for each in self.clients if each.options["name"] == "capibara-router"), None) or await self.client("router")
        await router.jetstream().publish(command.subject, command.model_dump_json().encode())

    async def answers(self, client: TokenClient | None = None) -> FencedAnswers:
        """A writer of answers with a connection of its own."""
        hub = FencedAnswers(client or await self.client("caller"), "test")
        await hub.start()
        return hub

    async def waiting(self, stream: str = "CF_WORK_ROUTER") -> int:
        """Messages in *stream*."""
        return int((await self.admin.stream_info(stream)).state.messages)

    async def said(self, turn: str, branch: str = "main") -> list[list[Output]]:
        """Everything on a branch, message by message."""
        edge = await self.client("edge")
        messages, after = [], 0
        while found := await stored(edge, f"cf.out.{turn}.data.{branch}", after):
            messages += [[parse(line) for line in each.data.split(b"\n")] for each in found]
            after = found[-1].sequence
        return messages

    async def tokens(self, turn: str) -> list[str]:
        """The texts of all stored tokens."""
        return [each.text for batch in await self.said(turn) for each in batch if isinstance(each, Token)]

    async def dead(self, turn: str) -> list[bytes]:
        """What was given up of *turn*."""
        observer = await self.client("observer")
        return [each.data for each in await stored(observer, f"cf.dead.{turn}.router", 0, "CF_DEAD")]

    @asynccontextmanager
    async def routing(
        self,
        build: Callable[[Stage], Handler],
        *,
        permits: int = 4,
        ack_wait: float = 30,
        max_deliver: int = 4,
        retry_seconds: float = 0.1,
        patience_seconds: float | None = None,
        layout: Layout | None = None,
        gate: Gate | None = None,
    ) -> AsyncIterator[Stage]:
        """A router whose handler *build* makes, for the length of a block; leaving it stops it in order."""
        broker = brokers.broker(self.settings, "router")
        hub = await self.answers(await self.client("router"))
        stage = Stage(broker, hop("router"), hub, layout=layout, retry_seconds=retry_seconds, patience_seconds=patience_seconds)
        consumer = replace(router_consumer(), ack_wait=ack_wait, max_deliver=max_deliver)
        stage.takes(consumer, permits=permits, gate=gate)(build(stage))
        await broker.start()
        try:
            yield stage
        finally:
            await broker.stop()
            await hub.stop()


async def ensured(jetstream: JetStreamContext, consumer: Consumer) -> None:
    """What a pump's ``ensure`` does in a stage."""
    await provision.ensure_stream(jetstream, Layout().named(consumer.stream))
    await provision.ensure_consumer(jetstream, consumer)


class Line(TokenClient):
    """A connection on which chosen messages get lost, or wait: nothing does unless a test says so."""

    def __init__(self) -> None:
        super().__init__()
        #: Asked of every message to be published; true: it is lost on its way.
        self.swallow: Callable[[str, bytes], bool] = lambda subject, body: False
        #: Gets every message that comes on a subscription with a callback, and the callback.
        self.deliver: Callable[[Msg, Callable[[Msg], Awaitable[None]]], Awaitable[None]] = _deliver
        #: Gets every message for an ear, and the ear.
        self.overhear: Callable[[bytes, bytes, bytes, Hear], None] = _hear
        #: What ``swallow`` kept from ``send``; ``deliver_late`` sends it after all.
        self.lost: list[tuple[str, bytes, str, bytes]] = []
        #: Awaited with the subject of every request that was just answered.
        self.answered: Callable[[str], Awaitable[None]] = _nothing

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None) -> None:
        if not self.swallow(subject, payload):
            await super().publish(subject, payload, reply, headers)

    def send(self, subject: str, payload: bytes, *, reply: str, headers: bytes) -> None:
        if self.swallow(subject, payload):
            self.lost.append((subject, payload, reply, headers))
        else:
            super().send(subject, payload, reply=reply, headers=headers)

    def deliver_late(self) -> None:
        """Let what was lost arrive, as it was."""
        lost, self.lost = self.lost, []
        for subject, payload, reply, headers in lost:
            super().send(subject, payload, reply=reply, headers=headers)

    async def listen(self, subject: str, hear: Hear) -> Subscription:
        def heard(subject: bytes, headers: bytes, data: bytes) -> None:
            self.overhear(subject, headers, data, hear)

        return await super().listen(subject, heard)

    async def request(self, subject: str, payload: bytes = b"", **options: Any) -> Msg:
        message = await super().request(subject, payload, **options)
        await self.answered(subject)
        return message

    async def subscribe(self, subject: str, *args: Any, cb: Any = None, **options: Any) -> Any:
        async def heard(message: Msg) -> None:
            await self.deliver(message, cb)

        return await super().subscribe(subject, *args, cb=cb and heard, **options)


async def _deliver(message: Msg, callback: Callable[[Msg], Awaitable[None]]) -> None:
    await callback(message)


def _hear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
    ear(subject, headers, data)


async def _nothing(subject: str) -> None:
    pass


async def line(rig: Rig, role: str) -> Line:
    """A ``Line`` of *role*."""
    client = Line()
    await client.connect(connection.addresses(rig.settings, role), **connection.options(rig.settings, role))
    rig.clients.append(client)
    return client
