"""What cannot be read as a request, and what libraries complain about: no secret reaches the log."""

import asyncio
import json
import logging

import pytest

from capibara_flow import telemetry
from tests.edge.serving import ANSWER, served
from tests.fakes import FakeTurns

SECRET = "hush" * 2500


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("header", [f"Authorization: Bearer sk-{SECRET}", f"Cookie: session={SECRET}", f"X: {SECRET}", f"{SECRET} broken"])
async def test_a_request_that_nobody_can_read_is_refused_in_silence(
    header: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    telemetry.configure(level="info", style="json")
    async with served(FakeTurns(*ANSWER)) as (host, port), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"POST /api/chat HTTP/1.1\r\nHost: h\r\n{header}\r\nContent-Length: 0\r\n\r\n".encode())
        assert b" 400 " in await reader.readline()
        writer.close()
    written = "".join(capsys.readouterr())
    assert "hush" not in written + caplog.text
    assert "Traceback" not in written + caplog.text


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("name", ["aiohttp.server", "asyncio", "nats.aio.client", "faststream", "faststream.access.nats"])
def test_libraries_warn_through_our_log(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(level="info", style="json")
    try:
        _fail("cannot reach nats://edge:hush-hush@h with 'bearer hush-hush'")
    except ConnectionError:
        logging.getLogger(name).exception("refused %s", "sk-abcdef-hush-hush")
    logging.getLogger(name).info("chatter")
    (line,) = capsys.readouterr().err.splitlines()
    logged = json.loads(line)
    assert (logged["event"], logged["logger"], logged["level"]) == ("refused sk-abcdef***", name, "error")
    assert "ConnectionError" in logged["exception"]
    assert "hush" not in line


def _fail(reason: str) -> None:
    raise ConnectionError(reason)


@pytest.mark.usefixtures("own_logging")
def test_a_log_set_up_twice_says_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(level="info", style="json")
    telemetry.configure(level="info", style="console")
    logging.getLogger("asyncio").warning("slow")
    logging.getLogger("asyncio").log(35, "odd level")
    assert [("slow" in line, "odd level" in line) for line in capsys.readouterr().err.splitlines()] == [(True, False), (False, True)]
