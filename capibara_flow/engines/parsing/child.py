"""The process that parses: takes files on its standard input, gives what is in them on its standard output, one after the other.

A file is a line of JSON (``name``, ``media_type``, ``size``, ``seconds``) and its bytes; the answer is one line of JSON.
"""

import os
import resource
import signal
import sys
from dataclasses import replace
from importlib import import_module
from typing import BinaryIO

import orjson

from capibara_flow.domain.parsed import Parsed
from capibara_flow.engines.parsing.media import DOCX, HTML, MARKDOWN, PDF, TEXT, media_of
from capibara_flow.errors import DocumentRefused

_PARSERS = {TEXT: "text", MARKDOWN: "markdown", HTML: "html", PDF: "pdf", DOCX: "docx"}


def parse(data: bytes, name: str = "", declared: str | None = None) -> Parsed:
    """The text of a file; raises ``DocumentRefused``. Only as safe as the parser: others ask ``sandbox.Parsers``."""
    if not data.strip():
        raise DocumentRefused("it is empty")
    media = media_of(data, name, declared)
    parser = import_module(f"capibara_flow.engines.parsing.{_PARSERS[media]}")
    parsed: Parsed = parser.parse(data, declared)
    if not any(each.isalnum() for each in parsed.text):
        raise DocumentRefused("there is no text in it")
    languages = import_module("capibara_flow.engines.parsing.languages")
    return replace(parsed, language=languages.language_of(parsed.text))


def _answer(data: bytes, name: str, declared: str | None) -> bytes:
    try:
        return orjson.dumps({"parsed": parse(data, name, declared)})
    except DocumentRefused as error:
        return orjson.dumps({"refused": str(error)})
    except MemoryError:
        return orjson.dumps({"refused": "it needs more memory to read than is allowed", "last": True})
    except RecursionError:
        return orjson.dumps({"refused": "it is nested too deeply"})
    except Exception as error:  # noqa: BLE001 - parsers fail in any way at hostile files, and the answer says in which
        return orjson.dumps({"refused": f"it is broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def serve(files: BinaryIO, answers: BinaryIO) -> None:
    """Answer every file, until there is none; a file that takes longer than its *seconds* ends the process."""
    while line := files.readline():
        told = orjson.loads(line)
        data = files.read(told["size"])
        signal.setitimer(signal.ITIMER_REAL, told["seconds"])
        answer = _answer(data, told["name"], told["media_type"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(answer + b"\n")
        answers.flush()
        if b'"last":true' in answer[-20:]:
            return


def main() -> None:
    """Limit this process's memory to what the first argument says (bytes), and serve."""
    _limit(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints is no answer
    serve(sys.stdin.buffer, answers)


def _limit(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):
        return  # systems without such a limit


if __name__ == "__main__":
    main()
