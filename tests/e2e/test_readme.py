"""The README's own commands, as they stand there."""

import asyncio
import os
import re
import shlex
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:5001"


def block(language: str, holds: str) -> str:
    """The one block of code in *language* that holds a text."""
    [found] = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holds in code]
    return str(found)


async def said(*command: str, **environment: str) -> str:
    """What a command prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=os.environ | environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_python_example_prints_an_answer(door: str):
    example = block("python", "OpenAI").replace(ADDRESS, door).replace("Hola", "count")
    assert await said(sys.executable, "-c", example) == "one two three four five"


async def test_the_curl_example_streams_an_answer(door: str):
    [line] = [each for each in block("sh", "curl").splitlines() if each.startswith("curl")]
    assert "event: done" in await said(*shlex.split(line.replace(ADDRESS, door)))


async def test_the_chat_example_prints_an_answer(door: str):
    [line] = [each for each in block("sh", "capibara chat").splitlines() if each.startswith("capibara chat")]
    _, _, question = shlex.split(line, comments=True)
    assert "The capital of France is Paris." in await said(sys.executable, "-m", "capibara_flow", "chat", "--url", door, question)


@pytest.mark.parametrize("target", re.findall(r"`make (\w[\w-]*)`", README))
def test_every_make_target_that_it_names_is_there(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_file_that_it_links_to_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


async def test_every_command_that_it_names_is_there():
    commands = set(re.findall(r"capibara ((?:up|edge|worker|chat|doctor|streams \w+|engine \w+))", README))
    assert len(commands) > 4
    for command in sorted(commands):
        assert "--help" in await said(sys.executable, "-m", "capibara_flow", *command.split(), "--help", COLUMNS="200", NO_COLOR="1")
