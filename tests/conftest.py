"""Fixtures that start the real thing: a broker on a free port, a scripted engine, workers and a door in this process."""

import asyncio
import logging
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
import structlog
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from capibara_flow import wiring
from capibara_flow.edge.app import build
from capibara_flow.engines import scripted
from capibara_flow.engines.script import load_script
from capibara_flow.runtime import brokers
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import FleetSettings, NatsSettings, Settings

# A shell without job control starts its background jobs with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "answers.toml"


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Whatever a test sets up for logging ends with it."""
    root = logging.getLogger()
    before = set(root.handlers)
    yield
    for each in set(root.handlers) - before:
        root.removeHandler(each)
    structlog.reset_defaults()


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    """An empty broker of one's own, with the project's nats.conf."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(Path(folder), config=ROOT / "nats.conf") as running:
        yield running


def settings_for(broker: EmbeddedBroker, fleet: Path, **groups: object) -> Settings:
    """Settings that know *broker* and *fleet*; *groups* replace whole groups."""
    nats = NatsSettings(url=broker.url, passwords=broker.passwords)
    return Settings(nats=nats, fleet=FleetSettings(file=fleet), **groups)


@dataclass
class Installation:
    """Everything of `capibara up`, inside this process: workers and doors may be added and taken away."""

    settings: Settings
    engine: str
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start_worker(self, name: str) -> AsyncExitStack:
        """Start one more worker; close what is returned to stop it in order."""
        stack = AsyncExitStack()
        broker = brokers.broker(self.settings, wiring.kind(name))
        needs = await stack.enter_async_context(wiring.worker_needs(name, self.settings))
        await import_module(f"workers.{wiring.kind(name)}").build(broker, **needs).start()
        stack.push_async_callback(broker.stop)
        self._stack.push_async_callback(stack.aclose)
        return stack

    async def start_edge(self) -> str:
        """Start one more door; its address."""
        client = await self._stack.enter_async_context(wiring.connected(self.settings, "edge"))
        server = TestServer(build(await wiring.door(self.settings, client, self._stack)), host="127.0.0.1")
        await server.start_server(shutdown_timeout=0.1)
        self._stack.push_async_callback(server.close)
        url = str(server.make_url("")).rstrip("/")
        await until_ready(url)
        return url

    async def aclose(self) -> None:
        """Stop all."""
        await self._stack.aclose()


@asynccontextmanager
async def installed(settings: Settings, engine: str, *names: str) -> AsyncIterator[Installation]:
    """An installation for the length of a block, without a door, with these workers (every one that plain turns need, if none is named)."""
    await wiring.apply_streams(settings)
    running = Installation(settings, engine)
    try:
        for name in names or ("router", "caller", "undertaker"):
            await running.start_worker(name)
        yield running
    finally:
        await running.aclose()


async def until_ready(url: str) -> None:
    """Wait until the door says that a turn can be served."""
    async with ClientSession() as session, asyncio.timeout(20):
        while True:
            async with session.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    """A scripted engine: its OpenAI address."""
    runner, url = await scripted.serve(load_script(SCRIPT))
    yield url
    await runner.cleanup()


@pytest.fixture
def fleet_file(engine: str, tmp_path: Path) -> Path:
    """A fleet of two experts on the scripted engine; `paint` sees images."""
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'default = "scripted"\n'
        f'[[experts]]\nname = "scripted"\naliases = ["script"]\nurls = ["{engine}"]\nscripted = true\ntools = true\n'
        f'[[experts]]\nname = "paint"\nurls = ["{engine}"]\nscripted = true\nmodalities = ["text", "image"]\n'
        f'[[rules]]\nroute = "painting"\nexpert = "paint"\npatterns = ["\\\\bpaint\\\\b", "\\\\bpinta\\\\b"]\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path) -> Settings:
    """The settings of the whole installation."""
    return settings_for(broker, fleet_file)


@pytest.fixture
async def installation(settings: Settings, engine: str) -> AsyncIterator[Installation]:
    """A whole installation without a door; settings may be replaced before more is started."""
    async with installed(settings, engine) as running:
        yield running


@pytest.fixture
async def door(installation: Installation) -> str:
    """The address of a door in front of a whole installation."""
    return await installation.start_edge()
