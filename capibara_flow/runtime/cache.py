"""The bucket of answers that may be given again, each below its key and the turn that made it, so that who erases that turn erases it.

Nobody waits for it, and no turn fails by it: a cache that does not answer has nothing.
"""

import asyncio
import json

from nats.errors import Error as NatsError

from capibara_flow.domain.caching import CachedAnswer
from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import fits, last_message
from capibara_flow.telemetry import ANSWER_HITS, ANSWER_MISSES, log
from topics.streams import ANSWERS, answer_key

_PATIENCE = 1.0  # seconds


class AnswerCache:
    """Answers by their ``domain.caching.cache_key``; the stream is there only when the layout has an ``answer_age``."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client

    async def get(self, key: str) -> CachedAnswer | None:
        """The answer kept last under *key*; none when there is none, or it cannot be had or read now."""
        answer = await self._find(key)
        (ANSWER_MISSES if answer is None else ANSWER_HITS).inc()
        return answer

    async def put(self, key: str, turn: str, answer: CachedAnswer) -> None:
        """Keep the *answer* that *turn* has made under *key*, unless it is too large, or cannot be kept now.

        Call it before the turn's last word: who erases a turn waits for that, and so finds what is kept of it.
        """
        body = answer.body()
        if body is None or not fits(self._client, body):
            return
        try:
            reply = await self._client.request(answer_key(key, turn), body, timeout=_PATIENCE)
            refusal = json.loads(reply.data).get("error")
        except (NatsError, TimeoutError) as error:
            refusal = {"description": repr(error)}
        if refusal:
            log.warning("answer_not_kept", turn=turn, error=refusal["description"])

    async def _find(self, key: str) -> CachedAnswer | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await last_message(self._client, answer_key(key, "*"), ANSWERS)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning("answer_cache_away", error=repr(error))
            return None
        return CachedAnswer.of(found.data) if found else None
