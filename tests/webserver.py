"""A web server in a thread, for tests that are not asynchronous themselves."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web


@contextmanager
def serving(routes: dict[str, Callable]) -> Iterator[str]:
    """A web server in a thread of its own: *routes* are handlers by path, or by "METHOD path"."""
    loop, ready, address = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        server = web.Application()
        for where, handler in routes.items():
            method, _, path = where.rpartition(" ")
            server.router.add_route(method or "GET", path, as_coroutine(handler))
        runner = web.AppRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(runner.addresses[0][1])
        return runner

    def main() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=main)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{address[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def as_coroutine(handler: Callable) -> Callable:
    async def call(request: web.Request) -> web.StreamResponse:
        answer = handler(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    return call
