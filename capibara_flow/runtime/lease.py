"""The lease of a branch: whoever wrote the last message of its subject may write output; the broker refuses everybody else."""

import orjson
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from capibara_flow.errors import BrokerUnavailable, LeaseLost
from capibara_flow.runtime.client import TokenClient, encoded
from capibara_flow.runtime.output import last_message

#: JetStream's code for a condition that does not hold.
WRONG_SEQUENCE = 10071
_EXPECTED, _EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence", "Nats-Expected-Last-Subject-Sequence-Subject"
_TIMEOUT = 5.0


def behind(sequence: int, subject: str) -> dict[str, str]:
    """Headers: what is published with them is stored only while *sequence* is the last of *subject* (0: while there is none)."""
    return {_EXPECTED: str(sequence), _EXPECTED_SUBJECT: subject}


def unbegun(subject: str) -> dict[str, str]:
    """Headers: output on *subject* is stored only while nobody has begun to answer there."""
    return behind(0, subject.replace(".data.", ".lease.", 1))


class Lease:
    """Our claim to what the lease *subject* stands for; *name* must be nobody else's, not even another claim's of this process."""

    def __init__(self, client: TokenClient, subject: str, name: str) -> None:
        self._client = client
        self._subject, self._name = subject, name.encode()
        self._hold(0)

    def _hold(self, sequence: int) -> None:
        self._sequence = sequence
        #: Encoded headers: what is published with them is stored only while the lease is ours.
        self.condition = encoded(behind(sequence, self._subject))

    async def take(self) -> bool:
        """Take it; whether somebody held it before us. Raises ``LeaseLost`` and ``BrokerUnavailable``."""
        first = await self._bid(0)  # nearly always nobody was here before
        if first is not None:
            self._hold(first)
            return False
        before = await last_message(self._client, self._subject)
        sequence = await self._bid(before.sequence if before else 0)
        if sequence is None:
            raise LeaseLost(f"somebody else took {self._subject} at the same time")
        self._hold(sequence)
        return True

    async def renew(self) -> None:
        """Replace it by a new one of ours: what left under the old one and has not arrived never will. Raises as ``take`` does."""
        sequence = await self._bid(self._sequence)
        if sequence is None:
            last = await last_message(self._client, self._subject)
            if last is None or last.data != self._name:  # else it is a bid of ours whose answer got lost
                raise LeaseLost(f"somebody else took {self._subject}")
            sequence = last.sequence
        self._hold(sequence)

    async def _bid(self, expected: int) -> int | None:
        """Write our name as the lease that follows *expected*: its sequence, or none when another one followed."""
        try:
            reply = await self._client.request(self._subject, self._name, timeout=_TIMEOUT, headers={_EXPECTED: str(expected)})
        except NoRespondersError as error:
            raise BrokerUnavailable("the output stream is not there") from error
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"no lease: {error!r}") from error
        answer = orjson.loads(reply.data)
        if refusal := answer.get("error"):
            if refusal["err_code"] == WRONG_SEQUENCE:
                return None
            raise BrokerUnavailable(f"no lease: {refusal['description']}")
        return int(answer["seq"])
