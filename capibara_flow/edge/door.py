"""What every handler of the door needs, and the steps that both dialects share."""

import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routing import candidates
from capibara_flow.domain.turns import belongs, created, is_turn_id, own_buckets, turn_id
from capibara_flow.edge.asked import REPLAYED, Terms, digest
from capibara_flow.edge.identity import ANONYMOUS, identify
from capibara_flow.edge.problems import explained
from capibara_flow.errors import BadRequest, TurnGone, TurnUnknown, Unauthorized
from capibara_flow.ports import Batch, Feed, Identity, Turns
from capibara_flow.settings import AuthSettings, EdgeSettings
from topics.chat import ChatRequest, Decision, RouteTurn
from topics.output import parse

Body = TypeVar("Body", bound=BaseModel)

#: Stands before a turn's id in the ids of OpenAI's dialect.
PREFIX = "chatcmpl-"
#: Seconds beyond a turn's deadline in which its last word may still arrive.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Opened:
    """A turn and its output, for whoever asked; *replayed* if it was asked for before, *deadline* (seconds since the epoch) is its end."""

    turn: str
    feed: Feed
    deadline: float
    replayed: bool

    @property
    def headers(self) -> dict[str, str]:
        """What the response's headers say of it."""
        return {"X-Capibara-Turn": self.turn} | ({REPLAYED: "true"} if self.replayed else {})

    def seconds_left(self) -> float:
        """How long to wait for its end, with some grace."""
        return max(0.0, self.deadline - time.time()) + GRACE_SECONDS


@dataclass
class Door:
    """The door's parts; ``app.build`` hangs handlers on it. Output is kept for *turn_age* seconds; *fleet* is exchanged when it changes."""

    turns: Turns
    fleet: Fleet
    edge: EdgeSettings
    auth: AuthSettings
    turn_age: float = 3600.0

    @cached_property
    def _buckets(self) -> dict[str, int]:
        """The buckets of the tenants that are known here."""
        return own_buckets(key.tenant for key in self.auth.keys)

    async def read(self, request: web.Request, model: type[Body]) -> Body:
        """The request's body as *model*; raises ``BadRequest``, and 413 when it is too large."""
        try:
            raw = await _body(request, self.edge.max_body_bytes)
        except web.RequestPayloadError as error:
            raise BadRequest("the body cannot be read: it ends too early or is not encoded as its headers say") from error
        if not raw.strip():
            raise BadRequest("the body is empty; send a JSON object")
        try:
            return model.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise explained(error, raw) from error

    def check(self, request: ChatRequest) -> None:
        """Refuse at once what cannot be served; raises ``BadRequest`` or ``UnknownExpert``."""
        if len(request.messages) > self.edge.max_messages:
            raise BadRequest(f"{len(request.messages)} messages are too many; the limit is {self.edge.max_messages}")
        candidates(request, self.fleet)

    def identify(self, request: web.Request) -> Identity:
        """Who asks; raises ``Unauthorized``."""
        return identify(request, self.auth)

    def identify_by_key(self, request: web.Request, purpose: str) -> Identity:
        """Who asks for what only holders of a key may have, to some *purpose* (``read usage``); raises ``Unauthorized``."""
        identity = self.identify(request)
        if identity.tenant == ANONYMOUS:
            # All who bring no key are one tenant, and strangers to each other.
            raise Unauthorized(f"an API key is needed to {purpose}: send it as 'Authorization: Bearer KEY'")
        return identity

    async def open(self, request: ChatRequest, identity: Identity, terms: Terms) -> Opened:
        """Start a turn, or find the one that its key stands for.

        Raises ``QueueFull``, ``BrokerUnavailable``, ``KeyReused``, and ``TurnGone`` for a turn of before.
        """
        now = time.time()
        turn = ours = self.new_turn(now, identity)
        deadline = now + terms.seconds
        if terms.key is not None:
            turn, deadline = await self.turns.claim(terms.key, digest(request), ours, deadline)
        if turn != ours and await self.turns.exists(turn):
            return replace(await self.follow(turn), replayed=True)
        # Who claimed the key may have died before the turn was on its way: it is sent once, however often we say so.
        kinds = {"attended": terms.attended, "recalled": terms.recalled}
        command = RouteTurn(turn=turn, request=request, bucket=self._buckets.get(identity.tenant), priority=terms.priority)
        feed = await self.turns.open(command, identity, deadline, **kinds)
        return Opened(turn, feed, deadline, replayed=turn != ours)

    async def preview(self, request: ChatRequest, identity: Identity) -> Decision:
        """Who would answer, and why; raises what ``check`` raises, and ``BrokerUnavailable``."""
        self.check(request)
        return await self.turns.preview(self.new_turn(time.time(), identity), request)

    def new_turn(self, now: float, identity: Identity) -> str:
        """An id for a turn of *identity* that begins *now*."""
        return turn_id(milliseconds=int(now * 1000), entropy=secrets.token_bytes(10), tenant=identity.tenant)

    def own(self, request: web.Request) -> str:
        """The turn that the path names, if it can be the asker's own; raises ``TurnUnknown``."""
        turn = request.match_info["turn"].removeprefix(PREFIX)
        identity = self.identify(request)
        if not is_turn_id(turn) or not belongs(turn, identity.tenant):
            raise TurnUnknown("there is no such turn")
        return turn

    async def known(self, request: web.Request) -> str:
        """The turn that the path names, if it is there and the asker's own; raises ``TurnUnknown`` or ``TurnGone``."""
        turn = self.own(request)
        age = time.time() - created(turn)
        if abs(age) < self.edge.turn_seconds or await self.turns.exists(turn):
            return turn
        if abs(age) < self._longest and await self.turns.known(turn):
            return turn
        if age < self.turn_age:
            raise TurnUnknown("there is no such turn, or its output is no longer kept")
        raise TurnGone(f"output is kept for {self.turn_age:g} s, and this turn is older")

    async def follow(self, turn: str, after: int = 0) -> Opened:
        """Go on reading *turn* after sequence *after*; raises ``TurnUnknown``, ``TurnGone`` or ``BrokerUnavailable``."""
        return Opened(turn, await self.turns.follow(turn, after), created(turn) + self._longest, replayed=False)

    @property
    def _longest(self) -> float:
        """How long any turn may last, of whatever kind it is."""
        return max(self.edge.turn_seconds, self.edge.ingest_seconds)


async def _body(request: web.Request, most: int) -> bytes:
    """As ``request.read()``, which would keep it as long as there is the request: to the end of the answer."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > most:
            raise web.HTTPRequestEntityTooLarge(most)
    return bytes(body)


async def collect(feed: Feed) -> Collected:
    """Follow a turn to its end."""
    collected = Collected()

    def take(batch: Batch) -> bool:
        for line in batch.lines:
            collected.add(parse(line))
        return True

    feed.tap(take)
    async with aclosing(feed):
        async for arrived in feed:
            for batch in arrived:
                take(batch)
    return collected
