"""Files that an operator edits while we run: what is good is taken, what is bad is refused with its line, and what was stays."""

import asyncio
import hashlib
import inspect
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from capibara_flow.errors import CapibaraError, Transient
from capibara_flow.settings import SettingsError
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log

Held = TypeVar("Held")

#: What reports leave out of a refusal: where on this machine a file is; and how much of it they tell, in characters.
_FOLDERS = re.compile(r"(?:/[^/\s:'\"]+)*/(?=[^/\s:'\"]+:)")
_MOST = 500


class Watched(Generic[Held]):
    """What *read* makes of the file at *path*, now and after each change of its content; *on_change* gets the new value.

    *read* raises ``SettingsError`` when it cannot be used: at first to whoever makes a ``Watched``, later to the log. *on_change* may
    refuse a value in the same way, or with one of our own errors. A change counts once it has been the same at two looks: a file that is
    still being written may be good by chance. Content is compared, not times: editors write in place or put another file there.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], Held],
        on_change: Callable[[Held], Awaitable[object] | object] = lambda _: None,
        *,
        every: float = 1.0,
    ) -> None:
        self.path = path
        self._read, self._on_change, self._every = read, on_change, every
        self._seen = self._known = self._digest()
        self._value = read(path)
        self._version = self._known
        self._refusal: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._checking = asyncio.Lock()

    @property
    def value(self) -> Held:
        """What was read last of what was good."""
        return self._value

    def facts(self) -> dict[str, Any]:
        """Which version is in use, and why a newer one is not, if so: for reports, which tell of no folders."""
        refused = _FOLDERS.sub("", self._refusal)[:_MOST] if self._refusal else None
        return {"file": self.path.name, "version": (self._version or "")[:12], "refused": refused}

    def start(self) -> None:
        """Begin to look at the file every so many seconds."""
        self._task = self._task or asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        await ended(self._task)
        self._task = None

    async def check(self) -> bool:
        """Look now, and take what is there at once; whether it was new and good."""
        async with self._checking:
            self._seen = await asyncio.to_thread(self._digest)
            return await self._take()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            async with self._checking:
                before, self._seen = self._seen, await asyncio.to_thread(self._digest)
                if self._seen == before:
                    await self._take()  # whatever it meets is a refusal: the next look has to come

    async def _take(self) -> bool:
        """Take what was seen, unless it is known already, be it good or bad."""
        if self._seen == self._known:
            return False
        self._known = self._seen
        if self._seen is None:
            log.warning("file_gone", file=str(self.path), kept=self.facts()["version"])
            return False
        if self._seen == self._version:
            self._refusal = None  # it is again as it was before somebody spoiled or removed it
            return False
        try:
            value = await asyncio.to_thread(self._read, self.path)
            told = self._on_change(value)
            if inspect.isawaitable(told):
                await told
        except Exception as error:  # noqa: BLE001  whatever a file makes us do, the old one stays and the next one is looked at
            if isinstance(error, Transient):
                self._known = self._version  # not the file's fault: it is tried again
            self._refusal = str(error) or type(error).__name__
            foreseen = isinstance(error, SettingsError | CapibaraError)
            log.error("file_refused", file=str(self.path), error=self._refusal, kept=self.facts()["version"], exc_info=not foreseen)
            return False
        self._value, self._version, self._refusal = value, self._seen, None
        log.info("file_taken", file=str(self.path), version=self._seen[:12])
        return True

    def _digest(self) -> str | None:
        """The content's fingerprint, none when there is no file to read."""
        with suppress(OSError):
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        return None
