"""Several addresses of one expert, used as one."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from capibara_flow.errors import EngineBusy, EngineFault, EngineUnreachable
from capibara_flow.ports import Abilities, ChatEngine, Piece
from topics.chat import ChatRequest

#: How long a replica that could not be reached, was busy, or broke an answer off, comes last.
REST_SECONDS = 5.0


@dataclass(eq=False)
class _Replica:
    engine: ChatEngine
    streams: int = 0
    rests_until: float = 0.0
    last_used: int = 0


class Replicas:
    """A ``ports.ChatEngine`` over equal engines: the least busy one answers, the next one if it cannot even begin.

    Once a piece has been yielded an error is the caller's, who knows how to go on; it will be with another replica.
    """

    def __init__(self, engines: Sequence[ChatEngine], clock: Callable[[], float] = time.monotonic) -> None:
        if not engines:
            raise ValueError("no replicas")
        self._replicas = [_Replica(engine) for engine in engines]
        self._clock = clock
        self._uses = 0

    @property
    def abilities(self) -> Abilities:
        """They are equal: those of the first."""
        return self._replicas[0].engine.abilities

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """The answer of the first replica that can begin; raises what the last one raised when none can."""
        waiting = list(self._replicas)
        begun = False
        while True:
            replica = self._take(waiting)
            try:
                async with aclosing(replica.engine.stream(request)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
            except EngineFault:
                replica.rests_until = self._clock() + REST_SECONDS
                if begun or not waiting:
                    raise
            else:
                return
            finally:
                replica.streams -= 1

    async def health(self) -> None:
        """Return when one replica can answer; raises what the last one raised otherwise."""
        for number, replica in enumerate(self._replicas, 1):
            try:
                return await replica.engine.health()
            except (EngineUnreachable, EngineBusy):
                if number == len(self._replicas):
                    raise
        return None

    async def aclose(self) -> None:
        """Close them all."""
        for replica in self._replicas:
            await replica.engine.aclose()

    def _take(self, waiting: list[_Replica]) -> _Replica:
        replica = min(waiting, key=self._reluctance)
        waiting.remove(replica)
        self._uses += 1
        replica.last_used = self._uses
        replica.streams += 1
        return replica

    def _reluctance(self, replica: _Replica) -> tuple[bool, int, int]:
        return replica.rests_until > self._clock(), replica.streams, replica.last_used
