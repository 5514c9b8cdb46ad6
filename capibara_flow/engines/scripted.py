"""An engine that answers from a TOML file, for demonstrations and tests: OpenAI's dialect, and always labelled as scripted.

Run it with ``python -m capibara_flow.engines.scripted FILE``. ``GET /counts`` tells what it has done, ``GET /runs`` the last answers one
by one: claims about aborted and repeated calls are checked here, where they must show.
"""

import argparse
import asyncio
import secrets
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from aiohttp import web

from capibara_flow.engines.script import Answer, Script, load_script, question_of, rest_of, text_of

MODEL = "scripted"
#: As many runs are remembered.
MOST_RUNS = 1000


@dataclass
class Counts:
    """What the engine has done since it was started, and how many answers are *running* now."""

    requests: int = 0
    aborted: int = 0
    tokens: int = 0
    running: int = 0


@dataclass
class Run:
    """One answer to *question*, from the character *prefix* of it on; times are seconds since the epoch.

    ``aborted``: the client went away. ``broken``: the script wanted it to go wrong.
    """

    number: int
    question: str
    prefix: int
    began: float
    ended: float | None = None
    how: Literal["running", "done", "broken", "aborted"] = "running"
    tokens: int = 0


_COUNTS = web.AppKey("counts", Counts)
_RUNS = web.AppKey("runs", deque[Run])
_SCRIPT = web.AppKey("script", Script)
#: How often each answer has failed, by the identity of the answer.
_FAILED = web.AppKey("failed", Counter[int])


@dataclass(frozen=True)
class _Speech:
    """One answer on its way to one client: *tokens* from *start* of the whole answer on, and how it ends."""

    answer: Answer
    question: str
    start: int
    tokens: tuple[str, ...]
    prefix: str
    finish_reason: str
    prompt_tokens: int
    wants_usage: bool
    fails: bool

    @property
    def usage(self) -> dict[str, int]:
        made = len(self.tokens)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made, "total_tokens": self.prompt_tokens + made}

    def failing_at(self, index: int) -> str | None:
        """Which misfortune waits before the token *index* of what is still to be said."""
        fail, position = self.answer.fail, self.start + index
        if not self.fails or (self.start and index == 0):
            return None
        waiting = {"broken": fail.broken_after, "error": fail.error_after, "hang": fail.hang_after}
        return next((kind for kind, after in waiting.items() if after == position), None)


class _BreaksOff(Exception):
    """The script wants the connection to end here."""


class _ReportsError(Exception):
    """The script wants the engine to report an error here."""


def _speech(body: dict[str, Any], script: Script, failed: Counter[int]) -> _Speech:
    messages = body["messages"]
    answer = script.choose(messages)
    last = messages[-1]
    prefix = text_of(last) if last.get("role") == "assistant" and body.get("continue_final_message") else ""
    question = question_of(messages)
    spoken = answer.spoken(question)
    start, tokens = rest_of(spoken, prefix)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(tokens)
    times = answer.fail.times
    return _Speech(
        answer=answer,
        question=question,
        start=start,
        tokens=tokens[:limit],
        prefix=prefix if tokens != spoken else "",
        finish_reason="length" if limit < len(tokens) else answer.ends_with,
        prompt_tokens=sum(len(text_of(message).split()) for message in messages),
        wants_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        fails=times == 0 or failed[id(answer)] < times,
    )


async def _chat(request: web.Request) -> web.StreamResponse:
    app = request.app
    app[_COUNTS].requests += 1
    body, problem = _understood(await request.read())
    if problem:
        return _error(400, problem)
    speech = _speech(body, app[_SCRIPT], app[_FAILED])
    status = speech.answer.fail.before
    if status is not None and speech.fails:
        app[_FAILED][id(speech.answer)] += 1
        return _error(status, f"the script wants status {status}")
    with _counted(app, speech) as run:
        return await (_stream if body.get("stream") else _whole)(request, speech, run)


@contextmanager
def _counted(app: web.Application, speech: _Speech) -> Iterator[Run]:
    """Count the answer that the block gives."""
    counts = app[_COUNTS]
    run = Run(counts.requests, speech.question, len(speech.prefix), time.time())
    app[_RUNS].append(run)
    counts.running += 1
    try:
        yield run
        run.how = "done" if run.how == "running" else run.how
    except (asyncio.CancelledError, ConnectionError):
        counts.aborted += 1
        run.how = "aborted"
        raise
    finally:
        counts.running -= 1
        run.ended = time.time()


def _understood(raw: bytes) -> tuple[dict[str, Any], str]:
    try:
        body = orjson.loads(raw)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        return {}, "messages must be a list of objects, one at least"
    return body, ""


async def _whole(request: web.Request, speech: _Speech, run: Run) -> web.Response:
    try:
        said = [token async for token in _paced(request.app, speech, run)]
    except _ReportsError as error:
        return _error(500, str(error))
    except _BreaksOff:
        _hang_up(request)
        return web.Response()
    message: dict[str, Any] = {"role": "assistant", "content": (speech.prefix + "".join(said)) or None}
    if speech.answer.reasoning:
        message["reasoning_content"] = speech.answer.reasoning
    if calls := _calls(speech.answer):
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": speech.finish_reason}
    return web.Response(
        body=orjson.dumps({**_frame("chat.completion"), "choices": [choice], "usage": speech.usage}), content_type="application/json"
    )


async def _stream(request: web.Request, speech: _Speech, run: Run) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    try:
        async for frame in _frames(request.app, speech, run):
            await response.write(b"data: %b\n\n" % orjson.dumps(frame))
        await response.write(b"data: [DONE]\n\n")
    except _ReportsError as error:
        # As llama-server does it: the error, then the end, without a [DONE].
        await response.write(b"data: %b\n\n" % orjson.dumps(_problem(500, str(error))))
    except _BreaksOff:
        _hang_up(request)
    return response


async def _frames(app: web.Application, speech: _Speech, run: Run) -> AsyncIterator[dict[str, Any]]:
    head = _frame("chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    yield chunk({"role": "assistant", "content": None})
    if speech.answer.reasoning and not speech.prefix:
        yield chunk({"reasoning_content": speech.answer.reasoning})
    async for token in _paced(app, speech, run):
        yield chunk({"content": token})
    for index, call in enumerate(_calls(speech.answer)):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, speech.finish_reason)
    if speech.wants_usage:
        yield {**head, "choices": [], "usage": speech.usage}


async def _paced(app: web.Application, speech: _Speech, run: Run) -> AsyncIterator[str]:
    """The tokens, by a timetable, so that delays do not add up."""
    began = time.monotonic()
    for index, token in enumerate((*speech.tokens, None)):
        if misfortune := speech.failing_at(index):
            app[_FAILED][id(speech.answer)] += 1
            run.how = "running" if misfortune == "hang" else "broken"
            await _suffer(misfortune)
        if token is None:
            return
        if (wait := began + speech.answer.due(index) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        app[_COUNTS].tokens += 1
        run.tokens += 1
        yield token


async def _suffer(misfortune: str) -> None:
    if misfortune == "broken":
        raise _BreaksOff
    if misfortune == "error":
        raise _ReportsError("the script wants an error")
    await asyncio.Event().wait()


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.close()


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id or f"call_scripted_{index}", "type": "function", "function": {"name": call.name, "arguments": call.text}}
        for index, call in enumerate(answer.tool_calls)
    ]


def _frame(kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": MODEL,
        "system_fingerprint": MODEL,
    }


def _problem(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def _error(status: int, message: str) -> web.Response:
    return web.json_response(_problem(status, message), status=status)


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "scripted"}]})


async def _health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _counts(request: web.Request) -> web.Response:
    return web.json_response(asdict(request.app[_COUNTS]))


async def _runs(request: web.Request) -> web.Response:
    return web.json_response([asdict(run) for run in request.app[_RUNS]])


async def _label(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Capibara-Engine"] = MODEL


def application(script: Script) -> web.Application:
    """The engine as an aiohttp application."""
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app[_SCRIPT], app[_COUNTS], app[_FAILED], app[_RUNS] = script, Counts(), Counter(), deque(maxlen=MOST_RUNS)
    app.on_response_prepare.append(_label)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    app.router.add_get("/counts", _counts)
    app.router.add_get("/runs", _runs)
    return app


async def serve(script: Script, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, str]:
    """Start the engine; returns its runner, to be cleaned up by the caller, and its address. Raises ``OSError``."""
    # Without cancellation a silent handler would never learn that its client has gone.
    runner = web.AppRunner(application(script), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError:
        await runner.cleanup()
        raise
    bound = runner.addresses[0][1]
    return runner, f"http://{f'[{host}]' if ':' in host else host}:{bound}"


async def _serve_until_signalled(script: Script, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner, url = await serve(script, host, port)
    try:
        print(f"scripted engine at {url}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def run(path: Path | str, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serve the script at *path* until SIGTERM or SIGINT; prints the address. Raises ``SettingsError``, ``OSError``."""
    asyncio.run(_serve_until_signalled(load_script(path), host, port))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m capibara_flow.engines.scripted", description="An engine that answers from a script.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(arguments)
    run(options.file, options.host, options.port)


if __name__ == "__main__":
    main()
