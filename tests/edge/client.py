"""A small client of the native dialect, written from its description and not from the door's code."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse, ClientSession


@dataclass(frozen=True)
class Event:
    """One server-sent event; *id* is empty where the stream gave none."""

    name: str
    data: dict[str, Any]
    id: str = ""


def event(block: str) -> Event | None:
    """The event of one block of lines, or none for a mere comment."""
    fields: dict[str, str] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(": ")
        assert name in {"", "event", "data", "id"}, line
        assert name == "" or name not in fields, f"{name} twice in {block!r}"
        fields[name] = value
    return Event(fields["event"], json.loads(fields["data"]), fields.get("id", "")) if "data" in fields else None


def events(text: str) -> list[Event]:
    """All events of a complete stream, which must end with a blank line."""
    assert text == "" or text.endswith("\n\n"), text[-200:]
    return [found for block in text.split("\n\n") if block and (found := event(block))]


async def arriving(response: ClientResponse) -> AsyncIterator[Event]:
    """The events of an open stream, as they come."""
    rest = ""
    async for chunk in response.content.iter_any():
        *blocks, rest = (rest + chunk.decode()).split("\n\n")
        for block in blocks:
            if found := event(block):
                yield found


async def ask(url: str, **body: Any) -> list[Event]:
    """Ask, and read the stream to its end."""
    async with ClientSession() as session, session.post(f"{url}/api/chat", json=body) as response:
        assert response.status == 200, await response.text()
        return events(await response.text())


def place(event_id: str) -> tuple[int, float]:
    """Where an id stands among those of its turn: that of a message, or of a line in it that is not the last."""
    message, _, line = event_id.partition("-")
    return int(message), int(line) if line else float("inf")


def text_of(stream: list[Event]) -> str:
    """The words that a client holds at the end of *stream*."""
    words = ""
    for each in stream:
        words = "" if each.name == "reset" else words + each.data.get("text", "")
    return words


def names(stream: list[Event]) -> list[str]:
    """The names of the events, runs of tokens as one."""
    found: list[str] = []
    for each in stream:
        if each.name != "token" or found[-1:] != ["token"]:
            found.append(each.name)
    return found


async def counts(engine: str) -> dict[str, int]:
    """What the scripted engine has done."""
    async with ClientSession() as session, session.get(engine.removesuffix("/v1") + "/counts") as response:
        return dict(await response.json())
