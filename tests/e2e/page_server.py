"""What the page's tests need beside a browser: an edge with a scripted engine behind it, and a wire that can be cut.

The stand-in edge speaks the native contract (``POST /api/chat``, ``GET .../events``, ``DELETE``, ``GET /v1/models``)
with everything in memory. The wire works in front of any edge.
"""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

PAGE = Path(__file__).parents[2] / "capibara_flow" / "edge" / "page"
CSP = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}
MODELS = [{"id": "eco", "object": "model", "scripted": True}, {"id": "phi4_fast", "object": "model"}]
ENDS = {"done", "error"}

MARKDOWN = """## El carpincho, en breve

El **capibara** (*Hydrochoerus hydrochaeris*) es el roedor más grande del mundo: vive junto al agua, come hierba y no tiene prisa.

1. Come hierba y plantas acuáticas, unos 3 kg al día.
2. Vive en grupos de diez a veinte.
3. Se lleva bien con casi todo el mundo:
   - aves que se posan en su lomo,
   - monos, tortugas y algún gato.

| Dato | Valor |
|---|---:|
| Peso | 35–66 kg |
| Largo | 1,0–1,3 m |

```python
def saluda(nombre: str) -> str:
    return f"Hola, {nombre}. Con calma."
```

> En Japón los bañan en aguas termales con mandarinas.

Más en [Wikipedia](https://es.wikipedia.org/wiki/Hydrochoerus_hydrochaeris) o con `saluda("Ana")`.
"""
XSS = """Antes <img src=x onerror="window.pwned=1"> después.

<script>window.pwned = 2</script>

[pulsa](javascript:window.pwned=3) <svg onload="window.pwned=4"></svg> <p class="problem" onclick="window.pwned=5">disfraz</p>

Fin del ataque.
"""


@dataclass
class Script:
    """What the engine recites: *pieces* of text, *pace* seconds apart; it may *fail* instead of finishing."""

    pieces: list[str]
    reasoning: list[str] = field(default_factory=list)
    pace: float = 0.0
    fail: bool = False


def script_for(question: str) -> Script:
    """The script that *question* asks for."""
    if found := re.search(r"cuenta hasta (\d+)", question):
        return Script([f"{n} " for n in range(1, int(found[1]) + 1)], pace=0.06)
    return next((script for word, script in SCRIPTS.items() if word in question), Script(["Has dicho: ", question]))


SCRIPTS = {
    "falla": Script(["Empiezo ", "bien, ", "pero "], fail=True, pace=0.02),
    "xss": Script(re.findall(r".{1,7}", XSS, re.DOTALL)),
    "markdown": Script(re.findall(r"\S+\s*", MARKDOWN), pace=0.004),
    "piensa": Script(["La respuesta ", "es 42."], reasoning=["Primero ", "pienso un poco."], pace=0.02),
}


@dataclass
class Turn:
    """The log of a turn: batches of (event, data), the position in the log being the sequence."""

    id: str
    batches: list[list[tuple[str, dict[str, Any]]]] = field(default_factory=list)
    grown: asyncio.Condition = field(default_factory=asyncio.Condition)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def say(self, *events: tuple[str, dict[str, Any]]) -> None:
        """Store *events* as one batch."""
        async with self.grown:
            self.batches.append([(name, {"turn": self.id, **data}) for name, data in events])
            self.grown.notify_all()

    async def after(self, sequence: int) -> AsyncIterator[tuple[int, list[tuple[str, dict[str, Any]]]]]:
        """The batches after *sequence*, to the final one."""
        while True:
            async with self.grown:
                while len(self.batches) <= sequence:
                    await self.grown.wait()
            batch = self.batches[sequence]
            sequence += 1
            yield sequence, batch
            if batch[-1][0] in ENDS:
                return


class StandIn:
    """An edge with a scripted engine, all in memory."""

    def __init__(self) -> None:
        self.turns: dict[str, Turn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application()
        app.router.add_post("/api/chat", self._ask)
        app.router.add_get("/api/chat/{turn}/events", self._resume)
        app.router.add_delete("/api/chat/{turn}", self._cancel)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/", self._file)
        app.router.add_get("/page/{path:.+}", self._file)
        return app

    async def _file(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / request.match_info.get("path", "index.html"), headers=CSP)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": MODELS})

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        question = body["messages"][-1]["content"]
        turn = Turn(f"T{next(self._numbers):06d}")
        self.turns[turn.id] = turn
        task = asyncio.create_task(perform(turn, script_for(question), body.get("model", "eco")))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await stream(request, turn, 0)

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        turn = self.turns.get(request.match_info["turn"])
        if turn is None:
            body = {"type": "about:blank", "title": "turn unknown", "status": 404, "detail": "there is no such turn"}
            return web.json_response(body, status=404, content_type="application/problem+json")
        after = int(request.headers.get("Last-Event-ID") or request.query.get("after", 0))
        return await stream(request, turn, after)

    async def _cancel(self, request: web.Request) -> web.Response:
        if turn := self.turns.get(request.match_info["turn"]):
            turn.cancelled.set()
        return web.Response(status=202)


async def perform(turn: Turn, script: Script, model: str) -> None:
    """Play *script* into *turn*: two tokens a batch, so that a wire can be cut in the middle of one."""
    decision = {"model_id": model, "route_name": "general", "complexity": "simple", "confidence": 0.87}
    await turn.say(("routed", {**decision, "reasoning": "no rule claimed it", "plan": [f"call {model}"]}))
    for piece in script.reasoning:
        await turn.say(("token", {"text": "", "reasoning": piece}))
    for start in range(0, len(script.pieces), 2):
        await turn.say(*(("token", {"text": piece}) for piece in script.pieces[start : start + 2]))
        with suppress(TimeoutError):
            await asyncio.wait_for(turn.cancelled.wait(), script.pace * 2)
        if turn.cancelled.is_set():
            break
    await turn.say(*ending(script, model, turn.cancelled.is_set()))


def ending(script: Script, model: str, cancelled: bool) -> list[tuple[str, dict[str, Any]]]:
    """The last events of a turn."""
    if script.fail:
        return [("error", {"type": "about:blank", "title": "engine broke", "status": 502, "detail": "stalled", "retryable": True})]
    usage = {"prompt_tokens": 12, "completion_tokens": len(script.pieces), "burnt_tokens": 0, "attempts": 1}
    timings = {"first_token_seconds": 0.004, "total_seconds": 0.4}
    done = {"finish_reason": "cancelled" if cancelled else "stop", "model_id": model, "timings": timings}
    return [("usage", usage), ("done", done)]


async def stream(request: web.Request, turn: Turn, after: int) -> web.StreamResponse:
    """*turn* after batch *after* as server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Capibara-Turn": turn.id, "Cache-Control": "no-store"})
    await response.prepare(request)
    opening = {"turn": turn.id, "created": 0, "principal": "anonymous"}
    await response.write(f": hello\n\nevent: turn\ndata: {json.dumps(opening)}\n\n".encode())
    async for sequence, batch in turn.after(after):
        events = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in batch]
        events[-1] = f"id: {sequence}\n{events[-1]}"
        await response.write("".join(events).encode())
    return response


@asynccontextmanager
async def serve(app: web.Application) -> AsyncIterator[str]:
    """Serve *app* on a free port; the base URL."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Wire:
    """A TCP wire to *target* that can be cut, and that can be held after certain bytes have passed to the client."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._hold_after: re.Pattern[bytes] | None = None
        self.cuts = 0
        self.broken = False

    def hold_after(self, pattern: bytes) -> None:
        """Let nothing more pass a connection on which *pattern* (a regular expression) has passed; only once."""
        self._hold_after = re.compile(pattern)

    def cut(self) -> None:
        """Close all connections now."""
        self.cuts += 1
        for writer in list(self._writers):
            writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The base URL of the wire's near end."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.close()
            self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.broken:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer, watched=False), self._carry(far_reader, writer, watched=True))
        finally:
            self._writers -= {writer, far_writer}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, watched: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                found = self._hold_after.search(data) if watched and self._hold_after else None
                writer.write(data[: found.end()] if found else data)
                await writer.drain()
                if found:
                    self._hold_after = None
                    await writer.wait_closed()
        writer.close()
