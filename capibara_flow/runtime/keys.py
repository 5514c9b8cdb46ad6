"""What an ``Idempotency-Key`` stands for: of all who come with one, the broker lets one turn in; the others find it there.

A turn's claim to a key is a message below the key's hash, written on the condition that the last one there is what the writer believes:
none, or one that counts no more.
"""

import asyncio
import json
import time

from nats.errors import Error as NatsError

from capibara_flow.errors import BrokerUnavailable, KeyReused
from capibara_flow.runtime.bucket import REMOVED, marker, removed
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.lease import WRONG_SEQUENCE, behind
from capibara_flow.runtime.output import last_message
from topics.streams import KEYS, claim_key

#: JetStream's codes: the condition does not hold, or somebody else's write under the same condition is still on its way.
_REFUSED = {WRONG_SEQUENCE, 10164}
_RACES, _PAUSE = 20, 0.05
_TIMEOUT = 5.0


class Keys:
    """The bucket of keys."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client

    async def claim(self, key: str, digest: str, turn: str, deadline: float) -> tuple[str, float]:
        """See ``ports.Turns``. A turn that was never accepted holds its key no longer than to its deadline."""
        expected, body = 0, json.dumps({"digest": digest, "deadline": deadline}).encode()
        for _ in range(_RACES):
            if await self._write(key, turn, body, expected):
                return turn, deadline
            found = await last_message(self._client, claim_key(key, "*"), KEYS)
            if found is None or removed(found) or marker(found):
                expected = found.sequence if found else 0
                continue
            owner, claimed = found.subject.rpartition(".")[2], json.loads(found.data)
            if claimed["digest"] != digest:
                raise KeyReused("this Idempotency-Key came with another request before")
            if claimed["deadline"] > time.time() or await self._began(owner):
                return owner, claimed["deadline"]
            await self._write(key, owner, b"", found.sequence, **REMOVED)
            await asyncio.sleep(_PAUSE)
        raise BrokerUnavailable("too many come with this key at once; try again")

    async def _began(self, turn: str) -> bool:
        """Whether anything came of *turn*."""
        return await last_message(self._client, f"cf.out.{turn}.data.main") is not None

    async def _write(self, key: str, turn: str, body: bytes, expected: int, **headers: str) -> bool:
        """Write of *key* and *turn* what follows the message *expected*; false when another one followed."""
        condition = behind(expected, claim_key(key, "*"))
        try:
            reply = await self._client.request(claim_key(key, turn), body, timeout=_TIMEOUT, headers=condition | headers)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"no key can be kept now: {error!r}") from error
        refusal = json.loads(reply.data).get("error")
        if refusal is None:
            return True
        if refusal.get("err_code") in _REFUSED:
            return False
        raise BrokerUnavailable(f"no key can be kept now: {refusal['description']}")
