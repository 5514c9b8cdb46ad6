"""What every handler of the door needs, and the steps that both dialects share."""

import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from capibara_flow.domain.collecting import Collected
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routing import candidates
from capibara_flow.domain.turns import belongs, created, is_turn_id, turn_id
from capibara_flow.edge.identity import identify
from capibara_flow.edge.problems import explained
from capibara_flow.errors import BadRequest, TurnUnknown
from capibara_flow.ports import Batch, Feed, Identity, Turns
from capibara_flow.settings import AuthSettings, EdgeSettings
from topics.chat import ChatRequest, RouteTurn
from topics.output import parse

Body = TypeVar("Body", bound=BaseModel)

#: Seconds beyond a turn's deadline in which its last word may still arrive.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Door:
    """The door's parts; ``app.build`` hangs handlers on it."""

    turns: Turns
    fleet: Fleet
    edge: EdgeSettings
    auth: AuthSettings

    async def read(self, request: web.Request, model: type[Body]) -> Body:
        """The request's body as *model*; raises ``BadRequest``, and 413 when it is too large."""
        try:
            raw = await request.read()
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

    async def open(self, request: ChatRequest, identity: Identity) -> tuple[str, Feed]:
        """Start a turn: its id, and its output."""
        now = time.time()
        turn = turn_id(milliseconds=int(now * 1000), entropy=secrets.token_bytes(10), tenant=identity.tenant)
        batches = await self.turns.open(RouteTurn(turn=turn, request=request), identity, now + self.edge.turn_seconds)
        return turn, batches

    async def known(self, request: web.Request) -> str:
        """The turn that the path names, if it is there and the asker's own; raises ``TurnUnknown``."""
        turn = request.match_info["turn"]
        identity = self.identify(request)
        if not is_turn_id(turn) or not belongs(turn, identity.tenant):
            raise TurnUnknown("there is no such turn")
        young = abs(time.time() - created(turn)) < self.edge.turn_seconds
        if not young and not await self.turns.exists(turn):
            raise TurnUnknown("there is no such turn, or its output is no longer kept")
        return turn

    def seconds_left(self, turn: str) -> float:
        """How long *turn* may still go on, with some grace; that much remains to read an old one."""
        return max(0.0, created(turn) + self.edge.turn_seconds - time.time()) + GRACE_SECONDS


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
