"""Documents on their way in: cut into pieces that the broker takes, put together again by who takes them in, then removed."""

import json
from collections.abc import AsyncIterable

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from capibara_flow.errors import BadRequest, BrokerUnavailable, QueueFull, TooLarge
from capibara_flow.runtime.client import TokenClient, fields
from capibara_flow.runtime.output import FULL, one_message, publish_once, stored
from topics.streams import DOCUMENTS, piece_subject

#: Bytes of a piece: far below what any broker takes at once.
PIECE = 256 * 1024
_TIMEOUT = 10.0


class Deposit:
    """The pieces of documents. Every method raises ``BrokerUnavailable``."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client
        self._jetstream = client.jetstream()

    async def put(self, turn: str, data: AsyncIterable[bytes], most: int) -> tuple[int, int]:
        """Keep *data* for *turn*: its size in bytes and in pieces. Raises ``TooLarge`` above *most* bytes, and ``QueueFull``."""
        size = pieces = 0
        held = bytearray()
        async for chunk in data:
            size += len(chunk)
            if size > most:
                raise TooLarge(f"a document may have {most} bytes at most")
            held += chunk
            while len(held) >= PIECE:
                await self._put(turn, pieces, bytes(held[:PIECE]))
                del held[:PIECE]
                pieces += 1
        if held:
            await self._put(turn, pieces, bytes(held))
            pieces += 1
        return size, pieces

    async def _put(self, turn: str, number: int, piece: bytes) -> None:
        try:
            await publish_once(self._client, self._jetstream, piece_subject(turn, number), piece, {"Nats-Msg-Id": f"{turn}:doc:{number}"})
        except APIError as error:
            if error.err_code in FULL:
                raise QueueFull("too many documents are waiting; try again later") from error
            raise BrokerUnavailable(f"the document was not taken: {error.description}") from error
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable("the broker does not take documents now") from error

    async def fetch(self, turn: str, pieces: int, size: int) -> bytes:
        """The whole document; raises ``BadRequest`` when something of it is no longer there."""
        found: dict[int, bytes] = {}
        after = 0
        # Few at a time: many large ones together would overrun our own buffers.
        while messages := await stored(self._client, piece_subject(turn, "*"), after, DOCUMENTS, most=16):
            for each in messages:
                found[int(fields(each.headers)["Nats-Subject"].rsplit(".", 1)[1])] = each.data
            after = messages[-1].sequence
        whole = b"".join(found[number] for number in sorted(found))
        if len(found) != pieces or len(whole) != size:
            raise BadRequest("the document is no longer there as it came: send it again")
        return whole

    async def waits(self, turn: str) -> bool:
        """Whether anything of the document is there."""
        return await one_message(self._client, DOCUMENTS, last_by_subj=piece_subject(turn, "*")) is not None

    async def remove(self, turn: str) -> None:
        """Keep nothing of the document any more."""
        asked = json.dumps({"filter": piece_subject(turn, "*")}).encode()
        try:
            await self._client.request(f"$JS.API.STREAM.PURGE.{DOCUMENTS}", asked, timeout=_TIMEOUT)
        except (NatsError, TimeoutError) as error:
            raise BrokerUnavailable(f"the document's pieces are still there: {error!r}") from error
