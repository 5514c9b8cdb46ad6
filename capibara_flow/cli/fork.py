"""``capibara fork``: a turn asked again from one of its stages on, with something changed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capibara_flow.domain.forking import Stage, forked, parse
from capibara_flow.domain.record import Record
from capibara_flow.domain.turns import ANONYMOUS
from capibara_flow.errors import BadRequest
from capibara_flow.runtime.connection import connect
from capibara_flow.runtime.dead import new_turn
from capibara_flow.runtime.forking import publish
from capibara_flow.runtime.history import History
from capibara_flow.settings import Settings
from topics.message import DEADLINE, ORIGIN, PRINCIPAL, TENANT

_SHOWN = 80  # characters of a value


@dataclass(frozen=True)
class Forked:
    """The new *turn* of *tenant*, from *stage* of *origin* on."""

    turn: str
    origin: str
    stage: str
    tenant: str
    changes: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        changed = dict(self.changes)
        if "source" in changed:  # the only key of which each one counts
            changed["source"] = ",".join(value.strip() for key, value in self.changes if key == "source")
        return {"turn": self.turn, "origin": self.origin, "from": self.stage, "changed": changed}


async def fork(settings: Settings, turn: str, stage: Stage, wanted: Sequence[str]) -> Forked:
    """Ask *turn* again from *stage* on with what is *wanted*, each as ``KEY=VALUE``; raises ``TurnUnknown``, ``BadRequest`` and others."""
    changes = tuple(parse(each) for each in wanted)
    names = stage != "router" and any(key in {"expert", "model"} for key, _ in changes)
    fleet = settings.experts if names else None
    # Not by wiring, which would load the door and all its engines first.
    client = await connect(settings, "provisioner")
    try:
        record = await History(client).of(turn)
        fresh = new_turn(_owner(record))
        now = time.time()
        messages = forked(record, fresh, stage, changes, fleet, until=now + settings.knowledge.seconds)
        await publish(client, messages, _headers(record, now + settings.edge.turn_seconds))
    finally:
        await client.close()
    return Forked(fresh, turn, stage, record.tenant, changes)


def _owner(record: Record) -> str:
    if not record.tenant:
        raise BadRequest(f"nothing tells whose turn {record.turn} was: nobody could read the answer")
    return record.tenant


def _headers(record: Record, deadline: float) -> dict[str, str]:
    """What every message of the new turn carries."""
    return {TENANT: record.tenant, PRINCIPAL: record.principal, DEADLINE: f"{deadline:.3f}", ORIGIN: record.turn}


def told(made: Forked, base: str) -> str:
    """What became of it, and how to read and to compare it; the edge is at *base*."""
    key = "" if made.tenant == ANONYMOUS else " -H 'Authorization: Bearer KEY'"
    what = ", ".join(f"{key}={_shown(value)}" for key, value in made.changes) or "nothing changed"
    return (
        f"{made.origin} goes on from the {made.stage} as {made.turn}: {what}\n"
        f"  read it:     curl -N {base}/api/chat/{made.turn}/events{key}\n"
        f"  compare it:  capibara diff {made.origin} {made.turn}"
    )


def _shown(value: str) -> str:
    """*value* in a line, without what a terminal would obey."""
    value = value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…"
    return value if value.isprintable() else repr(value)
