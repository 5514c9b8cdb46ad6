"""A short run of every fault on real processes: nothing may be lost, repeated, or left running."""

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.client import connections
from tests.chaos.faults import USUAL
from tests.chaos.installation import Installation
from tests.chaos.phases import Chaos
from tests.chaos.plan import Pattern

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
#: Short answers, and little patience with whoever is silent or away; an answer that nobody stops goes on for 12 s, beyond any *notice*.
PATTERN = Pattern(seed=20261121, ack_wait=1, abandon=2, notice=7, graceful=0.3, shortest=1.0, longest=2.0, window=(0.3, 0.9))


async def test_answers_survive_whatever_happens_to_a_process(tmp_path: Path) -> None:
    async with (
        connections() as session,
        Installation(tmp_path, PATTERN, session) as running,
    ):
        chaos = Chaos(running)
        rows = [await chaos.phase(fault, 4) for fault in USUAL]
    assert list(report.broken(rows, PATTERN.ack_wait, timed=False)) == [], [note for row in rows for note in row.notes]
    assert sum(row.prefills for row in rows) > 0, "no fault hit an answer: this run shows nothing"
