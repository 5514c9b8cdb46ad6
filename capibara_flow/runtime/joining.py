"""A step that several workers do at the same time is joined without a state of its own: whoever sees all parts goes on.

Each puts its part into a short-lived stream, once, and looks there for the others until all are in or the step's time is up. Two who see
all parts say the same command under the same id, which is stored once. Whoever dies before he looked is redelivered, and looks again.
"""

import asyncio
import time

from nats.errors import Error as NatsError
from pydantic import ValidationError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime import work
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import last_message, publish_once
from capibara_flow.telemetry import log
from topics.grounding import PartDone

_STREAM = "CF_JOIN"
_FIRST, _MOST = 0.01, 0.25  # seconds between two looks


class Join:
    """The parts of steps, as this process puts and finds them."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client
        self._jetstream = client.jetstream()

    async def joined(self, own: PartDone, parts: tuple[str, ...], until: float) -> list[PartDone]:
        """*own* and what the other *parts* have given by *until* (seconds since the epoch).

        Raises ``BrokerUnavailable`` or ``TooLarge``.
        """
        if set(parts) <= {own.part}:
            return [own]
        await self._put(own)
        found, pause = {own.part: own}, _FIRST
        while missing := [part for part in parts if part not in found]:
            for part in missing:
                if (share := await self._find(own, part)) is not None:
                    found[part] = share
            if len(found) == len(parts) or time.time() >= until:
                break
            await asyncio.sleep(min(pause, max(0.0, until - time.time())))
            pause = min(2 * pause, _MOST)
        return [found[part] for part in parts if part in found]

    async def _put(self, own: PartDone) -> None:
        headers = {"Nats-Msg-Id": own.dedupe, "content-type": "application/json", **work.carried()}
        try:
            await publish_once(self._client, self._jetstream, own.subject, own.model_dump_json(exclude_none=True).encode(), headers)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"{own.subject} was not stored: {error!r}") from error

    async def _find(self, own: PartDone, part: str) -> PartDone | None:
        message = await last_message(self._client, f"cf.join.{own.turn}.{own.step}.{part}", _STREAM)
        if message is None:
            return None
        try:
            return PartDone.read(message.data)
        except ValidationError as error:
            # As good as none, but nobody needs to wait for it.
            log.warning("part_unreadable", turn=own.turn, part=part, problems=error.error_count())
            return PartDone(turn=own.turn, step=own.step, part=part, problem="it could not be read")
