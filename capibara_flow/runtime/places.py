"""Turns that wait for an expert hear of their place again as it gets better: each time that it falls below a power of two.

Every router looks. What several of them tell at once the broker stores once, and nothing of a turn that somebody has begun.
"""

import asyncio
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.lanes import Lanes, is_lane, subjects_of
from capibara_flow.runtime.lease import WRONG_SEQUENCE, unbegun
from capibara_flow.runtime.peers import Desk, Peers
from capibara_flow.runtime.queues import SHORT, Line, queued
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log
from topics.output import Queued
from topics.streams import subject_token

_FRESH = 1.0  # seconds for which a look is told: what was erased since must not come back
_AT_ONCE = 16  # turns that are told at a time
_TIMEOUT = 2.0
_REST = 10  # times as long as a look took is the least until the next one


@dataclass
class _Waiting:
    """A turn that waits, and since which look; *told* is the best class of places that it has heard of: the number of bits of a place."""

    since: int
    told: int = 64


@dataclass
class _Queue:
    """Whom we have seen waiting for an expert, after so many *looks*."""

    looks: int = 0
    turns: dict[str, _Waiting] = field(default_factory=dict)

    def lanes(self, subjects: Iterable[str], desks: list[Desk]) -> dict[str, list[str]]:
        """The turns of *subjects* that wait, by lane, who came first first; those who came before them are at work.

        Who was there at an earlier look came before; of others the ids tell.
        """
        self.looks += 1
        lanes: dict[str, list[str]] = defaultdict(list)
        for subject in subjects:
            _, _, turn, _, _, lane = subject.split(".")
            if is_lane(lane):
                lanes[lane].append(turn)
        there = {turn for turns in lanes.values() for turn in turns}
        self.turns = {turn: self.turns.get(turn) or _Waiting(self.looks) for turn in there}
        for turns in lanes.values():
            turns.sort(key=lambda turn: (self.turns[turn].since, turn))
        return {lane: turns[sum(desk.work.get(lane, 0) for desk in desks) :] for lane, turns in lanes.items()}


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
        self._jetstream = client.jetstream()
        self._queues: dict[str, _Queue] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = self._task or asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Look no more."""
        await ended(self._task)
        self._task = None

    async def _keep(self) -> None:
        while True:
            began = self._clock()
            names = tuple(self._experts())
            self._queues = {name: queue for name, queue in self._queues.items() if name in names}
            for name in names:
                try:
                    await self._look(name)
                except (NatsError, APIError, TimeoutError, KeyError, ValueError) as error:
                    log.debug("places_untold", expert=name, error=repr(error))
            await asyncio.sleep(max(self._every, _REST * (self._clock() - began)))

    async def _look(self, expert: str) -> None:
        """Tell everybody who waits for *expert* his place, unless he knows of one as good. Raises what nats-py raises."""
        desks, began = self._peers.of(subject_token(expert)), self._clock()
        if not desks or any(desk.free for desk in desks):
            return
        subjects = await subjects_of(self._client, subject_token(expert))
        queue = self._queues.setdefault(expert, _Queue())
        waiting = queue.lanes(subjects, desks)
        counts = {lane: len(turns) for lane, turns in waiting.items()}
        line = Line(counts, desks, self._lanes.of(subject_token(expert)), self._weights, self._clock())
        news: list[Queued] = []
        for lane, turns in waiting.items():
            news += self._news(expert, line, lane, turns, queue)
            await asyncio.sleep(0)  # others want the loop as well
        for number in range(0, len(news), _AT_ONCE):
            if not self._client.is_connected or self._clock() - began > _FRESH:
                return  # the rest at the next look
            await asyncio.gather(*(self._tell(each, queue) for each in news[number : number + _AT_ONCE]))

    def _news(self, expert: str, line: Line, lane: str, turns: list[str], queue: _Queue) -> Iterator[Queued]:
        """What those of *turns* are to hear who have heard of no place as good."""

        def place_class(number: int) -> int:
            return line.place(lane, number).position.bit_length()

        number = 0
        while number < len(turns):  # from class to class: places only grow within a lane
            of_class = place_class(number)
            following = bisect_right(range(len(turns)), of_class, lo=number + 1, key=place_class)
            for place in range(number, following):
                if of_class < queue.turns[turns[place]].told:
                    found = line.place(lane, place)
                    if not 0 < found.seconds < SHORT:
                        yield queued(turns[place], expert, found)
            number = following

    async def _tell(self, news: Queued, queue: _Queue) -> None:
        headers = {"Nats-Msg-Id": news.dedupe, "content-type": "application/json", **unbegun(news.subject)}
        try:
            await self._jetstream.publish(news.subject, news.line(), timeout=_TIMEOUT, headers=headers)
        except APIError as error:
            if error.err_code != WRONG_SEQUENCE:
                raise
        queue.turns[news.turn].told = news.position.bit_length()
