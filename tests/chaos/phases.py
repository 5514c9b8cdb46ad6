"""A phase: many turns at once while one fault hits, and what clients and engines tell of it afterwards."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from tests.chaos.client import Client, Story
from tests.chaos.faults import FAULTS, Fault, Field
from tests.chaos.installation import TURN_SECONDS, Installation
from tests.chaos.judging import Pause, counted, longest_pause, slips
from tests.chaos.ledger import Ledger, Run
from tests.chaos.plan import Occasion, Pattern
from tests.chaos.report import Row, limit_of

#: Seconds in which the last runs may come to their end after the last turn, and in which a cancelled one must.
REST_SECONDS, ABORT_SECONDS = 1.5, 1.0


class Chaos:
    """Runs phases on one installation."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._pattern = installation.pattern
        self._ledger = Ledger(installation.session)
        self._client = Client(installation.session, lambda: installation.doors, TURN_SECONDS + 10)
        self._numbers = itertools.count(1)

    async def phase(self, name: str, turns: int) -> Row:
        """*turns* turns under the fault called *name*, in as many rounds as it takes."""
        rounds = [await self._round(FAULTS[name], number, size) for number, size in enumerate(self._pattern.rounds(turns))]
        return sum(rounds, Row(name))

    async def _round(self, fault: Fault, number: int, turns: int) -> Row:
        chance = self._pattern.chance(fault.name, number)
        moment = chance.uniform(*self._pattern.window)
        asks = fault.asking(Occasion(self._pattern, chance, turns, self._numbers, moment))
        hit = await fault.prepare(Field(self._installation, self._ledger, chance))

        async def strike() -> None:
            await asyncio.sleep(moment)
            await hit()

        async with asyncio.TaskGroup() as group:
            striking = group.create_task(strike())
            living = [group.create_task(self._client.live(ask)) for ask in asks]
        await striking
        stories = [each.result() for each in living]
        orphaned = await self._ledger.settle(self._installation.members["engine"], self._rest(stories))
        await asyncio.gather(*(self._client.come_back(story) for story in stories if story.ask.deed == "leave"))
        rows = [judged(fault.name, story, self._ledger.of(story.ask.question), self._pattern) for story in stories]
        return sum(rows, Row(fault.name, orphaned=orphaned))

    def _rest(self, stories: Sequence[Story]) -> float:
        """How long from now engines may still be at work."""
        left = [story.stopped for story in stories if story.ask.deed == "leave" and story.stopped]
        return max([REST_SECONDS, *(each + self._pattern.abandon + self._pattern.notice - time.time() for each in left)])


def judged(fault: str, story: Story, runs: Sequence[Run], pattern: Pattern) -> Row:
    """One turn as a row of its own."""
    whole = story.end == "stop"
    wrong = slips(counted(story.ask.upto), story.text, complete=whole)
    ended = whole or (story.ask.deed != "stay" and story.end == "cancelled")
    heard = story.ask.deed == "stay" or story.stopped is not None
    complete = ended and heard and not (wrong.duplicated or wrong.missing)
    limit = limit_of(fault, pattern.ack_wait)
    stopped = _stopped(story, runs, max(ABORT_SECONDS, limit or 0))
    skips, pause = story.continued.count("skip"), longest_pause(story.arrivals, pattern.pace)
    row = Row(
        fault,
        turns=1,
        complete=int(complete),
        failed=int(not complete),
        resets=story.resets,
        prefills=story.continued.count("prefill"),
        skips=skips,
        duplicated=wrong.duplicated,
        missing=wrong.missing,
        longest_pause=0.0 if skips else pause.seconds,
        longest_skip=pause.seconds if skips else 0.0,
        stopped=len(stopped),
        aborted=sum(stopped),
        asked_again=story.asked - 1,
        repeated=max(0, len(runs) - 1),
    )
    return row + Row(fault, notes=tuple(_notes(row, story, pause, limit)))


def _stopped(story: Story, runs: Sequence[Run], patience: float) -> list[bool]:
    """For each run that went on when the client cancelled, or began later, whether it ended in time.

    Where nothing ran yet, what counts is the client's own end, within *patience* (seconds).
    """
    if story.ask.deed != "cancel" or story.stopped is None:
        return []
    if not runs:
        return [_by(story.ended, story.stopped + patience)]
    return [_by(run.ended, story.stopped + ABORT_SECONDS) for run in runs if run.ended is None or run.ended > story.stopped]


def _by(moment: float | None, limit: float) -> bool:
    return moment is not None and moment <= limit


def _notes(row: Row, story: Story, pause: Pause, limit: float | None) -> list[str]:
    """What people want to know of a turn that did not go as it should."""
    slow, long = row.stopped - row.aborted, limit is not None and row.longest_pause > limit
    if not (row.failed or row.resets or slow or long):
        return []
    words = [f"{row.fault}: turn {story.turn or '?'} ({story.ask.expert}, {story.ask.deed}) ended with {story.end!r}"]
    counts = {"resets": row.resets, "late aborts": slow, "duplicated characters": row.duplicated, "missing characters": row.missing}
    words += [f"{count} {what}" for what, count in counts.items() if count]
    if long:
        since = datetime.fromtimestamp(pause.since, UTC).time().isoformat("milliseconds")
        words.append(f"silent for {pause.seconds:.2f} s from {since} on, {'+'.join(story.continued) or 'not continued'}")
    return [", ".join(words)]
