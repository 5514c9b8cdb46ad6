"""Storing a message once, and reading stored ones: the last of a subject, and runs of them by batched direct get (NATS ADR-31)."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import stamina
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError

from capibara_flow.errors import BrokerUnavailable, QueueFull, TooLarge
from capibara_flow.runtime.client import TokenClient, description, header, status
from topics.chat import CancelTurn
from topics.output import known

OUT = "CF_OUT"
#: JetStream's codes for a stream that is full (of messages or bytes), and for a disk that is.
FULL = frozenset({10077, 10047})
_BATCH = 256
_TIMEOUT = 5.0
_ELECTION = 15.0  # seconds: one takes 4 to 9, and another may follow
_NOTHING = {10037, 10059}  # no message found, no stream found
_FOR_NOW = {10008, 10158}  # no leader, the same message id is being stored just now
_HEADERS = 4096  # bytes, more than ours are


async def publish_once(client: Client, jetstream: JetStreamContext, subject: str, body: bytes, headers: dict[str, str]) -> None:
    """Store *body* under the ``Nats-Msg-Id`` of *headers*; raises ``TooLarge``, else what nats-py raises.

    The same id again is stored once, so asking again is safe while a leader is being elected.
    """
    if not fits(client, body):
        raise TooLarge(f"{len(body)} bytes are more than the broker takes at once")
    try:
        # Nearly always the only try: what trying again remembers of one weighs 3 kB, and stays until the collector comes.
        await jetstream.publish(subject, body, timeout=5, headers=headers)
    except (NatsError, TimeoutError) as error:
        if not _may_pass(error):
            raise
    else:
        return
    async for attempt in stamina.retry_context(on=_may_pass, attempts=None, timeout=_ELECTION, wait_max=2):
        with attempt:
            await jetstream.publish(subject, body, timeout=5, headers=headers)


@contextmanager
def asking() -> Iterator[None]:
    """What an operator asks of the broker in this block fails with our errors: ``QueueFull`` and ``BrokerUnavailable``."""
    try:
        yield
    except APIError as error:
        if error.err_code in FULL:
            raise QueueFull("too many turns are waiting: nothing was asked; try again later") from error
        raise BrokerUnavailable(f"the broker refuses: {error.description}") from error
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable(f"the broker does not answer: {error!r}") from error


def _may_pass(error: Exception) -> bool:
    """Whether *error* is one of an election, or of our own first try being still on its way."""
    return isinstance(error, TimeoutError | NoStreamResponseError) or (isinstance(error, APIError) and error.err_code in _FOR_NOW)


def fits(client: Client, body: bytes) -> bool:
    """Whether the broker takes *body* with our headers; whoever sends it more is not refused but disconnected."""
    return len(body) + _HEADERS <= client.max_payload


@dataclass(frozen=True, slots=True)
class Stored:
    """One message as its stream has it, with its raw *headers*; the *subject* only where one alone was asked for, else it is in those."""

    sequence: int
    data: bytes
    subject: str = field(default="", compare=False)
    headers: bytes = field(default=b"", compare=False)


async def last_message(client: Client, subject: str, stream: str = OUT) -> Stored | None:
    """The last message of *subject*, asked of the stream's leader; none also when there is no such stream. Raises ``BrokerUnavailable``."""
    return await one_message(client, stream, last_by_subj=subject)


async def ended(client: Client, turn: str, branch: str = "main") -> bool | None:
    """Whether the last that was said on *branch* is final; none when nothing was said. Raises ``BrokerUnavailable``."""
    last = await last_message(client, f"cf.out.{turn}.data.{branch}")
    if last is None:
        return None
    output = known(last.data.rsplit(b"\n", 1)[-1])
    return output is not None and output.final


async def cancel(jetstream: JetStreamContext, turn: str, reason: str) -> None:
    """Tell everybody who works on *turn*, now or later, to stop; raises ``BrokerUnavailable``."""
    signal = CancelTurn(turn=turn, reason=reason)
    try:
        await jetstream.publish(signal.subject, signal.model_dump_json().encode(), timeout=_TIMEOUT)
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable("the broker does not take the cancellation now") from error


async def one_message(client: Client, stream: str, **which: Any) -> Stored | None:
    """The message that *which* names (``seq``, ``last_by_subj``, ``next_by_subj``), as the leader of *stream* has it.

    None when it is not there, or there is no such stream. Raises ``BrokerUnavailable``.
    """
    try:
        reply = await client.request(f"$JS.API.STREAM.MSG.GET.{stream}", json.dumps(which).encode(), timeout=_TIMEOUT)
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable(f"{stream} does not answer: {error!r}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    if message := answer.get("message"):
        data, headers = (base64.b64decode(message.get(part, "")) for part in ("data", "hdrs"))
        return Stored(message["seq"], data, message["subject"], headers)
    if answer["error"].get("err_code") in _NOTHING:
        return None
    raise BrokerUnavailable(f"{stream}: {answer['error']['description']}")


async def stored(client: TokenClient, subject: str, after: int, stream: str = OUT, most: int = _BATCH) -> list[Stored]:
    """Messages of *subject* with sequences above *after*, in order, at most so many; raises ``BrokerUnavailable``."""
    return await batch(client, stream, {"seq": after + 1, "next_by_subj": subject, "batch": most})


async def batch(client: TokenClient, stream: str, asked: dict[str, Any]) -> list[Stored]:
    """What one direct get of *stream* brings that *asked* for several messages; raises ``BrokerUnavailable``."""
    found: list[Stored] = []
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(_: bytes, headers: bytes, data: bytes) -> None:
        if code := status(headers):
            _end(ended, code.decode(), description(headers))
        else:
            found.append(Stored(int(header(headers, b"Nats-Sequence")), data, headers=headers))

    inbox = client.new_inbox()
    subscription = await client.listen(inbox, receive)
    try:
        await client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(asked).encode(), reply=inbox)
        async with asyncio.timeout(_TIMEOUT):
            await ended
    except (NatsError, TimeoutError) as error:
        raise BrokerUnavailable(f"{stream} does not answer: {error!r}") from error
    finally:
        await client.deafen(subscription)
    return found


async def everything(client: TokenClient, subject: str, after: int, patience: float) -> list[Stored]:
    """All messages of *subject* above *after* that the leader has; raises ``BrokerUnavailable``, after *patience* seconds at the latest."""
    last = await last_message(client, subject)
    found: list[Stored] = []
    end = time.monotonic() + patience
    while last is not None and after < last.sequence:
        # A replica that lags behind answers short: ask until the leader's last message has come.
        if messages := await stored(client, subject, after):
            found += messages
            after = messages[-1].sequence
        elif time.monotonic() > end:
            raise BrokerUnavailable(f"{subject} cannot be read to its end")
        else:
            await asyncio.sleep(0.05)
    return found


def _end(ended: asyncio.Future[None], status: str, description: str) -> None:
    """End of batch (204) and nothing found (404) are answers; anything else is a fault."""
    if ended.done():
        return
    if status in {"204", "404"}:
        ended.set_result(None)
    elif status == "503":
        ended.set_exception(NoRespondersError())
    else:
        ended.set_exception(BrokerUnavailable(f"direct get: {status} {description}"))
