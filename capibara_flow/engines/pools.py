"""The pools of a fleet's experts, kept in step with the fleet as it changes."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.pool import Pool
from capibara_flow.ports import ChatEngine
from capibara_flow.tasks import LONG, ended
from capibara_flow.telemetry import log
from topics.streams import subject_token

#: What an engine need not know of its expert: it may change under a running one.
_APART = {"urls", "launch", "weights", "hardware", "aliases", "languages", "priority", "price", "consensus_weight"}


@dataclass(frozen=True)
class Changes:
    """The experts that a reload began, ended, or served anew: by name."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Pools(Mapping[str, Pool]):
    """Engines by the subject token of their expert, for every active expert of a fleet that has addresses.

    *on_change* is called whenever something about an engine's state has changed; *build* makes the engine of one address.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        build: Callable[[Expert, str], ChatEngine] = build_engine,
        on_change: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        self._build, self._options = build, options
        self.on_change = on_change
        self._experts: dict[str, Expert] = {}
        self._pools: dict[str, Pool] = {}
        self._probes = False
        self._draining: set[asyncio.Task[None]] = set()
        self._gone: set[Pool] = set()
        for expert in _served(fleet):
            self._add(expert)

    def __getitem__(self, token: str) -> Pool:
        return self._pools[token]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    def start(self) -> None:
        """Begin to probe all engines."""
        self._probes = True
        for pool in self._pools.values():
            pool.start()

    def reload(self, fleet: Fleet) -> Changes:
        """Serve *fleet* from now on; raises ``SettingsError``, and changes nothing, when an engine of it cannot be built.

        New and changed experts get new engines, removed ones end their streams in peace, and those that are as they were keep all
        that is known of them, as do addresses of an expert of which only others came or went.
        """
        wanted = {subject_token(expert.name): expert for expert in _served(fleet)}
        for expert in wanted.values():
            self._build(expert, expert.urls[0])  # it opens nothing
        removed = [token for token in self._pools if token not in wanted]
        added = [token for token in wanted if token not in self._pools]
        changed = [token for token in wanted if token in self._pools and self._changes(token, wanted[token])]
        told = Changes(tuple(wanted[each].name for each in added), tuple(wanted[each].name for each in changed), self._names(removed))
        for token in [*removed, *changed]:
            self._retire(token)
        for token in [*added, *changed]:
            self._add(wanted[token])
        for token in set(wanted).difference(added, changed):
            self._keep(token, wanted[token])
        self.on_change()
        log.info("fleet_reloaded", added=told.added, changed=told.changed, removed=told.removed)
        return told

    def available(self) -> dict[str, bool]:
        """Whether an engine may be asked now, by the expert's name."""
        return {pool.expert: pool.available for pool in self._pools.values()}

    def facts(self) -> dict[str, Any]:
        """What is known of all engines, by the expert's name."""
        return {pool.expert: pool.facts() for pool in self._pools.values()}

    async def aclose(self) -> None:
        """Stop probing and close all engines, those that are being drained as well."""
        pools = [*self._pools.values(), *self._gone]  # before whoever drains ends, and forgets them
        await ended(*self._draining, again=LONG)
        for pool in pools:
            await pool.aclose()

    def _add(self, expert: Expert) -> None:
        pool = Pool(expert.name, expert.urls, partial(self._build, expert), on_change=self._tell, **self._options)
        self._pools[subject_token(expert.name)] = pool
        self._experts[subject_token(expert.name)] = expert
        if self._probes:
            pool.start()

    def _keep(self, token: str, expert: Expert) -> None:
        before, self._experts[token] = self._experts[token], expert
        if before.urls != expert.urls:
            self._drained(self._pools[token].update(expert.urls, partial(self._build, expert)))

    def _retire(self, token: str) -> None:
        pool = self._pools.pop(token)
        del self._experts[token]
        self._gone.add(pool)
        self._drained(drained := pool.drain())
        drained.add_done_callback(lambda _: self._gone.discard(pool))

    def _drained(self, task: "asyncio.Task[None]") -> None:
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def _changes(self, token: str, expert: Expert) -> bool:
        """Whether *expert* needs engines of its own."""
        return self._experts[token].model_dump(exclude=_APART) != expert.model_dump(exclude=_APART)

    def _names(self, tokens: list[str]) -> tuple[str, ...]:
        return tuple(self._experts[token].name for token in tokens)

    def _tell(self) -> None:
        self.on_change()


def _served(fleet: Fleet) -> Iterator[Expert]:
    """Experts with addresses; an expert host serves the others."""
    return (expert for expert in fleet.active if expert.urls)
