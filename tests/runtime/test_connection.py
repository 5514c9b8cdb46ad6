"""Reaching a broker that is not there, or does not want us."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest
from pydantic import SecretStr

from capibara_flow.cli.supervisor import free_port
from capibara_flow.runtime import connection
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import NatsSettings, Settings, SettingsError

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "deploy" / "fleets" / "example.toml"


async def worker(**environment: str) -> asyncio.subprocess.Process:
    """A caller in a process of its own."""
    variables = {"CAPIBARA_FLEET__FILE": str(FLEET), "PYTHONPATH": str(ROOT), **environment}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers", "caller", env=os.environ | variables, cwd=ROOT, stdin=DEVNULL, stderr=PIPE
    )


async def line_with(lines: asyncio.StreamReader, words: bytes) -> bytes:
    """The first of *lines* with *words*."""
    while words not in (line := await lines.readline()):
        assert line, "it has ended"
    return line


async def test_a_wrong_password_is_told_at_once_and_names_its_variable(broker: EmbeddedBroker):
    settings = Settings(nats=NatsSettings(url=broker.url, passwords={"caller": SecretStr("wrong")}))
    with pytest.raises(SettingsError, match="CAPIBARA_NATS__PASSWORDS__CALLER"):
        await asyncio.wait_for(connection.connect(settings, "caller"), 20)


async def test_a_worker_with_a_wrong_password_ends_and_says_why(broker: EmbeddedBroker):
    process = await worker(CAPIBARA_NATS__URL=broker.url, CAPIBARA_NATS__PASSWORDS__CALLER="wrong")
    _, said = await asyncio.wait_for(process.communicate(), 40)
    assert process.returncode == 2
    assert b"CAPIBARA_NATS__PASSWORDS__CALLER" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_waits_for_a_broker_can_be_stopped(number: signal.Signals):
    process = await worker(CAPIBARA_NATS__URL=f"nats://127.0.0.1:{free_port('127.0.0.1')}")
    assert process.stderr is not None
    assert b"Connect call failed" in (line := await asyncio.wait_for(process.stderr.readline(), 40)) or b"refused" in line
    process.send_signal(number)
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert b"Traceback" not in said


async def test_a_worker_whose_broker_has_gone_can_be_stopped(broker: EmbeddedBroker):
    process = await worker(**broker.environment("caller"))
    assert process.stderr is not None
    await asyncio.wait_for(line_with(process.stderr, b"workers_ready"), 40)
    broker.kill()
    await asyncio.wait_for(line_with(process.stderr, b"nats_error"), 40)
    process.send_signal(signal.SIGTERM)
    _, said = await asyncio.wait_for(process.communicate(), 40)
    assert b"Traceback" not in said
    assert process.returncode == 0


async def test_a_broker_that_comes_late_is_waited_for(broker: EmbeddedBroker):
    broker.kill()
    settings = Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords))
    connecting = asyncio.create_task(connection.connect(settings, "caller"))
    await asyncio.sleep(0.3)
    assert not connecting.done()
    await asyncio.to_thread(broker.restart)
    client = await asyncio.wait_for(connecting, 20)
    assert client.is_connected
    await client.close()


async def test_whoever_gives_up_waiting_leaves_nothing_behind():
    settings = Settings(nats=NatsSettings(url=f"nats://127.0.0.1:{free_port('127.0.0.1')}"))
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection.connect(settings, "caller"), 0.5)
    assert asyncio.all_tasks() <= before
