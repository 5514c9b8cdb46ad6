"""``capibara fleet``: the engines of a fleet looked at from outside, and what those tell who use them."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from typer.testing import CliRunner

from capibara_flow import wiring
from capibara_flow.cli import fleet
from capibara_flow.cli.app import app
from capibara_flow.cli.supervisor import free_port
from capibara_flow.domain.fleet import Expert
from capibara_flow.engines import scripted
from capibara_flow.engines.pinging import Ping, ping, ping_all, unreached
from capibara_flow.engines.script import Script
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.reports import Reporter
from tests.conftest import settings_for
from tests.engines.dialects import LlamaCompletion, Ollama
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests, and no `up` of theirs, may be seen."""
    for name in [each for each in os.environ if each.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CAPIBARA_STATE", str(tmp_path / "state"))


def run(*words: str):
    return CliRunner().invoke(app, ["fleet", *words])


def written(folder: Path, *experts: str) -> Path:
    file = folder / "fleet.toml"
    file.write_text("\n".join(f"[[experts]]\n{each}" for each in experts), encoding="utf-8")
    return file


DEAD = f"http://127.0.0.1:{free_port('127.0.0.1')}/v1"


# --- one address ---------------------------------------------------------------------------------------------


async def looked(dialect: str = "openai", **more: Any) -> Ping:
    runner, url = await scripted.serve(Script())
    expert = Expert.model_validate({"name": "scripted", "dialect": dialect, "urls": [f"{url}/v1"], **more})
    try:
        return await ping(expert, expert.urls[0])
    finally:
        await runner.cleanup()


async def test_an_engine_that_answers_is_live_and_knows_its_model() -> None:
    found = await looked()
    assert (found.state, found.models, found.knows, found.detail) == ("live", ("scripted",), True, "")
    assert found.milliseconds is not None
    assert found.milliseconds > 0


@pytest.mark.parametrize(("dialect", "knows"), [("openai", False), ("vllm", False), ("llama_server", None), ("llama_completion", None)])
async def test_a_model_that_the_engine_lacks_is_told_where_that_matters(dialect: str, knows: bool | None) -> None:
    found = await looked(dialect, model="other")
    assert (found.state, found.knows, found.models) == ("live", knows, ("scripted",))


async def test_an_engine_that_loads_is_busy_and_one_that_is_not_there_is_down() -> None:
    async with LlamaCompletion() as engine:
        engine.ready = 503
        busy = await ping(engine.expert(), engine.url)
    down = await ping(engine.expert(), engine.url)
    assert (busy.state, down.state) == ("busy", "down")
    assert "Loading model" in busy.detail
    assert "cannot be connected to" in down.detail


async def test_an_engine_without_a_list_of_models_is_live_all_the_same() -> None:
    async with Ollama() as engine:
        found = await ping(engine.expert(), engine.url)
    assert (found.state, found.models, found.knows) == ("live", (), None)


@pytest.mark.parametrize("body", [[], {"models": [{"name": "llama2:latest"}, {"name": "phi3:mini"}]}, {"models": 7}, {"data": ["x"]}])
async def test_lists_of_any_form_are_borne(body: Any) -> None:
    async def tags(_: web.Request) -> web.Response:
        return web.json_response(body)

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "1"})

    application = web.Application()
    application.router.add_get("/api/tags", tags)
    application.router.add_get("/api/version", version)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/api"
    found = await ping(Expert(name="llama2", dialect="ollama", urls=(url,)), url)
    assert found.state == "live"
    assert found.knows is (True if isinstance(body, dict) and isinstance(body.get("models"), list) else None)
    await runner.cleanup()


async def test_all_are_looked_at_at_the_same_time_and_told_in_order() -> None:
    waiting = 0
    together = asyncio.Event()

    async def health(_: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        if waiting == 4:
            together.set()
        await asyncio.wait_for(together.wait(), 20)
        return web.json_response({})

    application = web.Application()
    application.router.add_get("/health", health)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    experts = [Expert(name=name, dialect="vllm", urls=(url, f"{url}/v1")) for name in ("b", "a")]
    lazy = Expert.model_validate({"name": "lazy", "weights": "w", "launch": {"engine": "vllm"}})
    seen: list[Ping] = []
    found = await ping_all([experts[0], lazy, experts[1]], seen.append)
    assert [(each.expert, each.state) for each in found] == [("b", "live"), ("b", "live"), ("lazy", "lazy"), ("a", "live"), ("a", "live")]
    assert len(seen) == 4
    await runner.cleanup()


def test_one_address_that_answers_is_enough_and_idle_experts_are_not_missed() -> None:
    pings = [
        Ping("a", True, "u1", "down"),
        Ping("a", True, "u2", "live"),
        Ping("b", True, "u3", "busy"),
        Ping("c", False, "u4", "down"),
        Ping("d", True, None, "lazy"),
    ]
    assert unreached(pings) == ["b"]


# --- the command ---------------------------------------------------------------------------------------------


async def test_check_tells_all_and_ends_well(tmp_path: Path) -> None:
    runner, url = await scripted.serve(Script())
    experts = [f'name = "scripted"\nurls = ["{url}/v1", "{DEAD}"]', f'name = "off"\nurls = ["{DEAD}"]\nactive = false']
    file = written(tmp_path, *experts)
    shown, told = await asyncio.to_thread(run, "check", str(file)), await asyncio.to_thread(run, "check", str(file), "--json")
    await runner.cleanup()
    assert shown.exit_code == told.exit_code == 0
    assert {"live", "down", "known", f"{url}/v1", DEAD} <= set(shown.stdout.split())
    found = json.loads(told.stdout)
    assert [(each["expert"], each["state"], each["active"]) for each in found["engines"]] == [
        ("scripted", "live", True),
        ("scripted", "down", True),
        ("off", "down", False),
    ]
    assert found["engines"][0]["models"] == ["scripted"]
    assert found["unreached"] == []


def test_check_fails_when_an_active_expert_cannot_be_reached(tmp_path: Path) -> None:
    file = written(tmp_path, f'name = "gone"\nurls = ["{DEAD}"]')
    shown, told = run("check", str(file)), run("check", str(file), "--json")
    assert shown.exit_code == told.exit_code == 1
    assert "no engine answers for: gone" in shown.stderr
    assert json.loads(told.stdout)["unreached"] == ["gone"]


@pytest.mark.parametrize(
    ("expert", "words"),
    [
        ('name = "a"\nurls = ["http://h:1"]\nconcurrency = 0', ":4: experts.0.concurrency: "),
        ('name = "a"\nurls = ["http://h:1"]\n\ntemplate = "nonsense"', ":5: experts.0.template: no chat template is called 'nonsense'"),
        ("name = 'a", ":2: not TOML: "),
    ],
)
def test_check_names_file_line_key_and_reason(tmp_path: Path, expert: str, words: str) -> None:
    file = written(tmp_path, expert)
    result = run("check", str(file))
    assert result.exit_code == 1
    assert f"error: {file}{words}" in result.stderr


def test_check_takes_the_fleet_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CAPIBARA_FLEET__FILE" in run("check").stderr
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(written(tmp_path, f'name = "gone"\nurls = ["{DEAD}"]')))
    assert "no engine answers for: gone" in run("check").stderr


async def test_status_shows_what_processes_tell(broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(broker, written(tmp_path, f'name = "phi"\nurls = ["{DEAD}"]'))
    await wiring.apply_streams(settings)
    for name, value in broker.environment("observer").items():
        monkeypatch.setenv(name, value)
    assert "nobody reports" in (await asyncio.to_thread(run, "status")).stdout
    replica = {"replica": 0, "state": "open", "streams": 2, "last_fault": "gone [x]"}
    hosted = {"phase": "cold", "streams": 0, "blocked": "no room"}
    facts = {"experts": {"phi": {"available": False, "replicas": [replica]}}, "host": {"experts": {"aya": hosted}}}
    async with wiring.connected(settings, "caller") as client:
        reporter = Reporter(client, "caller", "host-7", lambda: facts)
        reporter.start()
        await until(lambda: fleet.reports(settings))
        shown, told = await asyncio.to_thread(run, "status"), await asyncio.to_thread(run, "status", "--json")
        await reporter.stop()
    assert {"caller", "host-7", "phi", "open", "gone", "[x]", "aya", "hosted", "cold", "room"} <= set(shown.stdout.split())
    assert json.loads(told.stdout)[0]["facts"] == facts


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"experts": 7},
        {"experts": {"phi": None}},
        {"experts": {"phi": {}}},
        {"routes": {"math": 3}},
        {"host": 3},
        {"host": {"experts": {"phi": {}}}},
    ],
)
def test_status_bears_facts_of_any_form(facts: dict[str, Any]) -> None:
    told = [{"worker": "router", "process": "p", "at": 5.0, "facts": facts}]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(fleet.status(told, now=8.0))
    assert {"router", "p", "3"} <= set(shown.get().split())
