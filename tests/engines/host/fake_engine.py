"""A llama-server as small as can be, as a program: ``fake_engine.py --port N --alias NAME [...]``, its faults by options.

It records how it was started (``--record FILE``: one JSON line a start) and how many of it there are at a time is for the tests to
see in ``/proc``. Its answer is ``NAME says 0 1 2 ...``, a word each ``--pace`` seconds; one that was begun it continues.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from aiohttp import web

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--alias", required=True)
parser.add_argument("--model", default="")
parser.add_argument("--record", type=Path)
parser.add_argument("--load-seconds", type=float, default=0)
parser.add_argument("--gate", type=Path, help="loaded once this file is there")
parser.add_argument("--pace", type=float, default=0.01)
parser.add_argument("--words", type=int, default=5)
parser.add_argument("--dies-loading", action="store_true")
parser.add_argument("--stubborn", action="store_true", help="SIGTERM does not end it")
parser.add_argument("--offspring", action="store_true", help="starts a process in a session of its own")
parser.add_argument("--open", action="store_true", help="answers without a key")
parser.add_argument("--mute", action="store_true", help="healthy, but no completion works")
parser.add_argument("--answers", type=Path, help="hangs while this file is there")
options, _ = parser.parse_known_args()


def refused(request: web.Request) -> bool:
    key = os.environ.get("LLAMA_API_KEY", "")
    return not options.open and request.headers.get("Authorization") != f"Bearer {key}"


async def health(_: web.Request) -> web.Response:
    if options.answers and options.answers.exists():
        await asyncio.Event().wait()
    return web.json_response({"status": "ok"})


async def told(request: web.Request) -> web.Response:
    record({"told": request.path_qs})
    return web.Response()


async def chat(request: web.Request) -> web.StreamResponse:
    if refused(request):
        return web.json_response({"error": {"message": "Invalid API Key"}}, status=401)
    if options.mute:
        return web.json_response({"error": {"message": "out of memory"}}, status=500)
    body = await request.json()
    if not body.get("stream"):
        return web.json_response({"choices": [{"message": {"content": "Hi"}, "finish_reason": "length"}]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    words = [f"{options.alias} says", *(f" {number}" for number in range(options.words))]
    begun = body["messages"][-1]["content"] if body.get("continue_final_message") else ""
    for number, word in enumerate(words, 1):
        if len("".join(words[:number])) <= len(begun):
            continue
        await response.write(frame({"delta": {"content": word}}))
        await asyncio.sleep(options.pace)
    await response.write(frame({"delta": {}, "finish_reason": "stop"}))
    return response


def frame(choice: dict[str, object]) -> bytes:
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def record(line: dict[str, object]) -> None:
    if options.record:
        with options.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"loading {options.alias}", flush=True)
    record({"argv": sys.argv[1:], "pid": os.getpid(), "environment": dict(os.environ)})
    if options.offspring:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        record({"offspring": child.pid})
    if options.dies_loading:
        sys.exit("no kernel image is available: secret/path/of/weights")
    time.sleep(options.load_seconds)
    while options.gate and not options.gate.exists():
        time.sleep(0.01)
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/sleep", told)
    app.router.add_post("/wake_up", told)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, shutdown_timeout=0.1, handle_signals=not options.stubborn)


main()
