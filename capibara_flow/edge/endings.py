"""How a turn ends for whoever asked: told in the client's dialect, and counted once where it was opened."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from capibara_flow.domain.collecting import Collected
from capibara_flow.edge.door import collect
from capibara_flow.edge.sse import Encode, Stream
from capibara_flow.errors import BrokerUnavailable, CapibaraError, TurnExpired
from capibara_flow.ports import Feed
from capibara_flow.telemetry import RESUMES, TURN_SECONDS, TURNS


class Ending:
    """How a turn ended here: one of ``telemetry.OUTCOMES``; who opened it has left until something else is known."""

    outcome = "left"


@contextmanager
def counted(since: float, *, replayed: bool = False) -> Iterator[Ending]:
    """Count one turn that was opened here, and the seconds from *since* (monotonic) to the end of the block.

    One that is *replayed* was counted where it was opened: here a reader has come back to it.
    """
    ending = Ending()
    if replayed:
        RESUMES.inc()
        yield ending
        return
    try:
        yield ending
    except TurnExpired:
        ending.outcome = "expired"
        raise
    except ConnectionError:
        raise
    except Exception:
        ending.outcome = "broken"
        raise
    finally:
        TURNS.labels(ending.outcome).inc()
        TURN_SECONDS.observe(time.monotonic() - since)


async def relay(
    stream: Stream, feed: Feed, encode: Encode, ending: Ending, *, seconds: float, tell: Callable[[CapibaraError], bytes], after: int = 0
) -> None:
    """Write what *feed* brings behind sequence *after*, for *seconds* at most, then the fault if there was one."""
    problem: CapibaraError
    try:
        async with asyncio.timeout(seconds):
            last = await stream.copy(feed, encode, after)
    except TimeoutError:
        problem = _expired()
    except CapibaraError as error:
        problem = error
    else:
        ending.outcome = _outcome(last.lines[-1]) if last else "broken"
        return
    await stream.write(tell(problem))
    ending.outcome = "expired" if isinstance(problem, TurnExpired) else "broken"


async def whole(feed: Feed, ending: Ending, *, seconds: float) -> Collected:
    """All that *feed* brings: it is failed or done; raises ``TurnExpired`` after *seconds*, and ``BrokerUnavailable``."""
    try:
        async with asyncio.timeout(seconds):
            collected = await collect(feed)
    except TimeoutError as error:
        raise _expired() from error
    final = collected.failed or collected.done
    if final is None:
        raise BrokerUnavailable("the output ended without its final event")
    ending.outcome = _outcome(final.line())
    return collected


def _expired() -> TurnExpired:
    return TurnExpired("the turn did not end within its time")


def _outcome(line: bytes) -> str:
    """What a final *line* means; fields that we do not know harm nothing here."""
    final = json.loads(line)
    if final["event"] == "error":
        return "failed"
    return "cancelled" if final.get("finish_reason") == "cancelled" else "done"
