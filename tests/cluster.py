"""Three nats-servers as one JetStream cluster, with the project's nats.conf: for what only a cluster does."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

from aiohttp import ClientError, ClientSession
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig
from nats.js.errors import APIError

from capibara_flow.processes.leash import leashed
from capibara_flow.processes.logs import last_lines
from capibara_flow.runtime import connection
from capibara_flow.runtime.embedded import find_server, variables
from capibara_flow.settings import ROLES, NatsSettings, Settings
from tests.waiting import until

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
_ELECTION = 60.0  # seconds, generously


class Seat:
    """A port that is ours for as long as this object is open, whoever listens there.

    It is bound and never listened on: the kernel gives it to nobody who asks for any port, and lets in whoever binds it with
    ``SO_REUSEADDR``, as Go programs do. So a server can be killed and find its port free again.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


class Node:
    """One server of the cluster, called *name*; *folder* holds its store and its log."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._store = folder / name
        self._clients, self._routes, self._monitor = self._seats = (Seat(), Seat(), Seat())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it, without a user."""
        return f"nats://{HOST}:{self._clients.port}"

    @property
    def route(self) -> str:
        """Where its peers find it."""
        return f"nats://{HOST}:{self._routes.port}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, routes: str, environment: dict[str, str]) -> None:
        """Start it, with what it had stored before; *routes* lead to all nodes."""
        command = [find_server(), "-c", str(ROOT / "nats.conf"), "-a", HOST, "-p", str(self._clients.port), "-sd", str(self._store)]
        command += [
            "-m",
            str(self._monitor.port),
            "--name",
            self.name,
            "--cluster_name",
            "capibara",
            "--cluster",
            self.route,
            "--routes",
            routes,
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                leashed(command), env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Let it hang: its connections stay open and nothing comes of them."""
        if self._process:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, with force after a while."""
        if self._process:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def close(self) -> None:
        """Give its ports back."""
        for seat in self._seats:
            seat.close()

    async def has(self, stream: str) -> tuple[int, int] | None:
        """What this very node has of *stream*: how many messages, and the last sequence; none when it has none or does not answer."""
        try:
            async with ClientSession() as session, session.get(f"http://{HOST}:{self._monitor.port}/jsz?streams=true") as response:
                accounts = (await response.json())["account_details"]
        except (ClientError, KeyError):
            return None
        states = [each["state"] for account in accounts for each in account.get("stream_detail", ()) if each["name"] == stream]
        return (states[0]["messages"], states[0]["last_seq"]) if states else None


class Cluster:
    """Three nodes, as long as the ``async with`` block lasts; *folder* is to be empty.

    *url* and *passwords* are as ``NatsSettings`` takes them.
    """

    def __init__(self, folder: Path) -> None:
        # A letter first: nats.conf would read a bare word that begins with a digit as a number.
        self.passwords = {role: f"p{token_hex(16)}" for role in ROLES}
        self.nodes = [Node(f"n{number}", folder) for number in (1, 2, 3)]
        self.url = ",".join(node.url for node in self.nodes)

    async def __aenter__(self) -> Self:
        try:
            for node in self.nodes:
                self.start(node)
            await self._formed()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def settings(self) -> Settings:
        """Settings that know this cluster and nothing else."""
        return Settings(nats=NatsSettings(url=self.url, passwords=self.passwords, replicas=3))

    def node(self, name: str) -> Node:
        """The node called *name*."""
        return next(node for node in self.nodes if node.name == name)

    def start(self, node: Node) -> None:
        """Start *node*, or start it again; returns before it has found its peers."""
        node.start(",".join(each.route for each in self.nodes), variables(self.passwords))

    def stop(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            node.stop()
            node.close()

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[JetStreamContext]:
        """A connection of the provisioner."""
        client = await connection.connect(self.settings, "provisioner")
        try:
            yield client.jetstream(timeout=2)
        finally:
            await client.close()

    async def leader(self, stream: str, consumer: str | None = None) -> Node:
        """Who leads *stream*, or *consumer* of it, once somebody does."""
        async with self.operator() as jetstream:
            return self.node(await until(lambda: _leader(jetstream, stream, consumer), _ELECTION))

    async def agreed(self, stream: str) -> None:
        """Return when all three nodes have the same of *stream*, which is no longer written to."""

        async def same() -> bool:
            first, *others = [await node.has(stream) for node in self.nodes]
            return first is not None and all(each == first for each in others)

        await until(same, _ELECTION)

    async def _formed(self) -> None:
        """Return when there is a leader who knows of all three and gives work to them; raises ``TimeoutError`` with their words."""
        try:
            async with self.operator() as jetstream:
                await until(lambda: _places(jetstream), _ELECTION)
        except TimeoutError as error:
            raise TimeoutError("\n".join(f"--- {node.name}\n{last_lines(node.log)}" for node in self.nodes)) from error


async def _places(jetstream: JetStreamContext) -> bool:
    """Whether a stream that needs three nodes can be had."""
    try:
        await jetstream.add_stream(StreamConfig(name="PROBE", subjects=["probe"], num_replicas=3))
        await jetstream.delete_stream("PROBE")
    except (NatsError, APIError, TimeoutError):
        await asyncio.sleep(0.1)
        return False
    return True


async def _information(jetstream: JetStreamContext, stream: str, consumer: str | None = None) -> dict:
    """What JetStream tells of *stream*, or *consumer* of it; nothing while nobody leads it."""
    client: Client = jetstream._nc
    what = f"CONSUMER.INFO.{stream}.{consumer}" if consumer else f"STREAM.INFO.{stream}"
    try:
        told = json.loads((await client.request(f"$JS.API.{what}", timeout=2)).data)
    except (NatsError, TimeoutError):
        await asyncio.sleep(0.1)
        return {}
    return {} if "error" in told else told


async def _leader(jetstream: JetStreamContext, stream: str, consumer: str | None) -> str:
    return (await _information(jetstream, stream, consumer)).get("cluster", {}).get("leader", "")
