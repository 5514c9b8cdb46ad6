"""Engines that say again what was recorded of others: for every attempt of a turn what that attempt said, and how it ended."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress

from capibara_flow.domain.recording import Recording, Said, Take, fault
from capibara_flow.errors import BadRequest, EngineFault, Transient
from capibara_flow.ports import Abilities, Finish, Load, Piece, Recalled, Tally, Text, ToolFragment
from topics.chat import ChatRequest

#: Seconds before a turn's deadline at which an attempt fails that nobody is to try again.
_LATE = 0.2
_PATIENCE = 3.0  # seconds


class Played:
    """A recording as it is being played: how far it has come. *over* means that nothing more is expected of any engine.

    *quiet* is set while everybody waits: for the turn to be stopped, or for its deadline.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.quiet = asyncio.Event()
        self.over = False
        self._next = self._due = self._heard = 0
        self._news = asyncio.Event()

    @property
    def waits(self) -> bool:
        """Whether nothing is left to be said although the turn did not end by itself: nobody had taken its work."""
        return not self.over and self._next >= len(self.recording.takes)

    def take(self, expert: str) -> Take | None:
        """What *expert* says next. One that was never asked says what the recording ends with; none if nothing is recorded."""
        takes = self.recording.takes
        return takes[self._place(expert)] if takes else None

    def said(self, expert: str) -> None:
        """*expert* says what it says next."""
        place = self._place(expert)
        self._next = place + 1
        self.over = self.over or self.recording.takes[place].last

    def hears(self, pieces: int) -> None:
        """So many more *pieces* have reached the client."""
        self._heard += pieces
        self._news.set()

    async def caught_up(self, pieces: int) -> None:
        """Return when *pieces* more than before have reached the client; what has not when an attempt breaks off may get lost."""
        self._due += pieces
        with suppress(TimeoutError):  # played otherwise than it was recorded, some of it is perhaps not shown
            async with asyncio.timeout(_PATIENCE):
                while self._heard < self._due:
                    self._news.clear()
                    await self._news.wait()

    def _place(self, expert: str) -> int:
        takes = self.recording.takes
        own = (place for place in range(self._next, len(takes)) if takes[place].expert == expert)
        return next(own, len(takes) - 1)


class RecordedEngine:
    """``ports.ChatEngine`` that says what *playing*, the turn at work, has recorded of *expert*.

    *left* tells the seconds until its deadline. An attempt that lasted takes *lasting* seconds.
    """

    def __init__(
        self,
        expert: str,
        abilities: Abilities,
        playing: Callable[[], Played],
        left: Callable[[], float | None],
        lasting: float,
    ) -> None:
        self.expert, self.abilities = expert, abilities
        self._playing, self._left, self._lasting = playing, left, lasting

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        """What the next attempt said; raises what that one raised."""
        played = self._playing()
        take = played.take(self.expert)
        if take is None:
            raise BadRequest("no engine was asked in this recording, so there is nothing to answer with")
        goes_on = _goes_on(request, take)
        if goes_on and take.way == "skip":
            raise BadRequest("the recorded engine did not go on from the very words")
        played.said(self.expert)
        for piece in _pieces(take, goes_on=goes_on):
            yield piece
        if take.ending != "finished":
            await played.caught_up(sum(not piece.loading for piece in take.pieces))
            await self._end(take, played)

    async def _end(self, take: Take, played: Played) -> None:
        """Come to the end that *take* came to, which is not a good one."""
        if take.ending in {"stopped", "late"}:
            played.quiet.set()
            await asyncio.Event().wait()
        if take.lasted:
            await asyncio.sleep(self._lasting)
        if take.ending == "lost":
            raise Transient("the process that made this attempt was lost")
        error = fault(take.title, take.detail)
        if take.last and isinstance(error, EngineFault) and (left := self._left()) is not None:
            await asyncio.sleep(max(0.0, left - _LATE))
        raise error

    async def health(self) -> None:
        """A recording is always well."""

    async def aclose(self) -> None:
        """Nothing is open."""


def _goes_on(request: ChatRequest, take: Take) -> bool:
    """Whether *request* hands over the beginning of the answer."""
    last = request.messages[-1]
    return bool(take.text) and last.role == "assistant" and last.text.endswith(take.text)


def _pieces(take: Take, *, goes_on: bool) -> Iterator[Piece]:
    if take.cached:
        yield Recalled()
    if not goes_on:
        yield from _repeated(take)
    yield from map(_piece, take.pieces)
    if take.counted:
        yield Tally(*take.counted)
    if take.ending == "finished":
        yield Finish(take.reason)


def _repeated(take: Take) -> Iterator[Piece]:
    """What the client holds, said again in as many pieces as were recorded; all of it, if anything new follows."""
    if take.way not in {"skip", "prefill"} or not (take.unseen or take.pieces):
        return
    count = max(1, take.unseen)
    if take.reasoning:
        yield Text(reasoning=take.reasoning)
        count -= 1
    if take.text and count <= 1:
        yield Text(take.text)
        count -= 1
    elif take.text:
        # Its beginning letter by letter, and the rest at once: how it was cut is not known.
        heads = min(count - 1, len(take.text) - 1)
        yield from map(Text, take.text[:heads])
        yield Text(take.text[heads:])
        count -= heads + 1
    for _ in range(count):
        yield Text()


def _piece(said: Said) -> Piece:
    if said.loading:
        return Load()
    if said.tool:
        return ToolFragment(said.tool.index, said.tool.id, said.tool.name, said.tool.arguments)
    return Text(said.text, said.reasoning)
