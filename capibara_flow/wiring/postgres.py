"""The PostgreSQL of this installation: one that is named, or an embedded one that runs as long as somebody in this process uses it."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from capibara_flow.settings import KnowledgeSettings, SettingsError


class Server:
    """The embedded server of *folder*: started for its first user, stopped behind its last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changing = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._url = ""
        self._users = self._lasting = 0

    @property
    def wanted(self) -> bool:
        """Whether it runs for somebody who is not only passing."""
        return self._lasting > 0

    @asynccontextmanager
    async def used(self, *, passing: bool = False) -> AsyncIterator[str]:
        """Its URL, for the length of a block; raises ``CannotStart`` and ``StoreInUse``."""
        async with self._changing:
            if not self._users:
                await self._start()
            self._users += 1
            self._lasting += not passing
        try:
            yield self._url
        finally:
            async with self._changing:
                self._users -= 1
                self._lasting -= not passing
                if not self._users:
                    await self._stack.aclose()

    async def _start(self) -> None:
        from capibara_flow.engines.postgres.embedded import EmbeddedPostgres  # noqa: PLC0415  who names a server loads none of it

        self._folder.parent.mkdir(parents=True, exist_ok=True)
        server = EmbeddedPostgres(self._folder)
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            # The server dies with the thread that started it, so that thread is kept for it alone.
            thread = ThreadPoolExecutor(1, thread_name_prefix="postgres")
            stack.callback(thread.shutdown)

            async def stop() -> None:
                await loop.run_in_executor(thread, server.stop)

            stack.push_async_callback(stop)
            await loop.run_in_executor(thread, server.start)
            self._url, self._stack = server.url, stack.pop_all()


_servers: dict[Path, Server] = {}


def embedded(settings: KnowledgeSettings) -> Server:
    """The embedded server of *settings*, the same for all of this process; raises ``SettingsError`` where there is no folder for it."""
    if settings.folder is None:
        raise SettingsError("no folder for the stores that come along: set CAPIBARA_KNOWLEDGE__FOLDER")
    folder = (settings.folder / "postgres").absolute()
    return _servers.setdefault(folder, Server(folder))


@asynccontextmanager
async def postgres(settings: KnowledgeSettings, *, passing: bool = False) -> AsyncIterator[str]:
    """The URL of the server that is named, or of the embedded one, for the length of a block."""
    if settings.postgres:
        yield settings.postgres.get_secret_value()
        return
    async with embedded(settings).used(passing=passing) as url:
        yield url
