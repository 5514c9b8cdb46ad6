"""The faults: what is done to which process, while clients do what."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from tests.chaos.installation import Installation, Member
from tests.chaos.ledger import Ledger
from tests.chaos.plan import Asking, changing_their_minds, going_away, steadily


@dataclass(frozen=True)
class Field:
    """What a fault may touch."""

    installation: Installation
    ledger: Ledger
    chance: Random


#: Does the deed, and makes the installation whole again.
Hit = Callable[[], Awaitable[None]]
#: Makes everything ready for the hit, before any turn begins.
Prepare = Callable[[Field], Awaitable[Hit]]
Bar = Literal["none", "kill", "term"]


@dataclass(frozen=True)
class Fault:
    """One fault; *complete* is the least share of turns that must survive it, *pause* which bar its pauses are held to.

    Only where it *repeats* may an engine be asked more than once for a turn.
    """

    name: str
    about: str
    prepare: Prepare
    asking: Asking = steadily
    complete: float = 0.99
    pause: Bar = "none"
    repeats: bool = False


async def _nothing(_: Field) -> Hit:
    async def hit() -> None:
        return

    return hit


async def _kill(field: Field, *, kind: str) -> Hit:
    return _killing(field, field.chance.choice(field.installation.members[kind]))


def _killing(field: Field, victim: Member) -> Hit:
    async def hit() -> None:
        if victim.kind == "engine":
            await field.ledger.killing(victim)
        field.installation.signal(victim, signal.SIGKILL)
        await asyncio.sleep(field.chance.uniform(0.3, 0.8))
        await field.installation.again(victim)

    return hit


async def _stop(field: Field, *, kind: str, waits: float, seconds: float) -> Hit:
    """Stand still for so many AckWaits and seconds."""
    victim = field.chance.choice(field.installation.members[kind])

    async def hit() -> None:
        await field.installation.stopped(victim, waits * field.installation.pattern.ack_wait + seconds)

    return hit


async def _replace(field: Field, *, kind: str) -> Hit:
    old = field.chance.choice(field.installation.members[kind])
    await field.installation.add(kind)

    async def hit() -> None:
        await field.installation.retire(old)

    return hit


async def _storm(field: Field) -> Hit:
    """One of each kind and the broker within a few seconds, and then the caller that took over."""
    hits = [await _kill(field, kind=kind) for kind in ("edge", "router", "engine", "undertaker")] + [await _lose_broker(field)]
    delays = [field.chance.uniform(0, 3) for _ in hits]
    first, second = field.chance.sample(field.installation.members["caller"], 2)
    hits += [_killing(field, first), _killing(field, second)]
    delays += [0.0, field.installation.pattern.ack_wait + field.chance.uniform(0.2, 1)]

    async def later(hit: Hit, delay: float) -> None:
        await asyncio.sleep(delay)
        await hit()

    async def hit() -> None:
        await asyncio.gather(*map(later, hits, delays))

    return hit


async def _lose_broker(field: Field) -> Hit:
    async def hit() -> None:
        await field.installation.broker_outage(field.chance.uniform(0.2, 0.6))

    return hit


_ALL = (
    Fault("calm", "nothing happens", _nothing, complete=1),
    Fault("kill-edge", "SIGKILL of an edge, started again", partial(_kill, kind="edge"), complete=1, pause="kill"),
    Fault("kill-caller", "SIGKILL of a caller, started again", partial(_kill, kind="caller"), pause="kill", repeats=True),
    Fault("kill-router", "SIGKILL of a router, started again", partial(_kill, kind="router"), pause="kill"),
    Fault("kill-engine", "SIGKILL of an engine, started again", partial(_kill, kind="engine"), pause="kill", repeats=True),
    Fault(
        "kill-undertaker",
        "SIGKILL of an undertaker while clients cancel",
        partial(_kill, kind="undertaker"),
        asking=changing_their_minds,
        pause="kill",
    ),
    Fault(
        "zombie-caller",
        "SIGSTOP of a caller for longer than AckWait, then SIGCONT",
        partial(_stop, kind="caller", waits=1.5, seconds=0.5),
        repeats=True,
    ),
    Fault("term-edge", "a new edge, then SIGTERM of an old one", partial(_replace, kind="edge"), complete=1, pause="term"),
    Fault(
        "term-caller", "a new caller, then SIGTERM of an old one", partial(_replace, kind="caller"), complete=1, pause="term", repeats=True
    ),
    Fault("term-router", "a new router, then SIGTERM of an old one", partial(_replace, kind="router"), complete=1, pause="term"),
    Fault("kill-broker", "SIGKILL of the broker, started again on its data", _lose_broker, repeats=True),
    Fault("cancel", "clients cancel, in the middle of answers and while they queue", _nothing, asking=changing_their_minds, complete=1),
    Fault("abandon", "clients leave for good", _nothing, asking=going_away, complete=1),
    Fault(
        "storm", "both callers, an edge, a router, an engine, an undertaker and the broker are killed within seconds", _storm, repeats=True
    ),
    Fault(
        "stall-caller",
        "SIGSTOP of a caller for 3 s, whatever AckWait is",
        partial(_stop, kind="caller", waits=0, seconds=3.0),
        repeats=True,
    ),
)
FAULTS = {fault.name: fault for fault in _ALL}
#: What is done unless somebody chooses; a stall is for measuring what AckWait costs.
USUAL = tuple(name for name in FAULTS if name != "stall-caller")
