"""Turns asked again from one of their stages on, on a whole installation."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capibara_flow import wiring
from capibara_flow.cli.app import app
from capibara_flow.cli.fork import Forked, fork, told
from capibara_flow.domain.capsule import changes
from capibara_flow.domain.forking import COPIED, Stage, begins_at
from capibara_flow.domain.record import Record
from capibara_flow.domain.recording import recorded
from capibara_flow.domain.turns import belongs
from capibara_flow.errors import BadRequest, TurnUnknown, UnknownExpert
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.runtime.history import History
from capibara_flow.runtime.ingesting import File
from capibara_flow.wiring.laboratory import Setup, laboratory, own_broker
from tests.conftest import Installation
from tests.edge.client import ask
from tests.knowledge import knowing
from tests.waiting import until
from topics.knowledge import Scope


async def of(installation: Installation, turn: str) -> Record:
    """What is kept of *turn*, once it has ended."""

    async def complete() -> Record | None:
        async with wiring.connected(installation.settings, "observer") as client:
            found = await History(client).of(turn)
        return found if found.end and (found.attempts or found.dead) else None

    return await until(complete)


async def asked(installation: Installation, door: str, message: str, **more: Any) -> Record:
    events = await ask(door, message=message, **more)
    return await of(installation, events[0].data["turn"])


async def forked(installation: Installation, record: Record, stage: Stage, *wanted: str) -> Record:
    return await of(installation, (await fork(installation.settings, record.turn, stage, wanted)).turn)


def upstream(record: Record) -> list[tuple[str, bytes]]:
    """What was said before an expert was called, without whose it was."""
    facts = [entry for entry in record.entries if entry.subject.endswith((".asked.router", ".router"))]
    said = [(entry.subject, entry.data.split(b"\n")[0]) for entry in record.branch()[:1]]
    found = [(entry.subject, entry.data) for entry in facts] + said
    return sorted((subject.replace(record.turn, "T"), data.replace(record.turn.encode(), b"T")) for subject, data in found)


async def test_a_fork_at_the_router_is_a_new_turn_that_is_linked_to_the_old_one(installation: Installation, door: str):
    old = await asked(installation, door, "count for me")
    new = await forked(installation, old, "router", "message=please paint it", "temperature=0.5", "system=Be brief.")
    assert new.asked
    assert [(each.role, each.text) for each in new.asked.request.messages] == [("system", "Be brief."), ("user", "please paint it")]
    assert new.asked.request.sampling.temperature == 0.5
    assert (new.origin, new.outcome, new.expert, new.tenant) == (old.turn, "stop", "paint", old.tenant)
    assert all(entry.headers.get("Cf-Origin") == old.turn for entry in new.entries if entry.stream == "CF_LOG")
    assert belongs(new.turn, old.tenant)
    assert not any(COPIED in entry.headers for entry in new.entries)


async def test_a_fork_at_the_caller_leaves_every_byte_before_it_as_it_was(installation: Installation, door: str):
    old = await asked(installation, door, 'count "turn":"mine" for me', sampling={"max_tokens": 3})
    new = await forked(installation, old, "caller", "max_tokens=2", "expert=paint")
    assert upstream(new) == upstream(old)
    assert len(upstream(new)) == 3
    assert (new.expert, new.outcome, new.origin) == ("paint", "length", old.turn)
    assert [(each.message.expert, each.message.alternatives) for each in new.calls] == [("paint", ())]
    assert new.calls[0].message.request.sampling.max_tokens == 2
    assert [each.message.completion_tokens for each in new.attempts] == [2]
    # It can be read at the door from its beginning, as any turn can.
    events = json.loads(new.branch()[0].data.split(b"\n")[0])
    assert (events["event"], events["turn"]) == ("routed", new.turn)


async def test_an_empty_value_leaves_it_to_the_expert_and_nothing_changed_is_asked_again(installation: Installation, door: str):
    old = await asked(installation, door, "count for me", sampling={"max_tokens": 2, "temperature": 0})
    new = await forked(installation, old, "caller", "max_tokens=", "stop=five")
    assert new.calls[0].message.request.sampling.model_dump(exclude_defaults=True) == {"temperature": 0, "stop": ("five",)}
    assert new.outcome == "stop"
    same = await forked(installation, old, "caller")
    assert same.calls[0].message.request == old.calls[0].message.request


def titles(record: Record) -> list[str]:
    return [source.passage.title for source in record.calls[0].message.sources]


REFUSED: tuple[tuple[Stage, str, type[Exception], str], ...] = (
    ("caller", "colour=red", BadRequest, "temperature"),
    ("caller", "temperature", BadRequest, "KEY=VALUE"),
    ("caller", "temperature=hot", BadRequest, "temperature: "),
    ("router", "temperature=9", BadRequest, "temperature: "),
    ("caller", "source=3", BadRequest, "source"),
    ("caller", "collection=birds", BadRequest, "--from retriever"),
    ("router", "collection=no spaces", BadRequest, "collection: "),
    ("retriever", "message=x", BadRequest, "fork it from the router"),
    ("caller", "expert=nobody", UnknownExpert, "scripted"),
    ("caller", "expert=", BadRequest, "a fork from the router"),
    ("router", "message= ", BadRequest, "it is empty"),
)


async def test_a_fork_at_the_retriever_finds_sources_anew(installation: Installation, door: str):
    async with knowing(installation.settings) as library:
        scope = Scope("anonymous")
        await library.ingest(scope, File(b"Capibaras can swim", "capibaras"))
        old = await asked(installation, door, "who can swim", grounded=True)
        await library.ingest(scope, File(b"Otters can swim and dive, who knows", "otters"))
        await library.ingest(Scope("anonymous", "birds"), File(b"Ducks can swim", "ducks"))
        new = await forked(installation, old, "retriever", "temperature=0")
        other = await forked(installation, old, "retriever", "collection=birds")
        third = await forked(installation, old, "retriever", "message=who dives")
        same = await forked(installation, third, "caller", "message=who can swim")
    assert titles(old) == ["capibaras"]
    assert (titles(new), titles(other), titles(third), titles(same)) == (["otters", "capibaras"], ["ducks"], ["otters"], ["otters"])
    assert upstream(new) == upstream(old)
    assert len(upstream(new)) == 3
    assert (new.origin, new.outcome) == (old.turn, "stop")
    assert new.calls[0].message.request.sampling.temperature == 0
    assert [begins_at(each) for each in (old, new, third, same)] == ["router", "retriever", "retriever", "caller"]
    with pytest.raises(BadRequest, match="--from caller"):
        await fork(installation.settings, old.turn, "retriever", ("source=-1",))


async def test_such_a_fork_is_played_again_with_what_it_found(installation: Installation, door: str):
    async with knowing(installation.settings) as library:
        await library.ingest(Scope("anonymous"), File(b"Capibaras can swim", "capibaras"))
        old = await asked(installation, door, "who can swim", grounded=True)
        new = await forked(installation, old, "retriever", "expert=paint")
    fleet = installation.settings.experts
    with own_broker() as settings:
        async with laboratory(settings, Setup(fleet)) as place:
            again = await place.play(recorded(new, fleet), new)
    assert (new.expert, titles(new)) == ("paint", ["capibaras"])
    assert changes(new, again) == ()


def test_what_was_changed_is_told_in_a_line_and_every_source_that_was_dropped():
    made = Forked(
        "NEW", "OLD", "caller", "anonymous", (("source", "-1"), ("source", "-3 "), ("message", "\x1b[31mred"), ("stop", "x" * 500))
    )
    assert made.as_json()["changed"] == {"source": "-1,-3", "message": "\x1b[31mred", "stop": "x" * 500}
    head = told(made, "http://here").splitlines()[0]
    assert head.isprintable()
    assert len(head) < 200


async def test_what_cannot_be_changed_is_told(installation: Installation, door: str):
    old = await asked(installation, door, "count for me")
    for stage, wanted, error, why in REFUSED:
        with pytest.raises(error, match=why):
            await fork(installation.settings, old.turn, stage, (wanted,))
    for wrong in ("01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F", "*", ""):
        with pytest.raises(TurnUnknown):
            await fork(installation.settings, wrong, "router", ())


async def test_an_expert_that_does_not_see_gets_no_images(installation: Installation, door: str):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    events = await ask(door, messages=[{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}])
    old = await of(installation, events[0].data["turn"])
    with pytest.raises(BadRequest, match="images"):
        await fork(installation.settings, old.turn, "caller", ("expert=scripted",))
    new = await forked(installation, old, "router", "message=and this?")
    assert new.asked
    assert (new.asked.request.question, new.asked.request.has_image, new.expert) == ("and this?", True, "paint")


async def test_a_fork_is_played_again_from_the_stage_where_it_began(installation: Installation, door: str):
    old = await asked(installation, door, "count for me")
    new = await forked(installation, old, "caller", "expert=paint", "max_tokens=3")
    fleet = installation.settings.experts
    recording = recorded(new, fleet)
    with own_broker() as settings:
        async with laboratory(settings, Setup(fleet)) as place:
            again = await place.play(recording, new)
    assert recording.stage == "caller"
    assert changes(new, again) == ()


async def test_the_command_tells_how_to_go_on(
    broker: EmbeddedBroker, installation: Installation, door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in [each for each in os.environ if each.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)
    for name, value in broker.environment("provisioner").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CAPIBARA_STATE", str(tmp_path / "state"))
    old = await asked(installation, door, "count for me")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["fork", old.turn, *words])

    told = await asyncio.to_thread(run, "--from", "router", "--set", "temperature=0", "--json")
    made = json.loads(told.stdout)
    assert (told.exit_code, made["origin"], made["from"], made["changed"]) == (0, old.turn, "router", {"temperature": "0"})
    assert (await of(installation, made["turn"])).origin == old.turn
    told = await asyncio.to_thread(run, "--from", "caller")
    assert f"capibara diff {old.turn} " in told.stdout
    assert "curl -N http://127.0.0.1:5001/api/chat/" in told.stdout
    refused = await asyncio.to_thread(run, "--from", "speaker")
    assert (refused.exit_code, "router, retriever or caller" in " ".join(refused.output.replace("│", " ").split())) == (2, True)
