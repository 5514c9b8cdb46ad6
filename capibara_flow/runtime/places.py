"""Turns that wait for an expert hear of their place again as it changes: each time that it has halved, or doubled.

Whoever looks needs to remember nothing: the broker stores what is told of a turn and a place once, however many tell it, and nothing
of a turn that somebody has begun.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from nats.errors import Error as NatsError

from capibara_flow.runtime.client import TokenClient, encoded
from capibara_flow.runtime.lanes import Lanes, is_lane, subjects_of
from capibara_flow.runtime.lease import behind
from capibara_flow.runtime.peers import Desk, Peers
from capibara_flow.runtime.queues import SHORT, Line, queued
from capibara_flow.telemetry import log
from topics.streams import subject_token

_AT_ONCE = 16  # turns


class Places:
    """Looks *every* so many seconds who waits for one of *experts* (names) whose hands are all busy, and tells him his place."""

    def __init__(
        self,
        client: TokenClient,
        peers: Peers,
        lanes: Lanes,
        weights: Mapping[str, float],
        experts: Callable[[], Iterable[str]],
        *,
        every: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._peers, self._lanes, self._weights = client, peers, lanes, weights
        self._experts, self._every, self._clock = experts, every, clock
        #: What was told from here to turns that still wait, by expert and turn: it need not be told again.
        self._told: dict[str, dict[str, frozenset[str]]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = self._task or asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Look no more."""
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            for expert in tuple(self._experts()):
                desks = self._peers.of(subject_token(expert))
                if not desks or any(desk.free for desk in desks):
                    self._told.pop(expert, None)
                    continue
                try:
                    await self._tell(expert, await subjects_of(self._client, subject_token(expert)), desks)
                except (NatsError, TimeoutError, KeyError, ValueError) as error:
                    log.debug("places_untold", expert=expert, error=repr(error))

    async def _tell(self, expert: str, subjects: Iterable[str], desks: list[Desk]) -> None:
        """Tell everybody whose call is among *subjects* and waits his place, unless he knows of one as good."""
        waiting = _waiting(subjects, desks)
        tenants = self._lanes.of(subject_token(expert))
        weights = {lane: self._weights.get(tenant, 1.0) for lane, tenant in tenants.items()}
        line = Line({lane: len(turns) for lane, turns in waiting.items()}, desks, weights, self._clock())
        before, self._told[expert] = self._told.get(expert, {}), {}
        for lane, turns in waiting.items():
            for number, turn in enumerate(turns):
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # others want the loop as well
                found = line.place(lane, number)
                news, told = queued(turn, expert, found), before.get(turn, frozenset())
                if news.dedupe not in told and not 0 < found.seconds < SHORT:
                    told |= {news.dedupe}
                    nobody_began = behind(0, f"cf.out.{turn}.lease.main")
                    headers = encoded({"Nats-Msg-Id": news.dedupe, "content-type": "application/json", **nobody_began})
                    self._client.send(news.subject, news.line(), reply="", headers=headers)
                self._told[expert][turn] = told


def _waiting(subjects: Iterable[str], desks: list[Desk]) -> dict[str, list[str]]:
    """The turns of *subjects* that wait, by lane, who came first first: the ids of turns tell. The first ones are at work."""
    found: dict[str, list[str]] = defaultdict(list)
    for subject in sorted(subjects):
        _, _, turn, _, _, lane = subject.split(".")
        if is_lane(lane):
            found[lane].append(turn)
    return {lane: turns[sum(desk.work.get(lane, 0) for desk in desks) :] for lane, turns in found.items()}
