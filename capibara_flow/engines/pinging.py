"""Looking at an engine from outside: is it there, how fast does it say so, and does it have the model that will be asked for?"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.build import build_engine
from capibara_flow.errors import EngineBusy, EngineUnreachable

#: Engines that have one model and call it what they like, whatever they are asked for.
_ONE_MODEL = ("llama_server", "llama_completion")


@dataclass(frozen=True)
class Ping:
    """What was found at one address of an expert.

    *state*: ``live`` (it can answer), ``busy`` (it is there, but loads or has too much to do), ``down``, or ``lazy``: an expert host
    starts it when it is needed. *knows* tells whether it has the expert's model, none where that cannot be told; *models* are its own.
    """

    expert: str
    active: bool
    url: str | None
    state: Literal["live", "busy", "down", "lazy"]
    milliseconds: float | None = None
    detail: str = ""
    models: tuple[str, ...] = ()
    knows: bool | None = None


async def ping_all(experts: Sequence[Expert], on_found: Callable[[Ping], None] = lambda _: None) -> list[Ping]:
    """Look at all addresses of *experts* at the same time: what is found, in the fleet's order. *on_found* gets it as it comes."""

    async def look(expert: Expert, url: str) -> Ping:
        found = await ping(expert, url)
        on_found(found)
        return found

    lazy = [Ping(each.name, each.active, None, "lazy", detail="an expert host starts it") for each in experts if not each.urls]
    found = [*lazy, *await asyncio.gather(*(look(expert, url) for expert in experts for url in expert.urls))]
    order = [expert.name for expert in experts]
    return sorted(found, key=lambda each: order.index(each.expert))


async def ping(expert: Expert, url: str) -> Ping:
    """Look at one address; raises ``SettingsError`` for an unknown template."""
    engine = build_engine(expert, url)
    began = time.perf_counter()
    try:
        await engine.health()
    except (EngineBusy, EngineUnreachable) as error:
        state: Literal["busy", "down"] = "busy" if isinstance(error, EngineBusy) else "down"
        return Ping(expert.name, expert.active, url, state, detail=str(error))
    finally:
        await engine.aclose()
    milliseconds = round(1000 * (time.perf_counter() - began), 1)
    models = await _models(expert, url)
    return Ping(expert.name, expert.active, url, "live", milliseconds, models=models, knows=_knows(expert, models))


def unreached(pings: Sequence[Ping]) -> list[str]:
    """The active experts that nobody can answer for now."""
    names = dict.fromkeys(each.expert for each in pings if each.active)
    able = {each.expert for each in pings if each.state in ("live", "lazy")}
    return [name for name in names if name not in able]


async def _models(expert: Expert, url: str) -> tuple[str, ...]:
    """What the engine says it has; nothing when it does not tell."""
    root = url.removesuffix("/v1")
    address = f"{root.removesuffix('/api')}/api/tags" if expert.dialect == "ollama" else f"{root}/v1/models"
    headers = {"Authorization": f"Bearer {expert.api_key}"} if expert.api_key else {}
    timeout = aiohttp.ClientTimeout(total=2 * expert.timeouts.connect_seconds)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session, session.get(address) as response:
            told: Any = await response.json(content_type=None) if response.status == 200 else {}
            listed = told.get("data") or told.get("models") or []
            return tuple(str(each.get("id") or each.get("name")) for each in listed)
    except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError, TypeError):
        return ()  # no list, or one of another form


def _knows(expert: Expert, models: Sequence[str]) -> bool | None:
    asked = expert.model or expert.name
    known = asked in models or f"{asked}:latest" in models
    return None if not models or (not known and expert.dialect in _ONE_MODEL) else known
