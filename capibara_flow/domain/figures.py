"""What a router has decided, counted, for whoever asks how it chooses."""

import math
import statistics
from collections import Counter, deque
from typing import Any

from topics.chat import Decision

_LATELY = 500


class Choices:
    """Decisions by route, complexity and expert, with the confidence and the seconds of the last few hundred."""

    def __init__(self) -> None:
        self._routes: Counter[str] = Counter()
        self._complexities: Counter[str] = Counter()
        self._experts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=_LATELY)
        self._confidence: deque[float] = deque(maxlen=_LATELY)

    def add(self, decision: Decision, seconds: float) -> None:
        """Count *decision*, which took *seconds*."""
        self._routes[decision.route_name] += 1
        self._complexities[decision.complexity] += 1
        self._experts[decision.model_id] += 1
        self._seconds.append(seconds)
        self._confidence.append(decision.confidence)

    def facts(self) -> dict[str, Any]:
        """The counts since the start; medians, and the seconds that 95 of 100 stayed below, of late."""
        facts: dict[str, Any] = {
            "decisions": self._routes.total(),
            "routes": dict(self._routes.most_common()),
            "complexities": dict(self._complexities.most_common()),
            "experts": dict(self._experts.most_common()),
        }
        if self._seconds:
            in_order = sorted(self._seconds)
            facts["seconds"] = {"median": statistics.median(in_order), "p95": in_order[math.ceil(0.95 * len(in_order)) - 1]}
            facts["confidence_median"] = statistics.median(self._confidence)
        return facts
