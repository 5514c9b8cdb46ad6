"""Files that hurt their parser hurt nothing else."""

import asyncio
import sys
from asyncio.subprocess import PIPE

import pytest

from capibara_flow.engines.parsing.sandbox import Limits, Parsers
from capibara_flow.errors import DocumentRefused
from tests.engines.parsing.files import pdf, word
from tests.waiting import until

HOSTILE = """
import sys, time
line = sys.stdin.buffer.readline()
{deed}
"""


async def test_one_child_reads_file_after_file_and_refuses_what_is_broken() -> None:
    parsers = Parsers()
    try:
        assert (await parsers.parse("Hola, ¿qué tal están ustedes hoy?".encode(), "a.txt")).language == "es"
        child = parsers._child
        with pytest.raises(DocumentRefused, match="PDF is broken"):
            await parsers.parse(b"%PDF-1.4 broken", "a.pdf")
        both = await asyncio.gather(parsers.parse(pdf([["Hola mundo"]]), "a.pdf"), parsers.parse(word(), "b.docx"))
        assert [each.text[:4] for each in both] == ["Hola", "La c"]
        assert both[1].headings[0].title == "La capibara"
        assert parsers._child is child
    finally:
        await parsers.aclose()


async def test_what_is_too_large_or_empty_never_reaches_the_child() -> None:
    parsers = Parsers(Limits(size=1000))
    with pytest.raises(DocumentRefused, match=r"more than the 0 MB that are allowed"):
        await parsers.parse(b"a" * 1001, "a.txt")
    with pytest.raises(DocumentRefused, match="empty"):
        await parsers.parse(b"  ", "a.txt")
    assert parsers._child is None


@pytest.mark.parametrize(
    ("deed", "why"),
    [("time.sleep(600)", "longer than"), ("sys.exit(1)", "parser died"), ("import os; os.kill(os.getpid(), 9)", "parser died")],
)
async def test_a_file_that_hangs_or_kills_its_parser_is_refused_and_the_next_is_read(deed: str, why: str) -> None:
    parsers = Parsers(Limits(seconds=1))
    parsers._child = hostile = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOSTILE.format(deed=deed), stdin=PIPE, stdout=PIPE
    )
    with pytest.raises(DocumentRefused, match=why):
        await parsers.parse(b"x" * 300_000, "a.txt")
    assert hostile.returncode is not None
    parsers._limits = Limits()
    try:
        assert (await parsers.parse(b"alive", "a.txt")).text == "alive"
    finally:
        await parsers.aclose()


async def test_a_file_that_needs_too_much_memory_is_refused() -> None:
    parsers = Parsers(Limits(memory=350 * 1024**2))
    try:
        with pytest.raises(DocumentRefused, match="memory"):
            await parsers.parse(b"<b>x</b>" * 1_500_000, "a.html")
        assert (await parsers.parse(b"alive", "a.txt")).text == "alive"
    finally:
        await parsers.aclose()


async def test_who_gives_up_waiting_leaves_no_half_answer_behind() -> None:
    parsers = Parsers()
    try:
        waiting = asyncio.create_task(parsers.parse(b"first", "a.txt"))
        await until(lambda: parsers._child is not None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await parsers.parse(b"second", "a.txt")).text == "second"
    finally:
        await parsers.aclose()
