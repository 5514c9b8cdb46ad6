"""Several addresses of one expert."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from capibara_flow.engines.replicas import REST_SECONDS, Replicas
from capibara_flow.errors import BadRequest, CapibaraError, EngineBroke, EngineBusy, EngineUnreachable
from capibara_flow.ports import Abilities, Finish, Piece, Text
from topics.chat import ChatMessage, ChatRequest

ASK = ChatRequest(messages=(ChatMessage(role="user", content="hi"),))


class Fake:
    """An engine in memory: it says its name, perhaps after an error of ours, and remembers."""

    def __init__(self, name: str, before: CapibaraError | None = None, after: CapibaraError | None = None) -> None:
        self.name, self.before, self.after = name, before, after
        self.calls = self.closed = 0
        self.abilities = Abilities(tools=True)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        del request
        self.calls += 1
        if self.before:
            raise self.before
        try:
            yield Text(self.name)
            if self.after:
                raise self.after
            yield Finish("stop")
        finally:
            self.closed += 1

    async def health(self) -> None:
        if self.before:
            raise self.before

    async def aclose(self) -> None:
        self.closed += 1


async def said(engine: Replicas) -> str:
    async with aclosing(engine.stream(ASK)) as pieces:
        return "".join([piece.text async for piece in pieces if isinstance(piece, Text)])


async def test_the_work_is_shared() -> None:
    replicas = Replicas([Fake("a"), Fake("b")])
    assert [await said(replicas) for _ in range(4)] == ["a", "b", "a", "b"]


async def test_the_least_busy_one_answers() -> None:
    replicas = Replicas([Fake("a"), Fake("b")])
    streams = [replicas.stream(ASK) for _ in range(3)]
    assert [await anext(stream) for stream in streams] == [Text("a"), Text("b"), Text("a")]
    await asyncio.gather(streams[0].aclose(), streams[2].aclose())
    assert await said(replicas) == "a"
    await streams[1].aclose()


@pytest.mark.parametrize("error", [EngineUnreachable("gone"), EngineBusy("full")])
async def test_the_next_one_answers_when_the_first_cannot_begin(error: CapibaraError) -> None:
    replicas = Replicas([Fake("a", before=error), Fake("b")])
    assert await said(replicas) == "b"


async def test_who_could_not_begin_rests_for_a_while() -> None:
    now = [0.0]
    weak = Fake("a", before=EngineUnreachable("gone"))
    replicas = Replicas([weak, Fake("b")], clock=lambda: now[0])
    for _ in range(4):
        await said(replicas)
    assert weak.calls == 1
    now[0] = REST_SECONDS
    await said(replicas)
    assert weak.calls == 2


async def test_when_nobody_can_the_last_error_is_told() -> None:
    replicas = Replicas([Fake("a", before=EngineUnreachable("gone")), Fake("b", before=EngineBusy("full"))])
    with pytest.raises(EngineBusy, match="full"):
        await said(replicas)
    with pytest.raises(EngineBusy):
        await replicas.health()


@pytest.mark.parametrize("error", [EngineUnreachable("gone"), EngineBroke("broke")])
async def test_nobody_else_goes_on_in_mid_answer(error: CapibaraError) -> None:
    other = Fake("b")
    with pytest.raises(type(error)):
        await said(Replicas([Fake("a", after=error), other]))
    assert other.calls == 0


async def test_a_bad_request_is_bad_everywhere() -> None:
    other = Fake("b")
    with pytest.raises(BadRequest):
        await said(Replicas([Fake("a", before=BadRequest("no")), other]))
    assert other.calls == 0


async def test_closing_reaches_the_engine_at_once() -> None:
    engine = Fake("a")
    stream = Replicas([engine]).stream(ASK)
    await anext(stream)
    await stream.aclose()
    assert engine.closed == 1


async def test_one_healthy_replica_is_health_and_all_are_closed() -> None:
    engines = [Fake("a", before=EngineUnreachable("gone")), Fake("b")]
    replicas = Replicas(engines)
    await replicas.health()
    await replicas.aclose()
    assert [each.closed for each in engines] == [1, 1]
    assert replicas.abilities.tools
