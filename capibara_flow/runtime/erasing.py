"""Removing a turn for good: from every stream, and out of the hands of whoever still works on it.

First it is stopped, then its leases go with all else: what a straggler says under a lease that is gone is refused by the broker.
"""

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any

from nats.errors import Error as NatsError

from capibara_flow.errors import BrokerUnavailable, TurnUnknown
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import cancel, ended
from topics.streams import erased_mark, subject_token, traces

_QUEUES, _SIGNALS = "CF_WORK", "CF_CTL"
_NO_STREAM = 10059
_TIMEOUT = 5.0
_END = 2.0  # seconds that whoever works on the turn has to end it
_LOOK = 0.05
_PAUSE = 0.2  # seconds between passes: what was on its way arrives meanwhile
_HEARD = 1.5  # seconds in which whoever was told to stop may still say so
_LIMIT = 12.0  # seconds after which we say that it cannot be done now


async def erase(client: TokenClient, turn: str, streams: Sequence[str], *, retry_seconds: float = 2.0) -> int:
    """Stop *turn* and remove every trace of it from *streams* (names; one that does not exist is passed over).

    Takes half a second for a turn that has ended; one that was waiting or being worked on is watched until whoever may have paused for
    *retry_seconds* before another try has found it stopped. Returns how many messages are gone, signals to stop not counted.
    Raises ``TurnUnknown`` for what can be no turn's id, and ``BrokerUnavailable`` when the broker does not answer or more goes on
    coming: then erase it again.
    """
    if not turn or subject_token(turn) != turn:  # a wildcard would take the turns of everybody
        raise TurnUnknown(f"{turn!r} is no turn's id")
    queues = [name for name in streams if name.startswith(_QUEUES)]
    waiting = await _purge(client, turn, queues)
    begun = waiting > 0 or await ended(client, turn) is False
    if begun:
        await _mark(client, turn)
        await cancel(client.jetstream(), turn, "erased")
        waiting += await _purge(client, turn, queues)
        await _end(client, turn)
    return waiting + await _sweep(client, turn, streams, calm=_PAUSE + (retry_seconds if begun else 0))


async def _mark(client: TokenClient, turn: str) -> None:
    """Leave a mark for whoever sleeps now and will come back to the turn: nothing of it may be said or kept any more."""
    try:
        await client.jetstream().publish(erased_mark(turn), b"", timeout=_TIMEOUT)
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable(f"the broker does not take the mark of {turn}: {error!r}") from error


async def _end(client: TokenClient, turn: str) -> None:
    """Wait until the last word of *turn* is said, so that who reads it hears the end; but only a short while."""
    loop = asyncio.get_running_loop()
    patience = loop.time() + _END
    while not await ended(client, turn):
        if loop.time() > patience:
            return
        await asyncio.sleep(_LOOK)


async def _sweep(client: TokenClient, turn: str, streams: Sequence[str], *, calm: float) -> int:
    """Remove what there is of *turn* until nothing new has come for *calm* seconds; how many messages that were."""
    loop = asyncio.get_running_loop()
    gone, since, limit = 0, loop.time(), loop.time() + calm + _LIMIT
    others = [name for name in streams if name != _SIGNALS]
    signals = [name for name in streams if name == _SIGNALS]
    while loop.time() < limit:
        if removed := await _purge(client, turn, others):
            gone, since = gone + removed, loop.time()
        elif loop.time() - since >= calm:
            # Signals go last: until then they stop whoever comes back to the turn. Whoever heard one just now may yet say so;
            # ours were heard long ago.
            if not await _purge(client, turn, signals):
                return gone
            since, calm = loop.time(), max(_PAUSE, _HEARD - calm)
        await asyncio.sleep(_PAUSE)
    raise BrokerUnavailable(f"somebody still works on {turn}, or reads it: {gone} messages are gone, more came; erase it again")


async def _purge(client: TokenClient, turn: str, streams: Iterable[str]) -> int:
    """Remove what *streams* have of *turn*; how many messages that were."""
    return sum(await asyncio.gather(*(_purge_one(client, name, subject) for name in streams for subject in traces(turn))))


async def _purge_one(client: TokenClient, stream: str, subject: str) -> int:
    try:
        request = json.dumps({"filter": subject}).encode()
        reply = await client.request(f"$JS.API.STREAM.PURGE.{stream}", request, timeout=_TIMEOUT)
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable(f"{stream} does not answer: {error!r}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    if (refusal := answer.get("error")) is None:
        return int(answer["purged"])
    if refusal.get("err_code") == _NO_STREAM:
        return 0
    raise BrokerUnavailable(f"{stream}: {refusal['description']}")
