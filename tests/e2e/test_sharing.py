"""Tenants who share an expert, in a whole installation: served in turn, told their place, and seen by the operator."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from rich.console import Console

from capibara_flow import wiring
from capibara_flow.cli import queue
from capibara_flow.engines import scripted
from capibara_flow.engines.script import load_script
from capibara_flow.errors import UnknownExpert
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.standing import Standing, standings
from capibara_flow.settings import AuthSettings, Settings, WorkerSettings
from tests.conftest import Installation, installed, settings_for
from tests.waiting import until

SCRIPT = f"""
[default]
text = "one two"
delay_ms = 60
[[answer]]
when = "^endless"
text = "one{" more" * 200}"
delay_ms = 60
[[answer]]
when = "^long"
text = "one{" more" * 50}"
delay_ms = 60
"""
KEYS = AuthSettings.model_validate(
    {"keys": [{"key": f"sk-{tenant}", "principal": tenant, "tenant": tenant} for tenant in ("heavy", "light")], "anonymous": False}
)


@dataclass
class House:
    """An installation whose expert makes one call at a time, and who was answered, in order."""

    running: Installation
    url: str
    session: ClientSession
    begun: list[str] = field(default_factory=list)
    queued: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def ask(self, who: str, name: str, path: str = "/api/chat", **more: Any) -> None:
        """Ask as *who*; *name* is remembered once the answer begins, and what was told of the place in line."""
        body = {"message": name} if path == "/api/chat" else {"messages": [{"role": "user", "content": name}], "stream": True}
        async with self.session.post(self.url + path, json=body | more, headers={"Authorization": f"Bearer sk-{who}"}) as response:
            assert response.status == 200, await response.text()
            event = ""
            async for line in response.content:
                event = line[7:].decode().strip() if line.startswith(b"event: ") else event
                if event == "queued" and line.startswith(b"data: "):
                    self.queued.setdefault(name, []).append(json.loads(line[6:]))
                elif name not in self.begun and (event == "token" or b'"content":"one' in line):
                    self.begun.append(name)

    @property
    def settings(self) -> Settings:
        return self.running.settings


@pytest.fixture
async def house(broker: EmbeddedBroker, tmp_path: Path) -> AsyncIterator[House]:
    script, fleet = tmp_path / "answers.toml", tmp_path / "fleet.toml"
    script.write_text(SCRIPT, encoding="utf-8")
    runner, engine = await scripted.serve(load_script(script))
    fleet.write_text(f'[[experts]]\nname = "slow"\nurls = ["{engine}"]\nscripted = true\nconcurrency = 1\n', encoding="utf-8")
    known = settings_for(broker, fleet, auth=KEYS, worker=WorkerSettings(tenant_weights={"nobody": 2}))
    async with installed(known, engine) as running, ClientSession() as session:
        found = House(running, await running.start_edge(), session)
        await until(lambda: reported(found))
        yield found
    await runner.cleanup()


async def reported(house: House) -> bool:
    """Whether callers have told of their hands."""
    async with wiring.connected(house.settings, "observer") as client:
        return bool(await standings(client, {}))


async def test_a_heavy_tenant_does_not_keep_a_light_one_waiting(house: House) -> None:
    heavy = [asyncio.create_task(house.ask("heavy", f"H{number}")) for number in range(8)]
    await until(lambda: len(house.begun) >= 1)
    await house.ask("light", "L")
    assert house.begun.index("L") <= 4  # it was not behind all eight
    await asyncio.gather(*heavy)
    assert len(house.begun) == 9
    told = [first for first, *_ in house.queued.values()]
    assert len(told) >= 6
    assert {each["expert"] for each in told} == {"slow"}
    assert max(each["position"] for each in told) >= 5


async def test_who_waits_for_long_hears_of_his_place_again(house: House) -> None:
    asking = [asyncio.create_task(house.ask("heavy", "long"))]
    await until(lambda: house.begun)
    asking.append(asyncio.create_task(house.ask("heavy", "endless")))
    await until(lambda: house.queued)
    asking.append(asyncio.create_task(house.ask("heavy", "H")))
    await until(lambda: [told["position"] for told in house.queued.get("H", [])] == [2, 1])
    assert "H" not in house.begun
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_what_is_urgent_to_a_tenant_goes_first_in_both_dialects(house: House) -> None:
    first = asyncio.create_task(house.ask("heavy", "first"))
    await until(lambda: house.begun)
    await first  # its lane is known now
    low = [asyncio.create_task(house.ask("heavy", f"low{number}", priority="low")) for number in range(4)]
    await until(lambda: len(house.begun) > 1)
    high = [house.ask("heavy", "high", priority="high"), house.ask("heavy", "high2", "/v1/chat/completions", priority="high")]
    await asyncio.gather(*low, *high)
    assert max(house.begun.index("high"), house.begun.index("high2")) <= 4
    async with house.session.post(house.url + "/api/chat", json={"message": "x", "priority": "first"}, headers=key("heavy")) as response:
        assert response.status == 400
        assert "priority" in await response.text()


def key(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{who}"}


async def test_an_operator_sees_who_waits(house: House) -> None:
    asking = [asyncio.create_task(house.ask("heavy", "long"))]
    await until(lambda: house.begun)  # else the light one may be the first
    asking += [asyncio.create_task(house.ask("heavy", f"H{number}")) for number in range(5)]
    asking.append(asyncio.create_task(house.ask("light", "L")))
    seen: list[queue.Standing] = []

    async def both() -> bool:
        seen[:] = await queue.queue(house.settings, "slow")
        assert seen
        return {each.tenant for each in seen if each.waiting} == {"heavy", "light"} and any(each.at_work for each in seen)

    await until(both)
    await asyncio.gather(*asking)
    heavy, light = (next(each for each in seen if each.tenant == tenant) for tenant in ("heavy", "light"))
    assert heavy.waiting >= light.waiting == 1
    assert light.oldest_s is not None
    assert sum(each.at_work for each in seen) == 1
    assert [set(row) for row in queue.rows(seen)] == [set(queue.rows(seen)[0])] * len(seen)
    assert queue.table(seen).row_count == len(seen)

    async def empty() -> bool:
        return all(each.waiting == each.at_work == 0 and each.eta_s == 0 for each in await queue.queue(house.settings, None))

    await until(empty)
    with pytest.raises(UnknownExpert, match="capibara queue"):
        await queue.queue(house.settings, "nobody")


def test_a_small_screen_still_tells_whose_queue_it_is() -> None:
    screen = Console(file=StringIO(), width=60)
    screen.print(queue.table([Standing("mistral_balanced", "acme", 12, 3, 1.5, 289.3, None)]))
    row = screen.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert [word[:4] for word in row.split()] == ["mist", "acme", "12", "3", "1.5", "289."]
