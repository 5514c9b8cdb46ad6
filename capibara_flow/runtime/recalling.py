"""An engine's answer, or the same one again: what was said before to the same question is not made anew."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from capibara_flow.domain.caching import Recording, cache_key
from capibara_flow.domain.fleet import Expert
from capibara_flow.ports import Piece, Recalled
from capibara_flow.runtime.cache import AnswerCache
from topics.chat import CallExpert


class Recall:
    """Answers of *experts* (by name) drawn at temperatures up to *warmest*, kept in *cache*."""

    def __init__(self, cache: AnswerCache, experts: Callable[[str], Expert | None], warmest: float) -> None:
        self._cache, self._experts, self._warmest = cache, experts, warmest

    def key(self, command: CallExpert, tenant: str) -> str | None:
        """Under which key the answer to *command* is kept for *tenant*; none when it may not be."""
        expert = self._experts(command.request.model or command.expert)
        return cache_key(tenant, expert, command.request, warmest=self._warmest) if expert else None

    async def pieces(self, key: str, turn: str, made: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """The answer kept under *key*, behind ``Recalled``; else what the engine *made* of it, which *turn* then keeps."""
        async with aclosing(made):
            if kept := await self._cache.get(key):
                yield Recalled()
                for piece in kept.pieces():
                    yield piece
                return
            recording = Recording()
            async for piece in made:
                recording.take(piece)
                yield piece
        # Before the turn's last word: who erases the turn waits for that.
        if answer := recording.answer:
            await self._cache.put(key, turn, answer)
