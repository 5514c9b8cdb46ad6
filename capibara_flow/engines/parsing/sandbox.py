"""Parsers in a process of their own: a file that hangs, eats memory or kills its parser is refused, and nothing else is hurt."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from capibara_flow.domain.parsed import Block, Parsed
from capibara_flow.errors import DocumentRefused

#: What the child sees of our environment.
_SEEN = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may be and take: *size* and *memory* in bytes, *seconds* of time."""

    size: int = 32 * 1024 * 1024
    seconds: float = 60
    memory: int = 2 * 1024**3


class Parsers:
    """Reads files, one at a time, in a child process that is started when it is needed and kept."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._child: Process | None = None
        self._turn = asyncio.Lock()

    async def parse(self, data: bytes, name: str = "", media_type: str | None = None) -> Parsed:
        """The text of a file that is called *name*; raises ``DocumentRefused`` with the reason and what to do."""
        if len(data) > self._limits.size:
            size, allowed = len(data) / 1024**2, self._limits.size / 1024**2
            raise DocumentRefused(f"it has {size:.1f} MB, more than the {allowed:.0f} MB that are allowed: split it, or raise the limit")
        if not data.strip():
            raise DocumentRefused("it is empty")
        async with self._turn:
            answer = await self._asked(data, name, media_type)
        if "refused" in answer:
            raise DocumentRefused(answer["refused"])
        return _parsed(answer["parsed"])

    async def _asked(self, data: bytes, name: str, media_type: str | None) -> dict[str, Any]:
        whole = False
        try:
            async with asyncio.timeout(self._limits.seconds):
                child = await self._started()
                told = {"name": name, "media_type": media_type, "size": len(data), "seconds": self._limits.seconds + 5}
                answer = await _exchanged(child, orjson.dumps(told) + b"\n", data)
                whole = "last" not in answer
                return answer
        except TimeoutError:
            return {"refused": f"reading it took longer than {self._limits.seconds:g} seconds"}
        except (EOFError, ConnectionError):
            return {"refused": "its parser died of it: it is broken, hostile, or needs more memory than is allowed"}
        finally:
            if not whole:
                await self.aclose()

    async def _started(self) -> Process:
        if self._child is None or self._child.returncode is not None:
            # Hostile files need not see our passwords; and a thread of a numeric library reserves memory that counts against the limit.
            environment = {name: os.environ[name] for name in _SEEN if name in os.environ} | dict.fromkeys(_ONE_THREAD, "1")
            command = (sys.executable, "-m", "capibara_flow.engines.parsing.child", str(self._limits.memory))
            self._child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)
        return self._child

    async def aclose(self) -> None:
        """End the child; the next file starts another."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await asyncio.shield(child.wait())


async def _exchanged(child: Process, head: bytes, data: bytes) -> dict[str, Any]:
    if child.stdin is None or child.stdout is None:
        raise EOFError
    child.stdin.write(head)
    child.stdin.write(data)
    pieces: list[bytes] = []
    _, _ = await asyncio.gather(child.stdin.drain(), _read_line(child.stdout, pieces))
    answer: dict[str, Any] = orjson.loads(b"".join(pieces))
    return answer


async def _read_line(stream: asyncio.StreamReader, pieces: list[bytes]) -> None:
    """A line of any length."""
    while not (pieces and pieces[-1].endswith(b"\n")):
        piece = await stream.read(1 << 20)
        if not piece:
            raise EOFError
        pieces.append(piece)


def _parsed(told: dict[str, Any]) -> Parsed:
    updated = datetime.fromisoformat(told["updated"]) if told["updated"] else None
    blocks = tuple(Block(**block) for block in told["blocks"])
    return Parsed(told["text"], blocks, told["title"], told["language"], updated, told["media_type"])
