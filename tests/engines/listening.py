"""What the engine tests share: listening to an engine, and waiting for what will happen."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from capibara_flow.ports import ChatEngine, Piece, Text
from topics.chat import ChatRequest


async def heard(engine: ChatEngine, request: ChatRequest, into: list[Piece] | None = None) -> list[Piece]:
    """All pieces of an answer; *into* keeps what came before an error."""
    pieces = [] if into is None else into
    async with aclosing(engine.stream(request)) as stream:
        async for piece in stream:
            pieces.append(piece)
    return pieces


def text_in(pieces: list[Piece]) -> str:
    """The answer's words."""
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


async def until(happened: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    """Return when *happened* says so; raises ``TimeoutError``."""
    async with asyncio.timeout(seconds):
        while not await happened():  # noqa: ASYNC110  other processes raise no event of ours
            await asyncio.sleep(0.01)
