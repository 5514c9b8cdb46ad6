"""A turn that a tenant's key asked for is found in its usage: by the door and on the command line, in real PostgreSQLs."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession
from typer.testing import CliRunner, Result

from capibara_flow import wiring
from capibara_flow.cli.app import app
from capibara_flow.engines.postgres.embedded import EmbeddedPostgres
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import AuthSettings, Key, KnowledgeSettings, LogSettings, Settings
from capibara_flow.wiring.postgres import embedded
from tests.conftest import Installation, installed, settings_for
from tests.edge.client import events
from tests.waiting import until
from topics.streams import LOG

KEYS = AuthSettings(keys=tuple(Key(key=f"sk-{name}-0001", principal=name, tenant=name) for name in ("acme", "umbrella")))
ALL = ("router", "caller", "undertaker", "accountant")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path / "server", durable=False) as running:
        yield running


@pytest.fixture
def knowledge(request: pytest.FixtureRequest, tmp_path: Path) -> KnowledgeSettings:
    """A folder for an embedded PostgreSQL, or one that is named."""
    if getattr(request, "param", "") == "named":
        return KnowledgeSettings(postgres=request.getfixturevalue("server").url)
    return KnowledgeSettings(folder=tmp_path / "knowledge")


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path, knowledge: KnowledgeSettings) -> Settings:
    return settings_for(broker, fleet_file, auth=KEYS, knowledge=knowledge)


@pytest.fixture
async def installation(settings: Settings, engine: str) -> AsyncIterator[Installation]:
    async with installed(settings, engine, *ALL) as running:
        yield running


async def asked(door: str, tenant: str) -> dict[str, int]:
    """Ask something, and return what the client is told of its tokens."""
    body, headers = {"message": "hola"}, {"Authorization": f"Bearer sk-{tenant}-0001"}
    async with ClientSession() as session, session.post(f"{door}/api/chat", json=body, headers=headers) as response:
        said = events(await response.text())
    return next(event.data for event in said if event.name == "usage")


async def used(door: str, tenant: str, query: str = "") -> dict[str, object]:
    headers = {"Authorization": f"Bearer sk-{tenant}-0001"}
    async with ClientSession() as session, session.get(f"{door}/api/usage{query}", headers=headers) as response:
        assert response.status == 200, await response.text()
        return dict(await response.json())


async def counted(door: str, tenant: str, answers: int) -> dict[str, object]:
    """The usage of *tenant* once it has so many *answers*: a caller tells the log behind the answer's end."""

    async def look() -> dict[str, object]:
        told = await used(door, tenant)
        return told if told["total"]["answers"] == answers else {}

    return await until(look)


@pytest.fixture
def here(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reaches this installation, and knows nothing else of it."""
    for name in [each for each in os.environ if each.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)
    environment = {"CAPIBARA_NATS__URL": settings.nats.url, "CAPIBARA_FLEET__FILE": str(settings.fleet.file)}
    environment |= {f"CAPIBARA_NATS__PASSWORDS__{role.upper()}": each.get_secret_value() for role, each in settings.nats.passwords.items()}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(words))


async def test_a_tenant_s_turns_are_in_its_usage_once_somebody_asks(
    door: str, installation: Installation, knowledge: KnowledgeSettings, here: None
):
    told = [await asked(door, "acme") for _ in range(2)]
    assert not (knowledge.folder / "postgres").exists(), "no chat starts a PostgreSQL"
    usage = await counted(door, "acme", 2)
    [day] = usage["days"]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert (day["day"], day["tenant"], day["expert"]) == (today, "acme", "scripted")
    assert usage["total"] == {
        "answers": 2,
        "prompt_tokens": sum(each["prompt_tokens"] for each in told),
        "completion_tokens": sum(each["completion_tokens"] for each in told),
    }
    assert usage["total"]["completion_tokens"] > 0
    assert (await used(door, "umbrella"))["days"] == []
    assert (await used(door, "acme", "?since=2020-01-01&until=2020-02-01"))["days"] == []
    assert not embedded(knowledge).wanted

    await asked(door, "umbrella")
    await counted(door, "umbrella", 1)
    result = await run("usage", "--json")
    assert result.exit_code == 0, result.output
    assert [(each["tenant"], each["answers"]) for each in json.loads(result.stdout)["days"]] == [("acme", 2), ("umbrella", 1)]
    result = await run("usage", "--tenant", "acme", "--since", "1d")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == "day tenant expert answers prompt tokens completion tokens".split()
    assert rows[1][:4] == [today, "acme", "scripted", "2"]
    assert rows[-1][:2] == ["all", "2"]
    assert "umbrella" not in result.stdout
    assert (await run("usage", "--since", "tomorrow")).exit_code == 1
    assert "no answer came to its end" in (await run("usage", "--until", "2020-01-01", "--since", "2019-01-01")).stdout


async def test_who_asks_where_nobody_counts_is_told_what_is_missing(settings: Settings, engine: str, here: None):
    async with installed(settings, engine, "router", "caller", "undertaker") as running:
        result = await run("usage")
        assert result.exit_code == 1
        said = " ".join(result.stderr.split())
        assert "start an accountant (`capibara worker accountant`); as it is set here, usage has no place" in said
        door = await running.start_edge()
        headers = {"Authorization": "Bearer sk-acme-0001"}
        async with ClientSession() as session, session.get(f"{door}/api/usage", headers=headers) as response:
            assert response.status == 503


@pytest.mark.slow
async def test_what_nobody_asks_for_is_written_down_before_the_log_forgets_it(
    settings: Settings, engine: str, knowledge: KnowledgeSettings
):
    brief = settings.model_copy(update={"log": LogSettings(turn_age_seconds=20)})
    async with installed(brief, engine, *ALL) as running, wiring.connected(brief, "observer") as observer:
        door = await running.start_edge()
        await asked(door, "acme")

        async def forgotten() -> bool:
            return not (await observer.jetstream().stream_info(LOG)).state.messages

        assert not await forgotten()
        await until(forgotten)
        assert (await used(door, "acme"))["total"]["answers"] == 1


@pytest.mark.parametrize("knowledge", ["named"], indirect=True)
async def test_a_named_server_gets_facts_at_once_and_one_that_falls_over_gets_them_when_it_is_back(
    door: str, installation: Installation, server: EmbeddedPostgres
):
    await asked(door, "acme")
    await counted(door, "acme", 1)
    await asyncio.to_thread(server.kill)
    for _ in range(3):
        await asked(door, "acme")
    headers = {"Authorization": "Bearer sk-acme-0001"}
    async with ClientSession() as session, session.get(f"{door}/api/usage", headers=headers) as response:
        assert response.status == 503
        assert "PostgreSQL at 127.0.0.1" in (await response.json(content_type=None))["detail"]
    server.restart()
    assert (await counted(door, "acme", 4))["waiting"] == 0
