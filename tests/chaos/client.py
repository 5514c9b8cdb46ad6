"""A client as a browser is one: when its connection breaks it goes on at the next door, from the last event whose id it has."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.chaos.plan import Ask
from tests.edge.client import Event, arriving

#: Seconds between tries: the first comes at once, then later and later.
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
_SILENCE = 30.0
_ENDS = ("done", "error")


def connections() -> aiohttp.ClientSession:
    """For any number of clients, each asking anew for each connection, as after a break."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=10))


@dataclass
class Story:
    """What one client lived through; *arrivals* are the moments (seconds since the epoch) at which text came while it was read."""

    ask: Ask
    turn: str = ""
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    resets: int = 0
    continued: list[str] = field(default_factory=list)
    connections: int = 0
    #: How often it was asked because nobody had told the turn's id.
    asked: int = 0
    #: How it ended: a finish reason, or what went wrong; empty while it did not.
    end: str = ""
    failed: bool = False
    #: When the client asked to stop (or left), in seconds since the epoch; *stopping* once it has asked, whether it was heard or not.
    stopped: float | None = None
    stopping: bool = False
    #: When it had its end, in seconds since the epoch.
    ended: float | None = None
    last_id: str = ""
    reading: bool = True

    def take(self, event: Event) -> None:
        """Live through one event."""
        match event.name:
            case "token":
                self.text += event.data.get("text", "")
                if self.reading:
                    self.arrivals.append(time.time())
            case "reset":
                self.text = ""
                self.resets += 1
            case "continued":
                self.continued.append(event.data["how"])
            case "done":
                self.end, self.ended = event.data["finish_reason"], time.time()
            case "error":
                self.fail(f"{event.data['title']}: {event.data['detail']}")

    def fail(self, why: str) -> None:
        """It ended otherwise than with an answer."""
        self.end, self.failed = why, True


class _Refused(Exception):
    """The door says that asking again is of no use."""


class Client:
    """Asks through any of the *doors*, which may change; gives up *patience* seconds after the question."""

    def __init__(self, session: aiohttp.ClientSession, doors: Callable[[], Sequence[str]], patience: float) -> None:
        self._session, self._doors, self._patience = session, doors, patience

    async def live(self, ask: Ask) -> Story:
        """One question from its beginning to whatever end."""
        story = Story(ask)
        await asyncio.sleep(ask.starts)
        deed = asyncio.create_task(self._cancel(story)) if ask.deed == "cancel" else None
        try:
            async with asyncio.timeout(ask.after if ask.deed == "leave" else self._patience):
                await self._follow(story)
        except TimeoutError:
            if ask.deed == "leave":
                story.stopped = time.time()
            else:
                story.fail(f"no end within {self._patience:g} s")
        finally:
            if deed:
                # The stream may tell the end before the door has answered him who asked for it: but he must have asked by then.
                await asyncio.wait([deed], timeout=_SILENCE if story.stopping and story.end == "cancelled" else 0)
                deed.cancel()
        return story

    async def come_back(self, story: Story) -> None:
        """Look what became of an answer that was left alone."""
        story.reading = False
        try:
            async with asyncio.timeout(self._patience):
                await self._follow(story)
        except TimeoutError:
            story.fail("was left alone and never ended")

    async def _follow(self, story: Story) -> None:
        """Read to the end, over as many connections as it takes."""
        failures = 0
        while not story.end:
            seen = story.last_id
            try:
                await self._read(story)
            except _Refused as error:
                story.fail(str(error))
            except (aiohttp.ClientError, OSError):
                pass
            failures = 1 if story.last_id != seen else failures + 1
            if not story.end:
                await asyncio.sleep(_PAUSES[min(failures, len(_PAUSES)) - 1])

    async def _read(self, story: Story) -> None:
        """One connection. What came behind the last id is dropped with it: it will come again."""
        held: list[Event] = []
        async with self._open(story) as response:
            if response.status != 200:
                await _judge(response)
                return
            story.turn = response.headers["X-Capibara-Turn"]
            async for event in arriving(response):
                held.append(event)
                if event.id or event.name in _ENDS:
                    story.last_id = event.id or story.last_id
                    for each in held:
                        story.take(each)
                    held.clear()

    def _open(self, story: Story) -> "aiohttp.client._RequestContextManager":
        door = self._door(story)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=_SILENCE)
        if story.turn:
            headers = {"Last-Event-ID": story.last_id} if story.last_id else {}
            return self._session.get(f"{door}/api/chat/{story.turn}/events", headers=headers, timeout=timeout)
        story.asked += 1
        body = {"message": story.ask.question, "model": story.ask.expert}
        # Whoever does not know whether his question arrived asks again under the same key.
        headers = {"Idempotency-Key": f"chaos-{story.ask.number}"}
        return self._session.post(f"{door}/api/chat", json=body, headers=headers, timeout=timeout)

    def _door(self, story: Story) -> str:
        story.connections += 1
        doors = self._doors()
        return doors[(story.ask.number + story.connections) % len(doors)]

    async def _cancel(self, story: Story) -> None:
        """Ask until it is taken; the moment that counts is when it was taken."""
        await asyncio.sleep(story.ask.after)
        number = 0
        while True:
            number += 1
            if story.turn:
                doors, sent, story.stopping = self._doors(), time.time(), True
                try:
                    async with self._session.delete(f"{doors[number % len(doors)]}/api/chat/{story.turn}") as response:
                        if response.status == 202:
                            story.stopped = min(sent, story.ended or sent)
                            return
                except (aiohttp.ClientError, OSError):
                    pass
            await asyncio.sleep(0.02)


async def _judge(response: aiohttp.ClientResponse) -> None:
    """Return if asking again may help; raises ``_Refused``."""
    if response.status < 500 and response.status != 429:
        raise _Refused(f"HTTP {response.status}: {(await response.text())[:200]}")
