"""The aiohttp application: routes, errors in the right dialect, CORS, and a graceful end."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from capibara_flow import __version__
from capibara_flow.domain.refusing import Refused
from capibara_flow.edge.asked import IDEMPOTENCY_KEY, REPLAYED
from capibara_flow.edge.bodies import RouteBody
from capibara_flow.edge.chat import NativeChat
from capibara_flow.edge.completions import Completions
from capibara_flow.edge.door import Door
from capibara_flow.edge.openapi import document
from capibara_flow.edge.problems import AGAIN, respond
from capibara_flow.edge.rag import Knowledge
from capibara_flow.edge.turns import KeptTurns
from capibara_flow.edge.usage import Usage
from capibara_flow.errors import CapibaraError, Unauthorized
from capibara_flow.telemetry import HTTP, log

PAGE = Path(__file__).parent / "page"
#: The page and its files: nothing from other hosts, nothing told to them, and asked for anew after an update.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": f"Content-Type, Authorization, Last-Event-ID, {IDEMPOTENCY_KEY}",
    "Access-Control-Max-Age": "600",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Sign = Callable[[web.Request, web.StreamResponse], Awaitable[None]]

__all__ = ["Door", "build", "runner_of", "serve", "served"]


def build(door: Door) -> web.Application:
    """The application around *door*."""
    preflight, sign = _cors(frozenset(door.edge.origins))
    app = web.Application(
        middlewares=[_observed, preflight, _errors, _own_pages_only(frozenset(door.edge.origins))], client_max_size=door.edge.max_body_bytes
    )
    app.on_response_prepare.append(sign)
    app.on_response_prepare.append(_guard_page)
    native, completions, house, kept = NativeChat(door), Completions(door), _House(door), KeptTurns(door)
    app.router.add_post("/api/chat", native.create)
    app.router.add_get("/api/chat/{turn}/events", native.events, allow_head=False)
    app.router.add_delete("/api/chat/{turn}", native.cancel)
    app.router.add_post("/v1/chat/completions", completions.create)
    app.router.add_get("/v1/chat/completions/{turn}/events", completions.events, allow_head=False)
    app.router.add_get("/v1/models", completions.models)
    app.router.add_get("/api/turns", kept.listed, allow_head=False)
    app.router.add_get("/api/turns/{turn}", kept.one, allow_head=False)
    app.router.add_get("/api/usage", Usage(door).read, allow_head=False)
    knowledge = Knowledge(door)
    app.router.add_post("/api/rag/documents", knowledge.ingest)
    app.router.add_get("/api/rag/documents", knowledge.listed, allow_head=False)
    app.router.add_get("/api/rag/documents/{document}", knowledge.shown, allow_head=False)
    app.router.add_delete("/api/rag/documents/{document}", knowledge.removed)
    app.router.add_post("/api/rag/search", knowledge.search)
    app.router.add_post("/api/router/test", house.route)
    app.router.add_get("/health", house.health)
    app.router.add_get("/ready", house.ready)
    app.router.add_get("/stats", house.stats)
    app.router.add_get("/metrics", house.metrics)
    app.router.add_get("/openapi.json", house.openapi)
    app.router.add_get("/", house.page)
    app.router.add_static("/page", PAGE)
    return app


class _House:
    """What is not chat: health, figures, documents, the page."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._since = time.time()

    async def route(self, request: web.Request) -> web.Response:
        """``POST /api/router/test``: who would answer, and why."""
        identity = self._door.identify(request)
        body = await self._door.read(request, RouteBody)
        decision = await self._door.preview(body.request(), identity)
        return web.json_response(decision.model_dump())

    async def health(self, _: web.Request) -> web.Response:
        """``GET /health``: this process answers."""
        return web.json_response({"status": "ok", "version": __version__})

    async def ready(self, _: web.Request) -> web.Response:
        """``GET /ready``: a turn can be served: broker, streams and workers are there."""
        missing = await self._door.turns.ready()
        return web.json_response({"ready": not missing, "missing": missing}, status=503 if missing else 200)

    async def stats(self, request: web.Request) -> web.Response:
        """``GET /stats``: what this edge has done, and what workers tell: routes taken, engines' health, experts loaded."""
        experts = [{"name": each.name, "dialect": each.dialect, "scripted": each.scripted} for each in self._door.fleet.active]
        uptime = round(time.time() - self._since, 1)
        own = {"version": __version__, "uptime_seconds": uptime, "experts": experts, **self._door.turns.facts()}
        with contextlib.suppress(Unauthorized):
            self._door.identify(request)
            own |= {"workers": await self._door.turns.reports()}
        return web.json_response(own)

    async def metrics(self, _: web.Request) -> web.Response:
        """``GET /metrics``: Prometheus text."""
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, _: web.Request) -> web.Response:
        """``GET /openapi.json``."""
        return web.json_response(document())

    async def page(self, _: web.Request) -> web.StreamResponse:
        """``GET /``: the chat page."""
        return web.FileResponse(PAGE / "index.html")


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error leaves in the shape of its dialect; only what nobody foresaw is logged as a fault."""
    try:
        return await handler(request)
    except Refused as error:
        said = error.refusal
        return respond(request, said.status, said.title, said.detail, dict(AGAIN) if said.retryable else {})
    except CapibaraError as error:
        headers = dict(AGAIN) if error.retryable else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return respond(request, error.status, error.title, str(error), headers)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        detail = f"the body is larger than {request.app._client_max_size} bytes" if error.status == 413 else error.reason
        return respond(request, error.status, error.reason.lower(), detail, {k: v for k, v in error.headers.items() if k == "Allow"})
    except (ConnectionResetError, asyncio.CancelledError):
        raise  # the client has gone: there is nobody to tell
    except Exception:  # noqa: BLE001  the last resort before the client: it must be told something, and the log everything
        log.exception("request_failed", path=request.path)
        return respond(request, 500, "internal error", "something went wrong here; the log knows what")


@web.middleware
async def _observed(request: web.Request, handler: _Handler) -> web.StreamResponse:
    response = await handler(request)
    route = request.match_info.route.resource
    HTTP.labels(route.canonical if route else "none", str(response.status)).inc()
    return response


async def _guard_page(request: web.Request, response: web.StreamResponse) -> None:
    if request.path == "/" or request.path.startswith("/page/"):
        response.headers.update(_PAGE_HEADERS)


def _cors(origins: frozenset[str]) -> tuple[Middleware, _Sign]:
    """Let pages of the configured *origins* call us (Fetch standard, CORS protocol): preflights answered, responses signed."""

    @web.middleware
    async def preflight(request: web.Request, handler: _Handler) -> web.StreamResponse:
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if asks and request.headers.get("Origin") in origins:
            return web.Response(status=204, headers=_PREFLIGHT)
        return await handler(request)

    async def sign(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Vary"] = "Origin"
        origin = request.headers.get("Origin")
        if origin in origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = f"X-Capibara-Turn, X-Capibara-Route, {REPLAYED}"

    return preflight, sign


def _own_pages_only(origins: frozenset[str]) -> Middleware:
    """Refuse what a page of somebody else makes a browser do: CORS keeps the answer from such a page, but not the deed.

    Whoever is no browser sends no ``Origin``. ``Sec-Fetch-Site``, which no page can forge (Fetch Metadata), speaks for our own page
    behind a proxy that asks us under another name.
    """

    @web.middleware
    async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None or request.method not in {"POST", "DELETE"} or origin in origins or _is_ours(request, origin):
            return await handler(request)
        return respond(request, 403, "forbidden", "pages of this origin may not ask here; CAPIBARA_EDGE__ORIGINS lists those that may")

    return guard


def _is_ours(request: web.Request, origin: str) -> bool:
    if request.headers.get("Sec-Fetch-Site") == "same-origin":
        return True
    return origin.lower() in {f"{scheme}://{request.host.lower()}" for scheme in ("http", "https")}


class _ServerLog(logging.LoggerAdapter[logging.Logger]):
    """The HTTP server's own log. What cannot be read as a request is anybody's noise, and may hold secrets: a line without its words."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **more: Any) -> None:
        """Log a fault of the server's own."""
        if isinstance(exc_info, HttpProcessingError):
            log.debug("request_unreadable", reason=type(exc_info).__name__)
        else:
            super().exception(msg, *args, exc_info=exc_info, **more)


def runner_of(door: Door, *, handler_cancellation: bool = True, shutdown_timeout: float = 0.5) -> web.AppRunner:
    """The server around *door*, not yet listening."""
    return web.AppRunner(
        build(door),
        handler_cancellation=handler_cancellation,
        shutdown_timeout=shutdown_timeout,
        access_log=None,
        logger=_ServerLog(server_logger, {}),
    )


@contextlib.asynccontextmanager
async def served(door: Door) -> AsyncIterator[None]:
    """Serve for the length of a block; streams that are open at its end are cut, and resume elsewhere."""
    runner = runner_of(door)
    await runner.setup()
    try:
        await web.TCPSite(runner, door.edge.host, door.edge.port, reuse_address=True).start()
        log.info("edge_ready", addresses=[str(address) for address in runner.addresses])
        yield
    finally:
        await runner.cleanup()


async def serve(door: Door) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    async with served(door):
        for each in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(each, stop.set)
        await stop.wait()
