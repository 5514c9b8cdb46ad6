"""Images and tools for an expert that cannot take them, in a whole installation: refused in words, before any engine hears of it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from capibara_flow.runtime.embedded import EmbeddedBroker
from tests.conftest import Installation, settings_for
from tests.edge.client import counts, events, names

IMAGE = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
Case = tuple[dict[str, Any], str]
SEE: Case = ({"messages": [{"role": "user", "content": IMAGE}], "model": "scripted"}, "scripted does not take images")
CALL: Case = ({"messages": [{"role": "user", "content": "weather?"}], "model": "paint", "tools": TOOLS}, "paint does not take tools")
DIALECTS = ["/api/chat", "/v1/chat/completions"]


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


@pytest.fixture
async def lax_door(installation: Installation, broker: EmbeddedBroker, tmp_path: Path) -> str:
    """A door whose fleet file says that everybody takes everything; the workers' own says better."""
    everything = f'urls = ["{installation.engine}"]\nscripted = true\ntools = true\nmodalities = ["text", "image"]\n'
    generous = tmp_path / "generous.toml"
    generous.write_text("".join(f'[[experts]]\nname = "{name}"\n{everything}' for name in ("scripted", "paint")), encoding="utf-8")
    installation.settings = settings_for(broker, generous)
    return await installation.start_edge()


def words(path: str, body: dict[str, Any]) -> str:
    """What an error in the dialect of *path* says."""
    return str(body["error"]["message"] if path.startswith("/v1/") else body["detail"])


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("case", [SEE, CALL], ids=["image", "tools"])
async def test_the_door_refuses_at_once(door: str, engine: str, session: ClientSession, path: str, case: Case) -> None:
    body, reason = case
    for stream in (True, False):
        async with session.post(door + path, json={**body, "stream": stream}) as response:
            assert response.status == 400
            assert words(path, await response.json(content_type=None)) == reason
            assert "X-Capibara-Turn" not in response.headers
    assert (await counts(engine))["requests"] == 0


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("case", [SEE, CALL], ids=["image", "tools"])
async def test_the_router_refuses_what_a_door_let_pass(lax_door: str, engine: str, session: ClientSession, path: str, case: Case) -> None:
    body, reason = case
    async with session.post(lax_door + path, json={**body, "stream": False}) as response:
        assert (response.status, "X-Capibara-Turn" in response.headers) == (400, True)
        assert words(path, await response.json(content_type=None)) == reason
    async with session.post(lax_door + path, json={**body, "stream": True}) as response:
        assert response.status == 200
        text = await response.text()
    if path == "/api/chat":
        stream = events(text)
        assert names(stream) == ["turn", "error"]
        assert (stream[-1].data["status"], stream[-1].data["detail"]) == (400, reason)
    else:
        [line] = [each for each in text.splitlines() if each.startswith("data: ")]
        assert json.loads(line.removeprefix("data: "))["error"]["message"] == reason
        assert "[DONE]" not in text
    assert (await counts(engine))["requests"] == 0
