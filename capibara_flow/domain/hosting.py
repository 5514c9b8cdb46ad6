"""Which experts of a host are loaded: who loads next, who makes room, who waits and who is refused.

Times are seconds of any steady clock, memory is in MiB. A request is a *ticket*, any number that is its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from capibara_flow.errors import EngineBusy, EngineFault, EngineUnreachable

#: ``stopping`` still takes memory; ``cold`` takes none.
Phase = Literal["cold", "loading", "warm", "stopping"]
Why = Literal["evicted", "idle", "retired"]
#: How much of the newest load goes into what loads are known to take (an exponentially weighted mean).
NEWEST = 0.3
#: Experts whose last use differs by less count as used at the same time, so that priority decides between them.
TIE_SECONDS = 60.0
#: Weights in memory, with what an engine needs around them, by their size on the disk.
WEIGHTS_FACTOR = 1.2
#: Keys and values of one token in half precision where nothing is known of the model: 32 layers, 8 heads of 128 (8 B, grouped queries).
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What a host may take.

    An expert that nobody used for *auto_unload_after_s* (none: never) is unloaded, and may sleep from half of that on. A crash keeps
    it from being loaded for *crash_base_s*, twice as long each time up to *crash_cap_s*; after *healthy_s* it is forgiven.
    """

    max_loaded: int = 1
    queue_size: int = 64
    auto_unload_after_s: float | None = 300
    reserve_mib: int = 512
    crash_base_s: float = 1
    crash_cap_s: float = 120
    healthy_s: float = 60


@dataclass(frozen=True)
class Need:
    """What one expert takes; *priority*: the higher, the later evicted.

    *memory_mib* and *load_seconds* as far as the operator knows them; *estimate_mib* counts until it was loaded for the first time.
    """

    name: str
    priority: int = 1
    memory_mib: int | None = None
    estimate_mib: int | None = None
    load_seconds: float | None = None


@dataclass(frozen=True)
class Start:
    """Load *name*."""

    name: str


@dataclass(frozen=True)
class Stop:
    """Unload *name*, which nobody uses."""

    name: str
    why: Why


@dataclass(frozen=True)
class Rest:
    """Let *name* sleep where its engine can: nobody has used it for a while."""

    name: str


@dataclass(frozen=True)
class Admit:
    """The expert of *ticket* is loaded: it may go on."""

    ticket: int


@dataclass(frozen=True)
class Refuse:
    """*ticket* shall not wait any longer."""

    ticket: int
    error: EngineFault


Deed = Start | Stop | Rest | Admit | Refuse


def estimated_mib(weights_bytes: int | None, context_tokens: int) -> int | None:
    """What an expert will take, by the size of its weights and its whole context; none where the size is not known."""
    if weights_bytes is None:
        return None
    return round((weights_bytes * WEIGHTS_FACTOR + context_tokens * TOKEN_BYTES) / MIB)


@dataclass
class _Expert:
    need: Need
    phase: Phase = "cold"
    streams: set[int] = field(default_factory=set)
    since: float = 0
    last_used: float = 0
    resting: bool = False
    leaving: bool = False
    retired: bool = False
    held_up: bool = False
    load_seconds: float | None = None
    seen_mib: int | None = None
    failures: int = 0
    blocked_until: float | None = None
    trouble: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {"loads": 0, "failures": 0, "evictions": 0})

    @property
    def mib(self) -> int:
        """What was seen of it counts, but never less than what the operator knows."""
        return max(self.need.memory_mib or 0, self.seen_mib or 0) or self.need.estimate_mib or 0

    @property
    def stays(self) -> bool:
        return not (self.leaving or self.retired)

    @property
    def idle(self) -> bool:
        return self.phase == "warm" and not self.streams


@dataclass
class _Room:
    """What is left while one decision is made: what goes to somebody is taken off, what will come free is added on."""

    slots: int
    mib: int
    coming_slots: int = 0
    coming_mib: int = 0

    def fits(self, mib: int) -> bool:
        return self.slots >= 1 and self.mib >= mib

    def will_fit(self, mib: int) -> bool:
        return self.slots + self.coming_slots >= 1 and self.mib + self.coming_mib >= mib

    def take(self, mib: int) -> None:
        self.slots -= 1
        self.mib -= mib

    def expect(self, mib: int) -> None:
        self.coming_slots += 1
        self.coming_mib += mib


class Hosting:
    """The state of a host. Tell it what happened, then do what ``decide`` says; it takes for granted that it is done.

    Waiting tickets are served first come, first served; those of one expert go together once it is loaded. An expert that is in use
    and must make room takes nobody new until the one before it in the queue has been served, so that everybody's turn comes.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._experts: dict[str, _Expert] = {}
        self._waiting: dict[int, str] = {}
        self._yielding: set[str] = set()

    # --- what happens ---------------------------------------------------------------------------------------------

    def add(self, need: Need) -> None:
        """Serve an expert, or serve it in another way than before: then what is loaded is unloaded as soon as nobody uses it."""
        known = self._experts.get(need.name)
        if known is None:
            self._experts[need.name] = _Expert(need, load_seconds=need.load_seconds)
            return
        known.leaving = known.phase != "cold"
        known.need, known.retired, known.seen_mib = need, False, None

    def retire(self, name: str) -> None:
        """Serve *name* no longer: whoever uses it may finish."""
        self._experts[name].retired = True

    def ask(self, name: str, ticket: int, now: float) -> None:
        """A request for *name*; raises ``EngineBusy`` when too many wait, ``EngineUnreachable`` while it rests from a crash."""
        expert = self._experts[name]
        if reason := self.blocked(name, now):
            raise EngineUnreachable(reason)
        if len(self._waiting) >= self.limits.queue_size and not self._open(expert):
            raise EngineBusy(f"{name} is not ready, and {len(self._waiting)} requests wait already")
        self._waiting[ticket] = name

    def leave(self, ticket: int, now: float) -> None:
        """A request is over, or is not wanted any more."""
        self._waiting.pop(ticket, None)
        for expert in self._experts.values():
            if ticket in expert.streams:
                expert.streams.discard(ticket)
                expert.last_used = now

    def loaded(self, name: str, now: float, memory_mib: int | None = None) -> None:
        """*name* answers, and takes *memory_mib*. Whoever waits for it comes first now: to load it again would cost more."""
        expert = self._experts[name]
        took = now - expert.since
        expert.load_seconds = took if expert.load_seconds is None else NEWEST * took + (1 - NEWEST) * expert.load_seconds
        expert.phase, expert.since, expert.last_used, expert.resting = "warm", now, now, False
        expert.counts["loads"] += 1
        self.measured(name, memory_mib)
        mine = {ticket: each for ticket, each in self._waiting.items() if each == name}
        self._waiting = mine | self._waiting

    def measured(self, name: str, memory_mib: int | None) -> None:
        """*name* takes *memory_mib*; the most that was ever seen is what it needs."""
        expert = self._experts[name]
        if memory_mib is not None:
            expert.seen_mib = max(memory_mib, expert.seen_mib or 0)

    def crashed(self, name: str, reason: str, now: float) -> None:
        """*name* ended by itself, or could not be loaded."""
        expert = self._experts[name]
        healthy = expert.phase == "warm" and now - expert.since >= self.limits.healthy_s
        expert.failures = 1 if healthy else expert.failures + 1
        # Beyond that many doublings any cap is reached, and the power would grow without end.
        pause = min(self.limits.crash_cap_s, self.limits.crash_base_s * 2.0 ** min(expert.failures - 1, 30))
        expert.blocked_until, expert.trouble = now + pause, reason
        expert.counts["failures"] += 1
        self._gone(expert)

    def stopped(self, name: str) -> None:
        """*name* is unloaded: its memory is free."""
        self._gone(self._experts[name])

    # --- what to do -----------------------------------------------------------------------------------------------

    def decide(self, now: float, free_mib: int) -> list[Deed]:
        """What to do now, with *free_mib* free on the machine."""
        room, wanted, deeds = self._room(free_mib), set[str](), list[Deed]()
        self._yielding = set()
        for ticket, name in list(self._waiting.items()):
            expert = self._experts[name]
            if reason := self.blocked(name, now) or self._too_large(expert, free_mib):
                deeds.append(self._refuse(ticket, reason))
            elif self._open(expert):
                deeds.append(self._admit(ticket, expert, now))
            elif expert.phase == "cold" and name not in wanted:
                wanted.add(name)
                deeds += self._claim(expert, room, now)
        return [*deeds, *self._let_go(now)]

    def due(self, now: float) -> float | None:
        """In how many seconds ``decide`` will have something to do though nothing happens; none: never."""
        after = self.limits.auto_unload_after_s
        idle = [each for each in self._experts.values() if each.idle]
        if after is None or not idle:
            return None
        return max(0.0, min(each.last_used + (after if each.resting else after / 2) for each in idle) - now)

    def _open(self, expert: _Expert) -> bool:
        """Whether a request can go on at once."""
        return expert.phase == "warm" and expert.stays and expert.need.name not in self._yielding

    def _room(self, free_mib: int) -> _Room:
        """A load that goes on may not have taken its memory yet: it is counted as if none of it."""
        taken = [each for each in self._experts.values() if each.phase != "cold"]
        promised = sum(each.mib for each in taken if each.phase == "loading")
        room = _Room(self.limits.max_loaded - len(taken), free_mib - self.limits.reserve_mib - promised)
        for each in taken:
            if each.phase == "stopping" or (each.phase == "warm" and not each.stays):
                room.expect(each.mib)
        return room

    def _too_large(self, expert: _Expert, free_mib: int) -> str:
        """Why *expert*, if it is not loaded, would not fit even if all others were gone, or nothing."""
        held = sum(each.mib for each in self._experts.values() if each.phase != "cold")
        left = max(0, free_mib + held - self.limits.reserve_mib)
        if expert.phase != "cold" or expert.mib <= left:
            return ""
        return (
            f"{expert.need.name} needs {expert.mib} MiB of memory, and with all other experts unloaded there would be {left}"
            f" (with {self.limits.reserve_mib} kept in reserve)"
        )

    def _claim(self, expert: _Expert, room: _Room, now: float) -> Iterator[Deed]:
        """Load *expert*, or make room for it; what is made is kept for it, however small what comes behind it may be."""
        expert.held_up = False
        if room.fits(expert.mib):
            expert.phase, expert.since = "loading", now
            yield Start(expert.need.name)
        else:
            for victim in self._victims(now):
                if room.will_fit(expert.mib):
                    break
                room.expect(victim.mib)
                self._yielding.add(victim.need.name)
                if victim.idle:
                    yield self._stop(victim, "evicted")
                else:
                    expert.held_up = True
        room.take(expert.mib)

    def _victims(self, now: float) -> Sequence[_Expert]:
        """Who could make room, best first: idle ones before others, long unused ones before others, then by priority."""

        def reluctance(each: _Expert) -> tuple[bool, float, int, float]:
            return bool(each.streams), -((now - each.last_used) // TIE_SECONDS), each.need.priority, each.last_used

        return sorted((each for each in self._experts.values() if self._open(each)), key=reluctance)

    def _let_go(self, now: float) -> Iterator[Deed]:
        after = self.limits.auto_unload_after_s
        for each in self._experts.values():
            if not each.idle:
                continue
            unused = now - each.last_used
            if not each.stays:
                yield self._stop(each, "retired")
            elif after is not None and unused >= after:
                yield self._stop(each, "idle")
            elif after is not None and unused >= after / 2 and not each.resting:
                each.resting = True
                yield Rest(each.need.name)

    def _stop(self, expert: _Expert, why: Why) -> Stop:
        expert.phase = "stopping"
        expert.counts["evictions"] += why == "evicted"
        return Stop(expert.need.name, why)

    def _admit(self, ticket: int, expert: _Expert, now: float) -> Admit:
        del self._waiting[ticket]
        expert.streams.add(ticket)
        expert.last_used, expert.resting = now, False
        return Admit(ticket)

    def _refuse(self, ticket: int, reason: str) -> Refuse:
        del self._waiting[ticket]
        return Refuse(ticket, EngineUnreachable(reason))

    def _gone(self, expert: _Expert) -> None:
        expert.phase, expert.leaving, expert.resting = "cold", False, False
        expert.streams.clear()

    # --- what can be told -----------------------------------------------------------------------------------------

    def phase(self, name: str) -> Phase:
        """Where *name* is between disk and memory."""
        return self._experts[name].phase

    def idle(self, name: str) -> bool:
        """Whether *name* is loaded and nobody uses it."""
        return self._experts[name].idle

    def blocked(self, name: str, now: float) -> str:
        """Why *name* cannot be asked for now, or nothing."""
        expert = self._experts[name]
        if expert.retired:
            return f"{name} is no longer served here"
        if expert.blocked_until is None or now >= expert.blocked_until:
            return ""
        return f"{expert.trouble}; it is tried again in {expert.blocked_until - now:.1f} s"

    def eta(self, name: str, now: float) -> float | None:
        """How many seconds it will be about until *name* is loaded; none when that is not known, or is overdue."""
        expert = self._experts[name]
        starts = expert.phase == "loading" or (expert.phase == "cold" and not expert.held_up)
        if expert.load_seconds is None or not starts:
            return None
        left = expert.load_seconds - (now - expert.since if expert.phase == "loading" else 0)
        return round(left, 1) if left > 0 else None

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def facts(self, now: float) -> dict[str, dict[str, Any]]:
        """Figures of every expert, by name."""
        waiting = list(self._waiting.values())
        return {
            name: {
                "phase": each.phase,
                "streams": len(each.streams),
                "waiting": waiting.count(name),
                "idle_seconds": round(now - each.last_used, 1) if each.idle else None,
                "resting": each.resting,
                "memory_mib": each.mib or None,
                "load_seconds": None if each.load_seconds is None else round(each.load_seconds, 2),
                "blocked": self.blocked(name, now) or None,
                **each.counts,
            }
            for name, each in self._experts.items()
            if each.phase != "cold" or not each.retired
        }
