"""How the queues of experts stand: who waits for whom, since when, and for how long yet. Reads only."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from nats.errors import Error as NatsError

from capibara_flow.domain.turns import ANONYMOUS, created, is_turn_id
from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.lanes import Lanes, subjects_of
from capibara_flow.runtime.peers import WORKER, Desk, desks
from capibara_flow.runtime.queues import Line
from capibara_flow.runtime.reports import read_reports
from topics.chat import PRIORITIES, bucket_of, lane_of
from topics.streams import FIRST_LANE

_WHOLE = "*"


@dataclass(frozen=True)
class Standing:
    """One tenant at one expert (a token): turns *waiting* and *at_work*, and how many were begun a minute of late.

    *oldest_s* is how long the oldest one has waited, *eta_s* how long one more would wait (0: not at all); none where nobody knows.
    """

    expert: str
    tenant: str
    waiting: int
    at_work: int
    oldest_s: float | None
    served_a_minute: float
    eta_s: float | None


@dataclass(frozen=True)
class _Expert:
    """What is known of one expert: its queued turns by lane, the oldest first, its desks, and the tenants of its lanes."""

    name: str
    turns: Mapping[str, list[str]]
    desks: list[Desk]
    tenants: Mapping[str, str]


async def standings(client: TokenClient, weights: Mapping[str, float], expert: str = _WHOLE) -> list[Standing]:
    """How all queues stand, or that of *expert* (a token), for every tenant who waits, or was served in the last minute.

    Raises ``BrokerUnavailable``.
    """
    lanes = Lanes(client)
    try:
        subjects = await subjects_of(client, expert)
    except (NatsError, TimeoutError, KeyError, ValueError) as error:
        raise BrokerUnavailable(f"the queue of calls cannot be read: {error!r}") from error
    reports = await read_reports(client)
    await lanes.read()
    turns: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for subject in sorted(subjects):
        _, _, turn, _, name, lane = subject.split(".")
        turns[name][lane].append(turn)
    told: dict[str, list[Desk]] = defaultdict(list)
    for report in reports:
        for name, desk in desks(report, time.monotonic()).items() if report["worker"] == WORKER else ():
            if expert in {_WHOLE, name}:
                told[name].append(desk)
    found = [_Expert(name, turns.get(name, {}), told.get(name, []), lanes.of(name)) for name in sorted({*turns, *told})]
    return [standing for each in found for standing in _of(each, weights)]


def _of(expert: _Expert, weights: Mapping[str, float]) -> list[Standing]:
    """How the queue of *expert* stands, tenant by tenant."""
    work: dict[str, int] = defaultdict(int)
    rates: dict[str, float] = defaultdict(float)
    for desk in expert.desks:
        for lane, count in desk.work.items():
            work[lane] += count
        for lane, count in desk.minute.items():
            rates[lane] += 60 * count / desk.over
    waiting = {lane: turns[work[lane] :] for lane, turns in expert.turns.items() if _bucket(lane) is not None}
    counts = {lane: len(turns) for lane, turns in waiting.items()}
    line = Line(counts, expert.desks, expert.tenants, weights, time.monotonic())
    free = sum(desk.free for desk in expert.desks)
    found = []
    for bucket in sorted({bucket_of(lane)[0] for lane in {*waiting, *work, *rates} or {FIRST_LANE}}):
        lanes = [lane_of(bucket, priority) for priority in PRIORITIES]
        ours = sum(counts.get(lane, 0) for lane in lanes)
        busy = sum(work[lane] for lane in lanes)
        if free > 0 or not line.hands.seconds:
            eta = 0.0 if free > 0 else None
        else:
            eta = round(line.place(lanes[-1], counts.get(lanes[-1], 0)).seconds, 1)  # behind all of the tenant's own
        found.append(
            Standing(
                expert.name,
                _tenant(bucket, expert.tenants),
                ours,
                busy,
                _age(min((turn for lane in lanes for turn in waiting.get(lane, ())[:1]), default="")),
                round(sum(rates[lane] for lane in lanes), 1),
                eta if expert.desks else None,
            )
        )
    return found


def _tenant(bucket: int, tenants: Mapping[str, str]) -> str:
    """Who waits in *bucket*, as far as lanes tell."""
    names = sorted({tenants[lane] for priority in PRIORITIES if (lane := lane_of(bucket, priority)) in tenants} - {""})
    return ", ".join(names) or (ANONYMOUS if bucket == 0 else f"bucket {bucket}")


def _age(turn: str) -> float | None:
    return round(max(0.0, time.time() - created(turn)), 1) if is_turn_id(turn) else None


def _bucket(lane: str) -> int | None:
    try:
        return bucket_of(lane)[0]
    except ValueError:
        return None
