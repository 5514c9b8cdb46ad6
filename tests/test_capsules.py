"""Recorded turns of every kind, from capsules and from the log, played again without any engine: the same decisions and bytes."""

import asyncio
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capibara_flow.cli import capsules
from capibara_flow.cli.app import app
from capibara_flow.domain.capsule import changes
from capibara_flow.domain.differences import Difference
from capibara_flow.domain.record import Record
from capibara_flow.domain.recording import recorded
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.ingesting import File
from capibara_flow.settings import Settings
from capibara_flow.wiring.laboratory import Setup, laboratory, own_broker
from tests import kinds
from tests.conftest import ROOT
from tests.knowledge import knowing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_logging")]


@dataclass(frozen=True)
class Yesterday:
    """What is left of an installation: its broker, its fleet, and what became of a turn of every kind."""

    environment: dict[str, str]
    settings: Settings
    records: dict[str, Record]

    def turn(self, kind: str) -> str:
        return self.records[kind].turn


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yesterday]:
    folder = tmp_path_factory.mktemp("yesterday")

    async def lived(broker: EmbeddedBroker) -> tuple[Settings, dict[str, Record]]:
        async with kinds.world(broker, folder) as world:
            return world.settings, await kinds.records(world)

    with tempfile.TemporaryDirectory() as store, EmbeddedBroker(Path(store), config=ROOT / "nats.conf") as broker:
        settings, records = asyncio.run(lived(broker))
        environment = broker.environment() | {"CAPIBARA_FLEET__FILE": str(folder / "fleet.toml")}
        yield Yesterday(environment, settings, records)


@pytest.fixture
def here(yesterday: Yesterday, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of somebody who reaches yesterday's broker."""
    for name in [each for each in os.environ if each.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)
    for name, value in yesterday.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CAPIBARA_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nats.conf").write_bytes((ROOT / "nats.conf").read_bytes())
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def played(*files: Path) -> dict[str, tuple[Difference, ...]]:
    """What differs when the capsules in *files* are played, by the file's name."""
    found = {file.stem: capsules.opened(file) for file in files}
    [configuration] = {each.configuration.digest: each.configuration for each in found.values()}.values()

    async def all_of_them(settings: Settings) -> list[Record]:
        async with laboratory(settings, Setup(configuration.fleet, configuration.routes)) as place:
            return await asyncio.gather(*(place.play(each.engines, each.record) for each in found.values()))

    with own_broker() as settings:
        again = asyncio.run(all_of_them(settings))
    return {name: changes(each.record, record) for (name, each), record in zip(found.items(), again, strict=True)}


def changed_fleet(here: Path) -> Path:
    """Yesterday's fleet, but somebody else answers by default."""
    file = here / "changed.toml"
    text = Path(os.environ["CAPIBARA_FLEET__FILE"]).read_text(encoding="utf-8")
    file.write_text(text.replace('default = "main"', 'default = "other"'), encoding="utf-8")
    return file


def test_every_kind_is_what_it_is_called(yesterday: Yesterday):
    found = yesterday.records
    ends = {kind: record.outcome for kind, record in found.items()}
    assert {kind for kind, end in ends.items() if end == "failed"} == {
        "bad request",
        "unknown expert",
        "expired",
        "expired in the queue",
        "down to the end",
    }
    assert {kind for kind, end in ends.items() if end == "cancelled"} == {
        "cancelled",
        "cancelled in the queue",
        "cancelled while it waits",
        "cancelled in the search",
    }
    assert {each.message.continued for each in found["prefill"].attempts} == {"prefill"}
    assert {each.message.continued for each in found["skip"].attempts} == {"skip"}
    assert "reset" in {each.message.continued for each in found["reset"].attempts}
    assert [each.message.outcome for each in found["passed on"].attempts] == ["passed on: engine unreachable", "stop"]
    assert found["cached"].attempts[0].message.cached
    assert found["waiting"].attempts[-1].message.attempt == 3
    assert len(found["long"].branch()) > 5
    assert found["tools"].outcome == "tool_calls"


def test_all_kinds_are_played_from_files_with_identical_decisions_and_bytes(yesterday: Yesterday, here: Path):
    for kind, record in yesterday.records.items():
        capsules.export(yesterday.settings, record.turn, here / f"{kind}.json", force=False)
    files = sorted(here.glob("*.json"))
    assert len(files) == len(kinds.KINDS) >= 20
    assert not [file.name for file in files if "sk-very-secret" in file.read_text(encoding="utf-8")]
    assert {name: found for name, found in played(*files).items() if found} == {}


def test_a_capsule_is_made_once_and_runs_where_nothing_else_is(yesterday: Yesterday, here: Path, monkeypatch: pytest.MonkeyPatch):
    turn = yesterday.turn("reset")
    made = run("capsule", "export", turn, "turn.json")
    assert (made.exit_code, "capibara capsule run turn.json" in made.stdout) == (0, True), made.output
    assert stat.S_IMODE((here / "turn.json").stat().st_mode) == 0o600
    again = run("capsule", "export", turn, "turn.json")
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    assert run("capsule", "export", turn, "turn.json", "--force").exit_code == 0
    for name in yesterday.environment:
        monkeypatch.delenv(name)
    result = run("capsule", "run", "turn.json")
    assert (result.exit_code, result.stdout) == (0, "the same: every decision, and every byte that the client got\n"), result.output


def test_a_capsule_tells_where_another_fleet_decides_otherwise(yesterday: Yesterday, here: Path):
    capsules.export(yesterday.settings, yesterday.turn("spanish"), here / "turn.json", force=False)
    result = run("capsule", "run", "turn.json", "--fleet", str(changed_fleet(here)), "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["same"], told["turn"]) == (1, False, yesterday.turn("spanish"))
    found = {f"{each['where']}.{each['what']}": (each["before"], each["after"]) for each in told["differences"]}
    assert found["decision.model_id"] == ("main", "other")
    assert "text.text" not in found  # nobody else is recorded: it answers with the same words
    shown = run("capsule", "run", "turn.json", "--fleet", str(changed_fleet(here)))
    assert shown.exit_code == 1
    assert "model_id" in shown.stdout


def test_other_words_of_an_engine_are_told(yesterday: Yesterday, here: Path):
    capsules.export(yesterday.settings, yesterday.turn("prefill"), here / "turn.json", force=False)
    data = json.loads((here / "turn.json").read_text(encoding="utf-8"))
    data["engines"]["takes"][-1]["pieces"][-1]["text"] += "!"
    (here / "other.json").write_text(json.dumps(data), encoding="utf-8")
    del data["engines"]["takes"][0]
    (here / "without.json").write_text(json.dumps(data), encoding="utf-8")
    found = played(here / "other.json"), played(here / "without.json")
    assert {each.what.partition(" ")[0] for each in found[0]["other"]} == {"text", "event"}
    assert "attempts" in {each.where for each in found[1]["without"]}


ROUTES = {
    "programming": ["reverse a string in Rust", "ordena una lista en Python", "fix this loop in Java", "escribe una función en C"],
    "quick_facts": ["what is the capital of Spain?", "¿quién inventó la radio?", "when did the war end?", "¿dónde nace el Ebro?"],
}
POLICY = """
[policy]
programming = "again"
quick_facts = "other"
"""


def route_text(name: str) -> str:
    """A route as its file tells it, with as many examples of each level as it takes to learn complexity from the two of them."""
    levels = zip(("simple", "moderate", "complex", "very_complex"), ROUTES[name], strict=True)
    told = [f"{level} = {json.dumps([text, f'{text} please', f'por favor, {text}', f'{text} now'])}\n" for level, text in levels]
    return f"[[routes]]\nname = '{name}'\n[routes.levels]\n{''.join(told)}"


@pytest.mark.model
async def test_a_question_that_was_read_is_read_again_or_as_it_was_where_nothing_can_read(broker: EmbeddedBroker, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("".join(map(route_text, ROUTES)), encoding="utf-8")
    async with kinds.world(broker, tmp_path, 'routes = "mine.toml"\n', POLICY) as world:
        file = world.settings.fleet_file
        turns = [await world.asked(words) for words in ("escribe un bucle en Python", "what is the capital of Peru?")]
        records = [await world.record(turn) for turn in turns]
    fleet, read = capsules.configured(file)
    assert read
    assert len({record.routed.decision.route_name for record in records if record.routed}) == 2
    for embedder, noted in (("universal", 0), ("no such model", 1)):
        with own_broker() as settings:
            async with laboratory(settings, Setup(fleet, read, embedder)) as place:
                again = [await place.play(recorded(record, fleet), record) for record in records]
                assert len(place.notes) == noted
        assert [changes(record, other) for record, other in zip(records, again, strict=True)] == [(), ()]


def test_the_same_configuration_gives_all_the_same(yesterday: Yesterday, here: Path):
    result = run("rerun", "--since", "1h", "--json")
    told = json.loads(result.stdout)
    # More than one of each kind: some took others to be what they are.
    assert (result.exit_code, told["changed"], told["same"], told["played"] >= len(kinds.KINDS)) == (0, [], 1, True)
    assert told["skipped"] == {}


def test_another_configuration_gives_a_table_of_what_changes(yesterday: Yesterday, here: Path):
    result = run("rerun", "--fleet", str(changed_fleet(here)), "--only", "router", "--json")
    told = json.loads(result.stdout)
    by_default = {"spanish", "english", "long", "cancelled", "reasoning", "not streamed", "background", "idempotent", "follow-up"}
    changed = {each["turn"] for each in told["changed"]}
    assert (result.exit_code, {yesterday.turn(kind) for kind in by_default} <= changed) == (1, True)
    assert not changed & {yesterday.turn(kind) for kind in ("named", "by rule", "image", "tools", "unknown expert")}
    table = run("rerun", "--fleet", str(changed_fleet(here)), "--only", "router", "--limit", "3")
    assert "3 turns played" in table.stdout
    nothing = run("rerun", "--since", "0s")
    assert (nothing.exit_code, nothing.stdout) == (2, "nothing was played: no turn of that time is kept\n")
    calls = run("rerun", "--only", "caller", "--json")
    told = json.loads(calls.stdout)
    assert (calls.exit_code, told["changed"]) == (0, []), calls.output
    assert "never came to an expert" in told["skipped"][yesterday.turn("unknown expert")]
    refused = run("rerun", "--only", "speaker")
    assert (refused.exit_code, "router, retriever, caller" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": "capibara-capsule", "version": 1', "not JSON"),
        ("[]", "no capsule"),
        ('{"choices": []}', "no capsule"),
        ('{"format": "capibara-capsule", "version": 99}', "version 99"),
        ('{"format": "capibara-capsule", "version": 1, "turn": "cf.>"}', "broken capsule: turn"),
    ],
)
def test_what_is_no_capsule_is_refused_clearly(here: Path, text: str, why: str):
    (here / "bad.json").write_text(text, encoding="utf-8")
    result = run("capsule", "run", "bad.json")
    assert (result.exit_code, why in result.stderr, "Traceback" in result.output) == (1, True, False), result.output


def test_a_capsule_that_was_tampered_with_is_refused(yesterday: Yesterday, here: Path):
    capsules.export(yesterday.settings, yesterday.turn("english"), here / "turn.json", force=False)
    text = (here / "turn.json").read_text(encoding="utf-8")
    whole = json.loads(text)
    foreign = yesterday.turn("spanish")
    broken = (
        whole | {"messages": whole["messages"][:1]},
        whole | {"messages": whole["messages"] + [whole["messages"][0] | {"subject": f"cf.log.{foreign}.router"}]},
        whole | {"messages": [{**whole["messages"][0], "body": None, "base64": "*"}]},
        whole | {"configuration": {**whole["configuration"], "fleet": {"experts": []}}},
        whole | {"turn": foreign},
    )
    for each in broken:
        (here / "broken.json").write_text(json.dumps(each), encoding="utf-8")
        result = run("capsule", "run", "broken.json")
        assert (result.exit_code, "broken capsule" in result.stderr) == (1, True), result.output
    with (here / "huge.json").open("wb") as huge:
        huge.truncate(300 * 1024 * 1024)
    result = run("capsule", "run", "huge.json")
    assert (result.exit_code, "are the most" in result.stderr) == (1, True)


def test_the_decisions_about_grounded_turns_are_made_again(yesterday: Yesterday, here: Path):
    """They may not be passed over because of the sources, which nobody looks for here."""
    capsules.export(yesterday.settings, yesterday.turn("grounded"), here / "turn.json", force=False)
    same = run("capsule", "run", "turn.json")
    assert same.exit_code == 0, same.output
    assert "sources are not looked for anew" in same.stderr
    assert "[1]" in capsules.opened(here / "turn.json").record.calls[0].message.context
    result = run("capsule", "run", "turn.json", "--fleet", str(changed_fleet(here)), "--json")
    found = {f"{each['where']}.{each['what']}" for each in json.loads(result.stdout)["differences"]}
    assert (result.exit_code, "decision.model_id" in found) == (1, True)
    rerun = run("rerun", "--since", "1h", "--only", "router,retriever", "--json")
    told = json.loads(rerun.stdout)
    assert (rerun.exit_code, told["changed"]) == (0, [])
    assert told["played"] >= 20


async def test_sources_are_looked_for_anew_if_that_is_wanted(yesterday: Yesterday, here: Path):
    async def rerun(*more: str) -> tuple[int, list[dict[str, Any]], str]:
        result = await asyncio.to_thread(run, "rerun", "--since", "1h", "--search", "--json", *more)
        return result.exit_code, json.loads(result.stdout)["changed"] if result.stdout else [], result.stderr

    only = ("--only", "router,retriever")
    exit_code, _, told = await rerun(*only)
    assert (exit_code, "start a retriever" in told) == (2, True)
    for nothing in ((), ("--only", "router")):
        exit_code, _, told = await rerun(*nothing)
        assert (exit_code, "--only router,retriever" in told) == (2, True)
    async with knowing(yesterday.settings) as library:
        await library.ingest(*kinds.DOCUMENT)
        assert await rerun(*only) == (0, [], "")
        await library.ingest(kinds.DOCUMENT[0], File(b"The otter? Who swims? The otter!", "otters.txt"))
        exit_code, changed, _ = await rerun(*only)
    assert exit_code == 1
    assert [each["turn"] for each in changed] == [yesterday.turn("grounded")]
    assert {(each["where"], each["what"]) for each in changed[0]["differences"]} == {("sources", "passages")}
