"""Turns of every kind, asked for on a real installation: what capsules and reruns are tried on."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientResponse, ClientSession

from capibara_flow import wiring
from capibara_flow.domain.forking import Sent
from capibara_flow.domain.record import Record
from capibara_flow.engines import scripted
from capibara_flow.engines.script import Script
from capibara_flow.runtime.dead import new_turn
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.forking import publish
from capibara_flow.runtime.history import History
from capibara_flow.runtime.ingesting import File
from capibara_flow.settings import AnswersSettings, Settings, WorkerSettings
from tests.conftest import installed, settings_for
from tests.knowledge import Library, knowing
from tests.waiting import until
from topics.chat import ChatMessage, ChatRequest, RouteTurn
from topics.knowledge import Scope
from topics.message import DEADLINE, PRINCIPAL, TENANT

_SCRIPT = {
    "default": {"text": "Esto dice el guion, con eñes y 🦫."},
    "answer": [
        {"when": r"cuenta hasta (\d+)", "counts": True},
        {"when": "slow", "tokens": [f"tick{number} " for number in range(200)], "delay_ms": 20},
        {"when": "stumbles on", "text": "one two three four five six", "fail": {"broken_after": 3, "times": 1}},
        {"when": "stumbles again", "text": "one two three four five six", "fail": {"broken_after": 4, "times": 1}},
        {"when": "falls twice", "text": "one two three four five six", "fail": {"broken_after": 2}},
        {"when": "busy", "text": "now there is room", "fail": {"before": 503, "times": 2}},
        {"when": "refuse", "text": "never", "fail": {"before": 400}},
        {"when": "hang", "text": "one two three four", "fail": {"hang_after": 2}},
        {"when": "weather", "reasoning": "I need a tool.", "tool_calls": [{"name": "weather", "arguments": {"city": "Bogotá"}}]},
        {"when": "think", "reasoning": "Let me think about it.", "text": "Forty two."},
        {"when": "as JSON", "text": '{"capital": "París"}'},
    ],
}
_OTHER = {"default": {"text": "Somebody else says something else."}}
#: A picture of one pixel.
_PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}

Ask = Callable[["World"], Awaitable[str]]


def fleet_toml(engine: str, other: str) -> str:
    """A fleet for all kinds: engines that go on by prefill and by saying all again, one that sees, one that is down, a narrow one."""
    return f"""
default = "main"
[[experts]]
name = "main"
dialect = "llama_server"
urls = ["{engine}"]
tools = true
api_key = "sk-very-secret"
[[experts]]
name = "again"
aliases = ["otra"]
urls = ["{engine}"]
[[experts]]
name = "twice"
urls = ["{engine}"]
[[experts]]
name = "busy"
urls = ["{engine}"]
[[experts]]
name = "paint"
urls = ["{engine}"]
modalities = ["text", "image"]
[[experts]]
name = "gone"
urls = ["http://127.0.0.1:9"]
[[experts]]
name = "other"
urls = ["{other}"]
[[experts]]
name = "narrow"
urls = ["{engine}"]
concurrency = 1
[[rules]]
route = "painting"
expert = "paint"
patterns = ["\\\\bpinta\\\\b"]
[[rules]]
route = "down"
expert = "gone"
then = ["main"]
patterns = ["fallback"]
[[rules]]
route = "twice"
expert = "twice"
then = ["other"]
patterns = ["falls twice"]
"""


class World:
    """A door, and how to ask there."""

    def __init__(self, settings: Settings, door: str, session: ClientSession, library: Library) -> None:
        self.settings, self.door, self.session, self.library = settings, door, session, library

    async def post(self, body: dict[str, Any], **headers: str) -> ClientResponse:
        """Ask in the native dialect."""
        return await self.session.post(f"{self.door}/api/chat", json=body, headers=headers)

    async def asked(self, message: str, **more: Any) -> str:
        """The id of a turn that was asked, and read to its end."""
        async with await self.post(({"message": message} if message else {}) | more) as response:
            text = await response.text()
            assert response.status == 200, text
            return response.headers["X-Capibara-Turn"]

    async def cancel(self, turn: str) -> None:
        """Stop *turn*."""
        async with self.session.delete(f"{self.door}/api/chat/{turn}") as response:
            assert response.status == 202, await response.text()

    async def ended(self, turn: str) -> None:
        """Read *turn* to its end."""
        async with self.session.get(f"{self.door}/api/chat/{turn}/events") as response:
            await response.text()

    async def record(self, turn: str) -> Record:
        """What is kept of *turn*, once all is told."""

        async def complete() -> Record | None:
            async with wiring.connected(self.settings, "observer") as client:
                found = await History(client).of(turn)
            told = len(found.attempts) == len(found.calls) or found.outcome in {"failed", "cancelled"}
            return found if found.end and told and (found.routed or found.dead) else None

        return await until(complete)


def plain(message: str, **more: Any) -> Ask:
    """A turn that is asked and read; without a *message* there are *messages*."""

    async def ask(world: World) -> str:
        return await world.asked(message, **more)

    return ask


async def background(world: World) -> str:
    async with await world.post({"message": "en segundo plano", "background": True}) as response:
        turn = response.headers["X-Capibara-Turn"]
    await world.ended(turn)
    return turn


async def twice_with_a_key(world: World) -> str:
    turns = set()
    for _ in range(2):
        async with await world.post({"message": "una sola vez"}, **{"Idempotency-Key": "k1"}) as response:
            await response.text()
            turns.add(response.headers["X-Capibara-Turn"])
    [turn] = turns
    return turn


async def _beginning(response: ClientResponse, words: str) -> None:
    async for line in response.content:
        if words.encode() in line:
            return
    raise AssertionError(f"{words} was never said")


async def cancelled(world: World) -> str:
    async with await world.post({"message": "slow, and then stop"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await _beginning(response, "tick3 ")
        await world.cancel(turn)
        await response.text()
    return turn


async def cancelled_in_the_queue(world: World) -> str:
    """Somebody else has the only place meanwhile."""
    async with await world.post({"message": "slow, the first", "model": "narrow"}) as first:
        await _beginning(first, "tick1 ")
        async with await world.post({"message": "never begun", "model": "narrow"}) as response:
            turn = response.headers["X-Capibara-Turn"]
            await _beginning(response, "routed")
            await world.cancel(turn)
            await response.text()
        await world.cancel(first.headers["X-Capibara-Turn"])
        await first.text()
    return turn


async def cancelled_while_it_waits(world: World) -> str:
    """Its expert is down, and nobody else is to answer."""
    async with await world.post({"message": "is anybody there?", "model": "gone"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await _beginning(response, "waiting")
        await world.cancel(turn)
        await response.text()
    return turn


async def cancelled_in_the_search(world: World) -> str:
    """Its sources are found when nobody wants them any more."""
    async with await world.post({"message": "a dusty capibara", "grounded": True}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await _beginning(response, "routed")
        await world.cancel(turn)
        await response.text()
    world.library.dusted.set()
    return turn


async def given_again(world: World) -> str:
    """The same question at temperature 0: the second answer was made for the first one."""
    for _ in range(2):
        turn = await world.asked("lo mismo otra vez", sampling={"temperature": 0}, model="other")
    return turn


async def expired_in_the_queue(world: World) -> str:
    async with await world.post({"message": "slow, before the late one", "model": "narrow"}) as first:
        await _beginning(first, "tick1 ")
        turn = await world.asked("too late", model="narrow", timeout_seconds=1)
        await world.cancel(first.headers["X-Capibara-Turn"])
        await first.text()
    return turn


async def unknown_expert(world: World) -> str:
    """Somebody asks past the door, which would have refused."""
    turn = new_turn("anonymous")
    command = RouteTurn(turn=turn, request=ChatRequest(messages=(ChatMessage(role="user", content="hola"),), model="nobody"))
    sent = Sent(command.subject, command.model_dump_json(exclude_none=True).encode(), command.dedupe)
    headers = {TENANT: "anonymous", PRINCIPAL: "anonymous", DEADLINE: f"{time.time() + 30:.3f}"}
    async with wiring.connected(world.settings, "provisioner") as client:
        await publish(client, (sent,), headers)
    await world.ended(turn)
    return turn


_IMAGE = [{"role": "user", "content": [{"type": "text", "text": "¿Qué es?"}, {"type": "image_url", "image_url": {"url": _PIXEL}}]}]
_FOLLOWING = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hola"},
    {"role": "assistant", "content": "¡Hola!"},
    {"role": "user", "content": "¿y ahora?"},
]

#: What there is to rest an answer on, and whose it is.
DOCUMENT = (Scope("anonymous"), File(b"The capibara swims.", "swimming.txt"))

KINDS: dict[str, Ask] = {
    "spanish": plain("¿Qué tal, capibara?"),
    "english": plain("How are you?"),
    "grounded": plain("Who swims? The capibara?", grounded=True),
    "grounded in nothing": plain("Nobody knows", grounded=True),
    "named": plain("hola", model="otra"),
    "by rule": plain("pinta un gato"),
    "image": plain("", messages=_IMAGE),
    "tools": plain("the weather?", tools=[_TOOL]),
    "json": plain("answer as JSON", response_format=_SCHEMA),
    "reasoning": plain("think hard"),
    "not streamed": plain("de una vez", stream=False),
    "background": background,
    "idempotent": twice_with_a_key,
    "cancelled": cancelled,
    "cancelled in the queue": cancelled_in_the_queue,
    "cancelled while it waits": cancelled_while_it_waits,
    "cancelled in the search": cancelled_in_the_search,
    "cached": given_again,
    "down to the end": plain("is somebody there?", model="gone", timeout_seconds=1.5),
    "bad request": plain("refuse this"),
    "unknown expert": unknown_expert,
    "passed on": plain("use the fallback"),
    "prefill": plain("it stumbles on main", model="main"),
    "skip": plain("it stumbles again", model="again"),
    "reset": plain("it falls twice"),
    "waiting": plain("busy for a while", model="busy"),
    "expired": plain("hang", timeout_seconds=1.5),
    "expired in the queue": expired_in_the_queue,
    "follow-up": plain("", messages=_FOLLOWING),
    "long": plain("cuenta hasta 9000"),
    "limited": plain("hola", sampling={"max_tokens": 2, "temperature": 0.1}),
}


@asynccontextmanager
async def world(broker: EmbeddedBroker, folder: Path, head: str = "", tail: str = "", **groups: Any) -> AsyncIterator[World]:
    """A whole installation on *broker* with a fleet for all kinds, and whatever else the fleet's *head* and *tail* say."""
    script = json.loads(json.dumps(_SCRIPT))
    runners = [await scripted.serve(Script.model_validate_json(json.dumps(each))) for each in (script, _OTHER)]
    fleet = folder / "fleet.toml"
    fleet.write_text(head + fleet_toml(*(url for _, url in runners)) + tail, encoding="utf-8")
    groups = {"worker": WorkerSettings(retry_seconds=0.3, ack_wait_seconds=3), "answers": AnswersSettings(age_seconds=600)} | groups
    settings = settings_for(broker, fleet, **groups)
    try:
        async with installed(settings, runners[0][1]) as running, knowing(settings) as library, ClientSession() as session:
            await library.ingest(*DOCUMENT)
            yield World(settings, await running.start_edge(), session, library)
    finally:
        for runner, _ in runners:
            await runner.cleanup()


async def records(made: World) -> dict[str, Record]:
    """One turn of every kind; those that need the same narrow place, or fail for a while, come one after the other."""

    async def one(kind: str) -> tuple[str, Record]:
        return kind, await made.record(await KINDS[kind](made))

    alone = ("cancelled in the queue", "expired in the queue")
    found = dict(await asyncio.gather(*(one(kind) for kind in KINDS if kind not in alone)))
    for kind in alone:
        found |= dict([await one(kind)])
    return {kind: found[kind] for kind in KINDS}
