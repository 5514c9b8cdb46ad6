"""Reading what questions are about: a routes file is learned away from the event loop, and anew whenever it changes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routes import DEFAULT, Routes
from capibara_flow.domain.routing import Understood
from capibara_flow.domain.subjects import subject_of
from capibara_flow.ports import Embedder, Vectors
from capibara_flow.runtime.watching import Watched
from capibara_flow.settings import SettingsError
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log
from topics.chat import ChatRequest

if TYPE_CHECKING:
    from capibara_flow.domain.understanding import Learned  # needs numpy, which a router without a policy does without

_NOTHING_SAID = Understood(DEFAULT, "simple", 1.0, "nothing is asked in words")


@dataclass(frozen=True)
class Tools:
    """What reading takes: an embedding model, and what learns from its vectors (``Learned.learn``)."""

    embedder: Embedder
    learn: "Callable[[Routes, Vectors, Routes, Vectors], Learned]"

    async def learned(self, routes: Routes, come_along: Callable[[], Routes]) -> "Learned":
        """What there is to learn of *routes*; a file that tells little of complexity leaves that to what comes along."""
        teacher = routes if routes.tells_complexity else await asyncio.to_thread(come_along)
        vectors = await self._vectors(routes)
        taught = vectors if teacher is routes else await self._vectors(teacher)
        return await asyncio.to_thread(self.learn, routes, vectors, teacher, taught)

    async def _vectors(self, routes: Routes) -> Vectors:
        return await self.embedder.embed([each.text for each in routes.labelled])


class Understanding:
    """Reads questions by the routes that a fleet names, or by those that *come_along*.

    *build* makes the tools, which takes a while; it is called when the first fleet with a policy asks for them. Questions that come
    before the routes are learned wait for that.
    """

    def __init__(self, build: Callable[[], Tools], read: Callable[[Path], Routes], come_along: Path) -> None:
        self._build, self._read, self._come_along = build, read, come_along
        self._tools: Tools | None = None
        self._watched: Watched[Routes] | None = None
        self._learned: asyncio.Future[Learned] = asyncio.get_running_loop().create_future()
        self._learning: asyncio.Task[None] | None = None
        self._following, self._one_at_a_time = asyncio.Lock(), asyncio.Lock()

    async def follow(self, fleet_file: Path, fleet: Fleet) -> None:
        """Go by the routes of *fleet* from now on; raises ``SettingsError`` or ``CannotStart``, and goes on as before then.

        The first routes are learned behind the caller's back: only questions wait for them.
        """
        if not fleet.policy:
            return
        async with self._following:
            await self._follow(fleet_file, fleet)

    async def _follow(self, fleet_file: Path, fleet: Fleet) -> None:
        path = fleet_file.parent / fleet.routes if fleet.routes else self._come_along
        if self._watched and self._watched.path == path:
            _check_policy(fleet, self._watched.value)
            return
        watched = Watched(path, self._read, self._learn)
        _check_policy(fleet, watched.value)
        if self._tools is None:
            self._tools = await asyncio.to_thread(self._build)
            self._learning = asyncio.create_task(self._learn_first(watched.value))
        else:
            await self._learn(watched.value)
        if self._watched:
            await self._watched.stop()
        self._watched = watched
        watched.start()

    async def __call__(self, request: ChatRequest) -> Understood:
        """What *request* is about."""
        text = subject_of(request.messages)
        if not text:
            return _NOTHING_SAID
        learned = await asyncio.shield(self._learned)
        assert self._tools is not None, "nothing is learned without them"  # noqa: S101
        vector = (await self._tools.embedder.embed([text]))[0]
        return await asyncio.to_thread(learned.read, text, vector)

    @property
    def routes(self) -> Routes | None:
        """What questions are read by; none where nothing has to be read."""
        return self._watched.value if self._watched else None

    def facts(self) -> dict[str, Any]:
        """Which model and which version of the routes is in use, and why a newer one is not; for reports."""
        model = self._tools.embedder.model if self._tools else None
        return {"embedder": model, "routes_file": self._watched.facts() if self._watched else None}

    async def aclose(self) -> None:
        """Let the model go."""
        await ended(self._learning)
        if self._watched:
            await self._watched.stop()
        if self._tools:
            await self._tools.embedder.aclose()

    async def _learn_first(self, routes: Routes) -> None:
        try:
            await self._learn(routes)
        except Exception as error:  # noqa: BLE001  told to whoever waits for it: each question, that is
            log.exception("routes_not_learned")
            self._learned.set_exception(error)

    async def _learn(self, routes: Routes) -> None:
        async with self._one_at_a_time:  # whoever comes last has the last word
            await self._learn_now(routes)

    async def _learn_now(self, routes: Routes) -> None:
        assert self._tools is not None, "follow builds them first"  # noqa: S101
        learned = await self._tools.learned(routes, partial(self._read, self._come_along))
        if self._learned.done():
            self._learned = asyncio.get_running_loop().create_future()
        self._learned.set_result(learned)
        log.info("routes_learned", routes=len(routes.routes), examples=len(routes.labelled))


def _check_policy(fleet: Fleet, routes: Routes) -> None:
    """Raise ``SettingsError`` when a row of the policy is for a route that is not there: nothing would ever take it."""
    if unknown := sorted(fleet.policy.keys() - set(routes.names)):
        raise SettingsError(f"policy: no route is called {', '.join(unknown)}; there are: {', '.join(routes.names)}")
