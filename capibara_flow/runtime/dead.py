"""Dead letters: reading what stages gave up, and asking for it again as a new turn."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import BadRequest, BrokerUnavailable, TurnUnknown
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import asking, publish_once, stored
from topics.chat import CallExpert, RouteTurn, TurnFailed
from topics.flow import FLOW
from topics.message import DEADLINE, PRINCIPAL, TENANT, Command
from topics.streams import subject_token

DEAD = "CF_DEAD"
_WINDOW = 128  # sequences looked at together, no more than are read at once


@dataclass(frozen=True)
class Letter:
    """One dead letter: where the stream has it, when it came there, whose turn it was, and what was given up."""

    sequence: int
    when: datetime
    tenant: str
    principal: str
    failed: TurnFailed


@dataclass(frozen=True)
class Again:
    """The new *turn* that a letter was asked as, and whether its letter is still there."""

    letter: Letter
    turn: str
    kept: bool


def new_turn(tenant: str) -> str:
    """A fresh id for a turn of *tenant*."""
    return turn_id(milliseconds=time.time_ns() // 1_000_000, entropy=os.urandom(10), tenant=tenant)


def command(letter: Letter, turn: str) -> Command:
    """The command that *letter* keeps, as one of the new *turn*; raises ``BadRequest`` when it keeps none that can be asked again."""
    failed = letter.failed
    where = f"the letter of {failed.turn} at {failed.stage}"
    kind = {hop.worker: hop.consumes for hop in FLOW}.get(failed.stage)
    if kind is None or not issubclass(kind, Command):
        raise BadRequest(f"{where} keeps nothing that could be asked again")
    try:
        asked = kind.read(failed.body.encode())
    except ValidationError as error:
        raise BadRequest(f"{where} keeps no whole command (a very large one is cut off): {error.errors()[0]['msg']}") from error
    if isinstance(asked, CallExpert):
        # From the first step on, for whoever reads it expects that; it names the expert.
        return RouteTurn(turn=turn, request=asked.request, bucket=asked.bucket, priority=asked.priority)
    return asked.model_copy(update={"turn": turn})


class DeadLetters:
    """What the stream of dead letters holds. Every method raises ``BrokerUnavailable``."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client
        self._jetstream = client.jetstream()

    async def newest(self, limit: int) -> tuple[list[Letter], int]:
        """At most *limit* letters, the newest first, and how many there are in all."""
        with asking():
            state = (await self._jetstream.stream_info(DEAD)).state
        found: list[Letter] = []
        before = state.last_seq + 1
        while len(found) < limit and before > state.first_seq:
            after = max(before - _WINDOW, state.first_seq) - 1
            window = await stored(self._client, TurnFailed.subjects(), after, DEAD)
            sequences = [each.sequence for each in reversed(window) if each.sequence < before]
            found += await self._read(sequences[: limit - len(found)])
            before = after + 1
        return found, int(state.messages)

    async def of(self, turn: str, stage: str | None = None) -> list[Letter]:
        """The letters of *turn* (those of *stage*, if it is named), the oldest first; raises ``TurnUnknown`` when there is none."""
        where = f"{turn} at {stage}" if stage else turn
        if any(subject_token(name) != name for name in (turn, stage or "")) or not turn:  # a wildcard would find those of others
            raise TurnUnknown(f"no dead letter of {where!r}: that is no turn's id")
        subject, after = f"cf.dead.{turn}.{stage or '*'}", 0
        found: list[Letter] = []
        while messages := await stored(self._client, subject, after, DEAD):
            after = messages[-1].sequence
            found += await self._read([each.sequence for each in messages])
        if not found:
            raise TurnUnknown(f"no dead letter of {where}: `capibara dead list` shows those that there are")
        return found

    async def _read(self, sequences: list[int]) -> list[Letter]:
        """The letters at *sequences*, with all that a letter's headers tell; one that has gone meanwhile is left out."""
        found = []
        for sequence in sequences:
            with asking(), suppress(NotFoundError):
                found.append(_letter(await self._jetstream.get_msg(DEAD, sequence)))
        return found

    async def retry(self, letter: Letter, *, turn: str, deadline: float, keep: bool = False) -> Again:
        """Ask what *letter* keeps as the new *turn*, until *deadline* (seconds since the epoch); then remove the letter unless *keep*.

        Raises ``QueueFull``, ``TooLarge`` and ``BadRequest``; the letter is still there then. It is also there, and asked already,
        when the broker falls silent in between: ``Again.kept`` tells.
        """
        asked = command(letter, turn)
        if not letter.tenant:
            raise BadRequest(f"the letter of {letter.failed.turn} does not tell whose turn it was: nobody could read the answer")
        headers = {
            "Nats-Msg-Id": asked.dedupe,
            "content-type": "application/json",
            TENANT: letter.tenant,
            PRINCIPAL: letter.principal,
            DEADLINE: f"{deadline:.3f}",
        }
        body = asked.model_dump_json(exclude_none=True).encode()
        with asking():
            await publish_once(self._client, self._jetstream, asked.subject, body, headers)
        return Again(letter, turn, keep or not await self._removed(letter))

    async def _removed(self, letter: Letter) -> bool:
        try:
            return bool(await self._jetstream.delete_msg(DEAD, letter.sequence))
        except (NatsError, TimeoutError):
            with suppress(BrokerUnavailable):  # somebody else may have removed it
                return not await self._read([letter.sequence])
            return False


def _letter(message: Any) -> Letter:
    """A stored *message* of the stream, read; what cannot be understood is a letter that says so."""
    data = message.data or b""
    try:
        failed = TurnFailed.read(data)
    except ValidationError:
        _, _, turn, stage = message.subject.split(".")
        words = {"title": "unreadable letter", "detail": "not in the form that this version writes"}
        failed = TurnFailed(turn=turn, stage=stage, body=data.decode("utf-8", "replace"), **words)
    headers = message.headers or {}
    return Letter(message.seq, message.time, headers.get(TENANT, ""), headers.get(PRINCIPAL, ""), failed)
