"""Turns taken apart: a whole installation, the commands, and the door."""

import asyncio
import json
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from click.testing import Result
from nats.js.api import AckPolicy, ConsumerConfig
from rich.console import Console
from typer.testing import CliRunner

from capibara_flow import wiring
from capibara_flow.cli.app import app
from capibara_flow.cli.turns import differing, page, table
from capibara_flow.domain.differences import differences
from capibara_flow.domain.timeline import AGAIN, LOST, Summary, Timeline, timeline
from capibara_flow.domain.turns import turn_id
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.history import History
from capibara_flow.settings import AuthSettings, Key, LogSettings
from tests.conftest import Installation, installed, settings_for
from tests.domain.kept import Kept, plain
from tests.edge.client import Event, arriving, ask, counts, events, text_of
from tests.waiting import until
from topics.chat import ChatMessage, ChatRequest, RouteTurn
from topics.output import Token

pytestmark = pytest.mark.timeout(90)
KEYS = AuthSettings(keys=tuple(Key(key=f"sk-{name}-0001", principal=name, tenant=name) for name in ("acme", "umbrella")))


@pytest.fixture
def fleet_file(engine: str, tmp_path: Path) -> Path:
    """One expert that can be continued, one that cannot, and one that nobody reaches."""
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'default = "one"\n[[experts]]\nname = "one"\nurls = ["{engine}"]\nscripted = true\n'
        f'[[experts]]\nname = "two"\nurls = ["{engine}"]\n'
        f'[[experts]]\nname = "nobody"\nurls = ["http://127.0.0.1:9/v1"]\n'
        f'[[rules]]\nroute = "lost"\nexpert = "nobody"\nthen = ["one"]\npatterns = ["^count"]\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture
async def installation(
    broker: EmbeddedBroker, fleet_file: Path, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Installation]:
    """A whole installation that the commands find by the environment."""
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(fleet_file))
    monkeypatch.setenv("CAPIBARA_STATE", str(tmp_path / "state"))
    for name, value in broker.environment().items():
        monkeypatch.setenv(name, value)
    async with installed(settings_for(broker, fleet_file, auth=KEYS), engine) as running:
        yield running


async def capibara(*words: str) -> Result:
    """A command's result: it has a loop of its own, so a thread too."""
    return await asyncio.to_thread(CliRunner().invoke, app, list(words))


async def said(*words: str) -> str:
    result = await capibara(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


async def turn(door: str, message: str, **more: Any) -> str:
    """The id of a turn that has ended."""
    stream = await ask(door, message=message, **more)
    assert stream[-1].name in {"done", "error"}
    return str(stream[0].data["turn"])


async def told(installation: Installation, turn: str, attempts: int) -> Timeline:
    """Its timeline, once the log has an account of its last attempt."""
    async with wiring.connected(installation.settings, "observer") as client:

        async def accounted() -> Timeline | None:
            found = timeline(await History(client).of(turn))
            last = [stage for stage in found.stages if stage.kind in {"attempt", "end"}][-1]
            return found if found.totals.attempts == attempts and "told" not in last.facts else None

        return await until(accounted)


def attempts(found: Timeline) -> list[tuple[str, str, Any]]:
    return [(stage.name, stage.outcome, stage.facts.get("continued")) for stage in found.stages if stage.kind == "attempt"]


async def stopped(door: str, engine: str) -> str:
    """A turn that was stopped in the middle of its answer."""
    async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": "hang on"}) as response:
        stream: AsyncIterator[Event] = arriving(response)
        opened = await anext(stream)

        async def running() -> bool:
            return (await counts(engine))["running"] == 1

        await until(running)
        async with session.delete(f"{door}/api/chat/{opened.data['turn']}"):
            assert [event.name async for event in stream][-1] == "done"
    return str(opened.data["turn"])


async def test_turns_of_every_kind_are_told_as_they_were(installation: Installation, door: str, engine: str) -> None:
    plain = await told(installation, await turn(door, "capital of France", model="one"), 1)
    assert attempts(plain) == [("one", "stop", None)]
    assert (plain.answer, plain.outcome, plain.missing) == ("The capital of France is Paris.", "stop", ())
    names = [stage.name for stage in plain.stages]
    assert names == ["asked", "waits for router", "router", "waits for one", "one"]

    passed = await told(installation, await turn(door, "count to five"), 2)
    assert attempts(passed) == [("nobody", "passed on: engine unreachable", None), ("one", "stop", None)]
    assert (passed.totals.passed_on, passed.expert) == (1, "one")

    skipped = await told(installation, await turn(door, "this one stumbles once", model="two"), 2)
    assert attempts(skipped) == [("two", AGAIN, None), ("two", "stop", "skip")]
    assert [stage.outcome for stage in skipped.stages if stage.name == "continued"] == ["skip"]

    refused = await told(installation, await turn(door, "refuse this", model="one"), 1)
    assert (refused.outcome, [stage.name for stage in refused.stages if stage.kind == "dead"]) == ("failed", ["dead letter of caller"])
    assert [stage.outcome for stage in refused.stages if stage.kind == "end"] == ["gave it up: bad request"]

    cancelled = await told(installation, await stopped(door, engine), 1)
    assert attempts(cancelled) == [("one", "cancelled", None)]
    assert [stage.outcome for stage in cancelled.stages if stage.kind == "cancel"] == ["asked"]


async def test_a_process_that_died_is_seen_by_the_lease_that_it_left(installation: Installation) -> None:
    opened = turn_id(milliseconds=0, entropy=b"0123456789", tenant="acme")
    request = ChatRequest(messages=(ChatMessage(role="user", content="capital of France"),), model="one")
    asked = RouteTurn(turn=opened, request=request)
    lease, said_first = f"cf.out.{opened}.lease.main", Token(turn=opened, text="The")
    settings = installation.settings
    async with wiring.connected(settings, "caller") as gone, wiring.connected(settings, "edge") as edge:
        await gone.jetstream().publish(lease, b"caller@gone:1 _INBOX_caller.x.1 1")
        await gone.jetstream().publish(said_first.subject, said_first.line())
        await edge.jetstream().publish(asked.subject, asked.model_dump_json(exclude_none=True).encode())
    found = await told(installation, opened, 2)
    assert attempts(found) == [("one", LOST, None), ("one", "stop", "prefill")]
    assert found.answer == "The capital of France is Paris."


async def test_the_commands_show_what_there_is(installation: Installation, door: str, tmp_path: Path) -> None:
    assert "no turns" in await said("turns")
    first = await turn(door, "capital of France \x1b[2J", model="one")
    second = await turn(door, "refuse [red]this[/]", model="two")
    await told(installation, second, 1)
    found = json.loads(await said("turns", "--json"))
    assert [each["turn"] for each in found] == [second, first]
    assert [each["turn"] for each in json.loads(await said("turns", "--outcome", "failed", "--expert", "two", "--json"))] == [second]
    assert json.loads(await said("turns", "--tenant", "acme", "--json")) == []
    listed = await said("turns", "--limit", "1", "--since", "1h")
    assert "refuse [red]this[/]" in listed
    assert "the newest 1: --limit shows more" in listed

    shown = await said("show", first)
    assert "The capital of France is Paris." in shown
    assert "\x1b" not in shown
    assert json.loads(await said("show", first, "--json"))["answer"] == "The capital of France is Paris."
    page, picture = tmp_path / "turn.html", tmp_path / "turn.svg"
    assert await said("show", second, "--html", str(page), "--svg", str(picture)) == f"written: {picture}\nwritten: {page}\n"
    assert "<h1>refuse [red]this[/]</h1>" in page.read_text(encoding="utf-8")
    assert picture.read_text(encoding="utf-8").startswith("<svg")

    for words in (["show", "nothing"], ["replay", first, "--speed", "0"], ["turns", "--since", "x"], ["show", first, "--svg", "/no/where"]):
        result = await capibara(*words)
        assert (result.exit_code, result.stderr.startswith("error: ")) == (1, True)


def test_what_strangers_said_does_nothing_to_a_terminal() -> None:
    evil = "\x1b[2J\x9b31m[bold]\u202e"
    kept = (
        Kept()
        .asked(ChatRequest(messages=(ChatMessage(role="user", content=evil),)))
        .routed(model_id=evil, reasoning=f"why {evil}")
        .taken()
        .words(evil)
    )
    kept.done(evil, expert=evil).account(evil, expert=evil)
    other = plain()
    for shown in (page(timeline(kept.record)), table([Summary.of(kept.record)]), *differing(differences(kept.record, other.record))):
        screen = Console(file=StringIO(), width=200)
        screen.print(shown, highlight=False)
        text = screen.file.getvalue()  # type: ignore[attr-defined]
        assert not set("\x1b\x9b\u202e") & set(text)
    assert "[bold]" in text


def test_a_list_on_a_small_screen_keeps_ids_and_outcomes_whole() -> None:
    kept = Kept().asked().routed().taken().words("one").done("tool_calls", expert="smollm2-135m-creative")
    for width in (60, 80, 100, 120, 150, 300):
        screen = Console(file=StringIO(), width=width)
        screen.print(table([Summary.of(kept.record)], screen.width))
        head, row = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert (kept.turn in row, "tool_calls" in row, "count to" in row, "outcome" in head) == (True, True, True, True), width
        assert ("acme" in row) is (width >= 150)


async def test_a_replay_is_byte_for_byte_what_the_client_got(installation: Installation, door: str) -> None:
    async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": "slow", "model": "one"}) as response:
        stream = await response.read()
        opened = response.headers["X-Capibara-Turn"]
    result = await capibara("replay", opened, "--speed", "max")
    assert result.stdout_bytes == b"".join(part for part in stream.splitlines(keepends=True) if not part.startswith(b": "))
    assert await said("replay", opened, "--text", "--speed", "50") == text_of(events(stream.decode())) + "\n"
    assert (await capibara("replay", opened, "--speed", "1")).stdout_bytes == result.stdout_bytes


async def test_plain_tools_of_nats_see_a_turn_too(installation: Installation, door: str) -> None:
    async with (
        wiring.connected(installation.settings, "observer") as observer,
        wiring.connected(installation.settings, "provisioner") as provisioner,
        ClientSession() as session,
        session.post(f"{door}/api/chat", json={"message": "slow", "model": "one"}) as response,
    ):
        opened = response.headers["X-Capibara-Turn"]
        overheard = await observer.subscribe(f"cf.*.{opened}.>")
        assert b"event: done" in await response.read()
        kinds: set[str] = set()
        while not {"live", "out", "log"} <= kinds:
            kinds.add((await overheard.next_msg(20)).subject.split(".")[1])
        wanted = ConsumerConfig(ack_policy=AckPolicy.NONE)
        filtered = await provisioner.jetstream().pull_subscribe("cf.log.*.caller", stream="CF_LOG", config=wanted)
        [fact] = await filtered.fetch(1, timeout=20)
    assert (json.loads(fact.data)["turn"], json.loads(fact.data)["outcome"]) == (opened, "stop")


async def test_without_a_log_the_output_tells_what_it_can(
    broker: EmbeddedBroker, fleet_file: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**broker.environment(), "CAPIBARA_FLEET__FILE": str(fleet_file), "CAPIBARA_LOG__ENABLED": "false"}.items():
        monkeypatch.setenv(name, value)
    async with installed(settings_for(broker, fleet_file, log=LogSettings(enabled=False)), engine) as running:
        asked = await turn(await running.start_edge(), "capital of France", model="one")
        assert "the log is off" in await said("turns")
        shown = await said("show", asked)
        assert (await capibara("replay", asked, "--text", "--speed", "max")).stdout == "The capital of France is Paris.\n"
    assert "told_by=the output alone" in shown
    assert "told=by its output alone" in shown
    assert "note: the log holds nothing of it" in shown


async def test_a_log_that_was_switched_off_gets_nothing_more(broker: EmbeddedBroker, fleet_file: Path, engine: str) -> None:
    kept = settings_for(broker, fleet_file)
    async with installed(kept, engine) as running:
        await told(running, await turn(await running.start_edge(), "capital of France", model="one"), 1)
    async with wiring.connected(kept, "observer") as client:
        before = (await client.jetstream().stream_info("CF_LOG")).state.messages
        async with installed(settings_for(broker, fleet_file, log=LogSettings(enabled=False)), engine) as running:
            await turn(await running.start_edge(), "capital of France", model="one")
        after = (await client.jetstream().stream_info("CF_LOG")).state.messages
    assert 0 < before == after


async def test_two_turns_are_compared_stage_by_stage(door: str, installation: Installation) -> None:
    one, again = [await turn(door, "capital of France", model="one", sampling={"temperature": value}) for value in (0.1, 0.9)]
    other = await turn(door, "capital of France", model="two")
    await told(installation, other, 1)
    same = await capibara("diff", one, again)
    assert (same.exit_code, "sampling.temperature: 0.1 → 0.9" in same.stdout) == (0, True)
    result = await capibara("diff", one, other, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["decisions_differ"]) == (1, True)
    assert {"where": "decision", "what": "model_id", "before": "one", "after": "two", "decides": True} in found["differences"]
    assert (await capibara("diff", one, one)).stdout == "no differences\n"
    assert (await capibara("diff", one, "nothing")).exit_code == 2


async def test_the_door_shows_a_tenant_its_own_turns(door: str, installation: Installation) -> None:
    async with ClientSession(headers={"Authorization": "Bearer sk-acme-0001"}) as acme, ClientSession(door) as stranger:
        async with acme.post(f"{door}/api/chat", json={"message": "capital of France", "model": "one"}) as response:
            assert "event: done" in await response.text()
            own = response.headers["X-Capibara-Turn"]
        await told(installation, own, 1)
        async with acme.get(f"{door}/api/turns?since=1h") as response:
            assert [each["turn"] for each in (await response.json())["turns"]] == [own]
        async with acme.get(f"{door}/api/turns/{own}") as response:
            assert (await response.json())["totals"]["attempts"] == 1
        async with acme.get(f"{door}/api/turns/{own}?format=html") as response:
            assert "The capital of France is Paris." in await response.text()
        for headers in ({}, {"Authorization": "Bearer sk-umbrella-0001"}):
            async with stranger.get(f"/api/turns/{own}", headers=headers) as response:
                assert response.status == 404
        async with stranger.get("/api/turns", headers={"Authorization": "Bearer sk-umbrella-0001"}) as response:
            assert (await response.json())["turns"] == []
