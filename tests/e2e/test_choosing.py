"""Choosing, on the whole installation: routes are read, a fleet changes while turns come, engines die, experts are launched."""

import importlib.util
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import ClientSession

from capibara_flow import wiring
from capibara_flow.engines import scripted
from capibara_flow.engines.script import load_script
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.output import stored
from tests.conftest import SCRIPT, Installation, installed, settings_for
from tests.edge.client import Event, ask, text_of
from tests.waiting import until
from topics.chat import ExpertCalled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


#: Few examples are learned at once; those that come along are asked for in other tests.
ROUTES = {
    "programming": ["reverse a string in Rust", "ordena una lista en Python", "fix this loop in Java", "escribe una función en C"],
    "creative_writing": ["escribe un poema sobre la luna", "write a story about a cat", "un cuento de dragones", "a song about the sea"],
    "quick_facts": ["what is the capital of Spain?", "¿quién inventó la radio?", "when did the war end?", "¿dónde nace el Ebro?"],
}


def route_text(name: str) -> str:
    """A route as its file tells it, with as many examples of each level as it takes to learn complexity from them."""
    levels = zip(("simple", "moderate", "complex", "very_complex"), ROUTES[name], strict=True)
    told = [f"{level} = {json.dumps([text, f'{text} please', f'por favor, {text}'])}\n" for level, text in levels]
    return f"[[routes]]\nname = '{name}'\n[routes.levels]\n{''.join(told)}"


class Engine:
    """A scripted engine that can be killed."""

    async def start(self, port: int = 0) -> str:
        self.runner, url = await scripted.serve(load_script(SCRIPT), port=port)
        self.port = int(url.rsplit(":", 1)[1].split("/")[0])
        return url

    async def kill(self) -> None:
        await self.runner.cleanup()


def fleet(*experts: tuple[str, str], policy: str = "", more: str = "") -> str:
    text = "".join(f'[[experts]]\nname = "{name}"\nurls = ["{url}"]\nscripted = true\n{more}' for name, url in experts)
    return text + policy


@pytest.fixture
async def engines() -> AsyncIterator[list[tuple[Engine, str]]]:
    both = [Engine(), Engine()]
    yield [(each, await each.start()) for each in both]
    for each in both:
        await each.kill()


@pytest.fixture
def fleet_file(tmp_path: Path, engines: list[tuple[Engine, str]]) -> Path:
    (_, first), (_, second) = engines
    policy = '[policy]\ndefault = "plain"\nprogramming = ["coder", "plain"]\ncreative_writing = ["poet", "plain"]\n'
    (tmp_path / "routes.toml").write_text("".join(map(route_text, ROUTES)), encoding="utf-8")
    file = tmp_path / "fleet.toml"
    experts = fleet(("plain", first), ("coder", second), ("poet", first), policy=policy)
    file.write_text(f'routes = "routes.toml"\n{experts}', encoding="utf-8")
    return file


@pytest.fixture
async def installation(broker: EmbeddedBroker, fleet_file: Path) -> AsyncIterator[Installation]:
    async with installed(settings_for(broker, fleet_file), "") as running:
        yield running


def routed(stream: list[Event]) -> dict[str, Any]:
    return next(event.data for event in stream if event.name == "routed")


async def preview(url: str, query: str) -> dict[str, Any]:
    async with ClientSession() as session, session.post(f"{url}/api/router/test", json={"query": query}) as response:
        assert response.status == 200, await response.text()
        return await response.json()  # type: ignore[no-any-return]


async def stats(url: str, worker: str) -> dict[str, Any]:
    async with ClientSession() as session, session.get(f"{url}/stats") as response:
        found = [each["facts"] for each in (await response.json())["workers"] if each["worker"] == worker]
    return found[0] if found else {}


async def launched(url: str) -> int:
    """The process of the expert that was launched; 0 as long as nobody told of it."""
    return (await stats(url, "caller")).get("host", {}).get("experts", {}).get("lazy", {}).get("pid") or 0


async def calls(installation: Installation, turn: str) -> list[ExpertCalled]:
    async with wiring.connected(installation.settings, "observer") as observer:
        return [ExpertCalled.read(each.data) for each in await stored(observer, f"cf.log.{turn}.caller", 0, "CF_LOG")]


@pytest.mark.parametrize(
    ("question", "route", "expert"),
    [
        ("¿cómo ordeno una lista en Python?", "programming", "coder"),
        ("how do I reverse a string in Rust?", "programming", "coder"),
        ("escribe un poema sobre el mar", "creative_writing", "poet"),
        ("write me a short story about a dragon", "creative_writing", "poet"),
        ("what is the capital of France?", "quick_facts", "plain"),
    ],
)
async def test_a_question_goes_to_the_expert_of_its_route(door: str, question: str, route: str, expert: str) -> None:
    stream = await ask(door, message=question)
    found = routed(stream)
    assert (found["route_name"], found["model_id"]) == (route, expert)
    assert stream[-1].data["model_id"] == expert
    told = await preview(door, question)
    assert told == {name: found[name] for name in told}


async def test_what_was_decided_is_told_in_stats(door: str) -> None:
    await ask(door, message="escribe un poema sobre el mar")

    async def told() -> bool:
        return (await stats(door, "router")).get("routes") == {"creative_writing": 1}

    await until(told)


async def test_an_engine_that_is_killed_is_told_and_the_next_expert_of_the_route_answers(
    door: str, installation: Installation, engines: list[tuple[Engine, str]]
) -> None:
    await engines[1][0].kill()
    stream = await ask(door, message="how do I reverse a string in Rust?")
    turn = stream[0].data["turn"]
    assert (routed(stream)["model_id"], stream[-1].data["model_id"]) == ("coder", "plain")
    assert text_of(stream)
    assert [(each.expert, each.outcome) for each in await calls(installation, turn)] == [
        ("coder", "passed on: engine unreachable"),
        ("plain", "stop"),
    ]

    async def down() -> bool:
        return (await stats(door, "caller"))["experts"]["coder"]["available"] is False

    await until(down)
    await engines[1][0].start(engines[1][0].port)

    async def back() -> bool:
        return (await stats(door, "caller"))["experts"]["coder"]["available"] is True

    await until(back)
    assert (await ask(door, message="how do I reverse a string in Rust?"))[-1].data["model_id"] == "coder"


async def models(url: str) -> list[str]:
    async with ClientSession() as session, session.get(f"{url}/v1/models") as response:
        return [each["id"] for each in (await response.json())["data"]]


@pytest.fixture
def edit(fleet_file: Path) -> Callable[[str], int]:
    """Writes the fleet file anew."""
    return lambda text: fleet_file.write_text(text, encoding="utf-8")


async def test_a_fleet_is_edited_while_it_runs_and_a_bad_one_is_refused(
    door: str, edit: Callable[[str], int], engines: list[tuple[Engine, str]]
) -> None:
    (_, first), _ = engines
    edit(fleet(("plain", first), ("newcomer", first), policy='[policy]\ndefault = "plain"\nprogramming = "newcomer"\n'))

    async def taken() -> bool:
        return "newcomer" in await models(door) and "coder" not in await models(door)

    await until(taken)

    async def goes_there() -> bool:
        return (await preview(door, "how do I reverse a string in Rust?"))["model_id"] == "newcomer"

    await until(goes_there)
    assert (await ask(door, message="how do I reverse a string in Rust?"))[-1].data["model_id"] == "newcomer"
    async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": "a", "model": "coder"}) as response:
        assert response.status == 404
    edit(fleet(("plain", first), more="concurrency = 0\n"))

    async def refused() -> bool:
        return ":5: experts.0.concurrency" in ((await stats(door, "router"))["fleet_file"]["refused"] or "")

    await until(refused)
    assert (await ask(door, message="hola", model="newcomer"))[-1].name == "done"


# --- experts that are launched ------------------------------------------------------------------------------------------


@pytest.mark.model
async def test_an_expert_that_is_launched_is_loaded_when_it_is_asked_for(broker: EmbeddedBroker, tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:  # imported beside all that is loaded here it might end the process
        pytest.skip("xllamacpp is not installed")
    file = tmp_path / "fleet.toml"
    file.write_text(
        '[[experts]]\nname = "lazy"\nweights = "packaged"\ncontext_length = 2048\nsampling = { max_tokens = 12, temperature = 0 }\n'
        'launch = { engine = "xllamacpp", memory_mib = 400, load_seconds = 3 }\n',
        encoding="utf-8",
    )
    async with installed(settings_for(broker, file), "", "router", "host", "undertaker") as running:
        url = await running.start_edge()
        stream = await ask(url, message="Say hello.")
        names = [event.name for event in stream]
        assert names.index("routed") < names.index("loading") < names.index("token")
        assert next(event.data for event in stream if event.name == "loading")["expert"] == "lazy"
        assert stream[-1].name == "done"
        assert "loading" not in [event.name for event in await ask(url, message="Say hello again.")]
        pid = await until(lambda: launched(url))
    await until(lambda: not psutil.pid_exists(pid))
