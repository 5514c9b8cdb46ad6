"""Which engines may be asked: a circuit breaker for each address, and whether a process should take work at all.

The breaker is the usual one (M. Nygard, Release It!): *closed* it lets everything through, *open* nothing, *half-open* one trial at a
time. What happens comes in as calls with the time (seconds on any clock that only goes on), the state after it comes out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

State = Literal["closed", "open", "half_open"]
#: ``refused``: nothing listens there. ``unreachable``: no answer in time. ``broke``: it answered, and the answer went wrong.
Fault = Literal["refused", "unreachable", "broke"]


@dataclass(frozen=True)
class Thresholds:
    """How much is too much: *faults* in a row open a breaker, or one refused connection.

    It then rests for *rest_seconds*, twice as long after each trial that failed, *most_rest_seconds* at most. A trial that nobody has
    heard of for *trial_seconds* no longer keeps others from trying.
    """

    faults: int = 3
    rest_seconds: float = 2.0
    most_rest_seconds: float = 30.0
    trial_seconds: float = 180.0


@dataclass(frozen=True)
class Breaker:
    """What is known of one address: *faults* in a row, *openings* in a row, and until when it rests or is being tried.

    *hidden*: it was opened by answers that went wrong, which a mere sign of life does not disprove.
    """

    state: State = "closed"
    faults: int = 0
    openings: int = 0
    until: float = 0.0
    hidden: bool = False
    trying: bool = False

    def admits(self, now: float) -> bool:
        """Whether a call may be made: always, or as the one trial that is due."""
        match self.state:
            case "closed":
                return True
            case "open":
                return now >= self.until
        return not self.trying or now >= self.until

    def admitted(self, now: float, limits: Thresholds) -> "Breaker":
        """A call is made, which ``admits`` allowed: unless the breaker is closed it is the trial."""
        if self.state == "closed":
            return self
        return replace(self, state="half_open", trying=True, until=now + limits.trial_seconds)

    def failed(self, now: float, fault: Fault, limits: Thresholds) -> "Breaker":
        """A call, or a probe, has met *fault*."""
        faults = self.faults + 1
        hidden = fault == "broke"
        if self.state == "closed" and faults < limits.faults and fault != "refused":
            return replace(self, faults=faults, hidden=hidden)
        if self.state == "open" and now < self.until and hidden:
            return replace(self, faults=faults)  # the end of a call that was made before: no news
        rest = min(limits.most_rest_seconds, limits.rest_seconds * 2.0 ** min(self.openings, 30))
        return Breaker("open", faults, self.openings + 1, now + rest, hidden)

    def began(self, limits: Thresholds) -> "Breaker":
        """A call has brought the first of its answer: a trial that does so lets others follow, on probation until one is complete."""
        if self.state == "closed":
            return self
        return replace(self, state="closed", trying=False, faults=limits.faults - 1, until=0.0)

    def succeeded(self) -> "Breaker":
        """A call has come to its end: all is well."""
        return Breaker()

    def alive(self) -> "Breaker":
        """A probe has found it well: that is enough where it was out of reach, and tells nothing where answers went wrong."""
        return self if self.hidden else Breaker()

    def let_go(self) -> "Breaker":
        """A call was given up without telling anything, by whoever made it: another may be the trial."""
        return replace(self, trying=False) if self.state == "half_open" else self


def takes_work(expert: str, available: bool, process: str, reports: Iterable[Mapping[str, Any]]) -> bool:
    """Whether *process* should take work for *expert*: not while its own engines are down and another process reaches some.

    With nobody better it does take it: so the work goes to another expert, or ends with an honest error. *reports* are what processes
    tell of themselves, ``{process, facts: {experts: {NAME: {available}}}}``; whatever has another form is passed over.
    """
    return available or not any(each.get("process") != process and _reaches(each, expert) for each in reports)


def _reaches(report: Mapping[str, Any], expert: str) -> bool:
    told: Any = report
    for name in ("facts", "experts", expert):
        told = told.get(name) if isinstance(told, Mapping) else None
    return isinstance(told, Mapping) and told.get("available") is True
