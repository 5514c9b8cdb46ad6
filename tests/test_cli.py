"""The command line, against fakes that answer on real sockets."""

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from capibara_flow import settings, wiring
from capibara_flow.cli import fleets, state
from capibara_flow.cli.app import app
from capibara_flow.cli.chat import EventReader, ServerEvent
from capibara_flow.cli.children import RESTARTS, Child, back_off
from capibara_flow.cli.doctor import browser, examine
from capibara_flow.cli.fleets import Served
from capibara_flow.cli.options import expected
from capibara_flow.cli.supervisor import Stopped, Supervisor, free_port, is_free, local_get
from capibara_flow.cli.up import Wish, understood
from capibara_flow.domain.turns import belongs
from capibara_flow.engines import scripted as engine
from capibara_flow.engines import xllamacpp
from capibara_flow.engines.script import load_script
from capibara_flow.errors import CannotStart, EngineBusy
from tests.conftest import Installation, settings_for
from tests.webserver import serving
from topics.chat import CallExpert, ChatMessage, ChatRequest, RouteTurn, Sampling, TurnFailed
from topics.message import PRINCIPAL, TENANT

CAPIBARA = [sys.executable, "-m", "capibara_flow"]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests, and no `up` of theirs, may be seen."""
    for name in [each for each in os.environ if each.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CAPIBARA_STATE", str(tmp_path / "state"))


def run(*words: str, **more):
    return CliRunner().invoke(app, list(words), **more)


def up(*words: str):
    """`up` becomes another program: it needs a process of its own."""
    return subprocess.run([*CAPIBARA, "up", *words], check=False, capture_output=True, text=True, timeout=60)


def until(condition: Callable[[], object], seconds: float = 30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


# --- shape -------------------------------------------------------------------------------------------------------


COMMANDS = ["", "up", "chat", "doctor", "edge", "worker", "engine scripted", "streams apply", "streams show"]
COMMANDS += [
    "turns",
    "show",
    "replay",
    "diff",
    "fork",
    "capsule export",
    "capsule run",
    "rerun",
    "ingest",
    "search",
    "rag list",
    "rag check",
    "queue",
]
COMMANDS += ["dead", "dead list", "dead show", "dead retry", "erase", "usage", "fleet", "fleet check", "fleet status"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    assert re.fullmatch(r"capibara \d+\.\d+\.\d+\n", run("--version").output)


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["up", "--port", "70000"],
        ["up", "--engine", "localhost:8080"],
        ["up", "--engine", "http://x", "--fleet", "f.toml"],
        ["up", "--engine", "http://user:hunter2@x/v1"],
        ["up", "--log-level", "loud"],
        ["engine", "scripted", "no-such-file.toml"],
        ["worker"],
    ],
)
def test_wrong_usage_exits_with_2(words):
    result = run(*words)
    assert result.exit_code == 2
    assert "hunter2" not in result.output


def test_an_unknown_worker_is_told_who_there_is():
    done = subprocess.run([*CAPIBARA, "worker", "router", "nope"], check=False, capture_output=True, text=True, timeout=60)
    said = " ".join(done.stderr.split())
    assert (done.returncode, "no worker 'nope'" in said, "router, retriever, caller" in said) == (2, True, True)
    assert "python -m workers" not in said


def test_the_supervisor_loads_nothing_heavy():
    program = (
        "import sys; import capibara_flow.cli.up\n"
        "print(*{'pydantic', 'typer', 'aiohttp', 'nats', 'hashlib', 'ssl', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_expected_errors_have_words_and_bugs_have_none():
    assert expected(EngineBusy("come later")) == "come later"
    assert expected(settings.SettingsError("x is wrong")) == "x is wrong"
    assert "capibara doctor" in (expected(ConnectionRefusedError("refused")) or "")
    assert expected(KeyError("a bug")) is None
    assert expected(BrokenPipeError("nobody reads on")) is None


def test_an_expected_error_is_one_line_and_exit_code_1(monkeypatch):
    monkeypatch.setenv("CAPIBARA_EDGE__PORT", "many")
    result = run("streams", "show")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: CAPIBARA_EDGE__PORT: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["apply", "show"])
def test_streams_without_a_broker_say_so_at_once(monkeypatch, command):
    monkeypatch.setenv("CAPIBARA_NATS__URL", f"nats://127.0.0.1:{free_port('127.0.0.1')}")
    result = run("streams", command)
    assert (result.exit_code, "no broker" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--no-local-model"], "--engine"),
        (["--fleet", "no-such.toml"], "no-such.toml"),
        (["--model", "no-such.gguf"], "no-such.gguf"),
    ],
)
def test_up_says_what_is_missing_and_leaves_nothing(tmp_path, words, remedy):
    result = up("--port", "0", "--state", str(tmp_path / "state"), *words)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert remedy in result.stderr
    assert "broker" not in result.stdout
    assert not (tmp_path / "state" / "nats").exists()


def test_up_on_a_taken_port_names_the_option(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = up("--port", str(server.getsockname()[1]), "--state", str(tmp_path / "state"))
    assert (result.returncode, "--port" in result.stderr) == (1, True)


@given(
    st.builds(
        Wish,
        engines=st.lists(st.text()).map(tuple),
        port=st.integers(0, 65535),
        fleet=st.none() | st.just(Path("f.toml")),
        ready_file=st.none() | st.just(Path("a b")),
        local_model=st.booleans(),
    )
)
def test_a_wish_survives_the_way_to_its_supervisor(wish):
    assert understood(json.dumps(asdict(wish), default=str)) == wish


# --- fleets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/models/Qwen3-4B.Q4_K_M.gguf", "qwen3-4b-q4_k_m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-1-8b-instruct"),
        ("phi4:mini", "phi4-mini"),
        ("...", "engine"),
        ("", "engine"),
    ],
)
def test_names_of_experts(text, name):
    assert fleets.expert_name(text) == name


@given(st.lists(st.text(max_size=80), min_size=1, max_size=8))
def test_any_models_make_a_fleet_that_can_be_read(tmp_path_factory, models):
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    served = fleets.uniquely_named(Served(each, "http://127.0.0.1:9/v1", each, scripted=True) for each in models)
    fleets.write_private(path, fleets.fleet_toml(served))
    fleet = settings.read_fleet(path)
    assert [expert.model for expert in fleet.experts] == models
    assert [expert.name for expert in fleet.experts] == [each.name for each in served] == [each.name for each in fleets.listed(path)]


def test_the_small_model_is_kept_from_repeating_itself_and_a_brought_one_is_left_alone(tmp_path):
    served = [fleets.local("small", 9, fleets.SMALL_SAMPLING), fleets.local("mine", 9)]  # one that comes along, one that was brought
    (tmp_path / "f.toml").write_text(fleets.fleet_toml(served), encoding="utf-8")
    small, mine = settings.read_fleet(tmp_path / "f.toml").experts
    assert small.sampling.model_dump(exclude_none=True, exclude={"stop"}) == fleets.SMALL_SAMPLING
    assert mine.sampling == Sampling()
    assert small.concurrency == xllamacpp.SLOTS


def test_the_small_model_is_two_experts_and_a_policy_tells_who_answers_what(tmp_path):
    text = fleets.fleet_toml(fleets.uniquely_named(fleets.small_pair("small", 9))) + fleets.small_policy("small")
    (tmp_path / "f.toml").write_text(text, encoding="utf-8")
    fleet = settings.read_fleet(tmp_path / "f.toml")
    steady, plays = fleet.experts
    assert (steady.urls, steady.model) == (plays.urls, plays.model)
    assert steady.sampling != plays.sampling
    assert fleet.policy["creative_writing"].simple.experts == (plays.name,)
    assert fleet.policy["default"].very_complex.experts == (steady.name,)


def test_a_fleet_file_is_for_our_eyes_only(tmp_path):
    (tmp_path / "fleet.toml").write_text("old", encoding="utf-8")
    fleets.write_private(tmp_path / "fleet.toml", "new")
    assert (tmp_path / "fleet.toml").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "fleet.toml").stat().st_mode & 0o777 == 0o600


def test_an_engine_is_asked_for_its_models_until_it_is_up():
    answers = iter([ConnectionRefusedError(), {"data": []}, {"data": [{"id": "a"}, {"id": "b", "owned_by": "vllm"}]}])

    def ask(url: str):
        assert url == "http://x/v1/models"
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    found = fleets.models_at("http://x/v1/", 1, ask=ask, pause=lambda: None)
    assert [(each.model, each.dialect) for each in found] == [("a", "openai"), ("b", "vllm")]


def test_an_engine_may_be_named_without_its_version():
    answers = {"http://x/v1/models": {"data": [{"id": "a", "owned_by": "scripted"}]}}
    found = fleets.models_at("http://x", 1, ask=lambda url: answers.get(url, {}), pause=lambda: None)
    assert [(each.model, each.url, each.scripted) for each in found] == [("a", "http://x", True)]


@pytest.mark.parametrize("answer", [{}, [], {"data": None}, {"data": ["x"]}, "text"])
def test_an_engine_without_a_list_becomes_one_expert(answer):
    found = fleets.models_at("http://x", 3, ask=lambda _: answer, pause=lambda: None, patience_seconds=0)
    assert found == [Served("engine-3", "http://x")]


# --- children ----------------------------------------------------------------------------------------------------


def child(tmp_path: Path, program: str) -> Child:
    return Child("child", [sys.executable, "-c", program], {"FILE": str(tmp_path / "file")}, tmp_path / "child.log")


def test_back_off_doubles_and_ends():
    assert [back_off(failures) for failures in range(1, RESTARTS + 2)] == [0.5, 1, 2, 4, 8, None]


def test_a_crashed_child_is_started_again_and_ended_in_the_end(tmp_path):
    program = (
        "import os, sys, time\nwith open(os.environ['FILE'], 'a') as f: n = f.tell(); f.write('x')\nif n: time.sleep(600)\nsys.exit(3)"
    )
    said: list[str] = []
    kept = child(tmp_path, program)

    def stop_when_restarted() -> None:
        until(lambda: (tmp_path / "file").exists() and (tmp_path / "file").read_text(encoding="utf-8") == "xx")
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_when_restarted)
    pids: list[int | None] = []
    with Supervisor(said.append) as supervisor:
        supervisor.on_restart = lambda: pids.append(kept.pid)
        supervisor.start(kept)
        watcher.start()
        with pytest.raises(Stopped):
            supervisor.watch()
    watcher.join()
    assert not kept.alive
    assert pids == [kept.pid]
    assert [line.partition(" (")[0] for line in said] == ["child ended with exit code 3", "child runs again", "stopping ..."]


def test_a_child_that_crashes_again_and_again_is_given_up(tmp_path):
    failing = child(tmp_path, "raise SystemExit('no luck')")
    failing.failures = RESTARTS
    with Supervisor(lambda _: None) as supervisor:
        supervisor.start(failing)
        with pytest.raises(CannotStart, match=r"(?s)6 times in a row.*no luck"):
            supervisor.watch()


def test_a_child_that_dies_while_others_are_awaited_is_told_with_its_log(tmp_path):
    with Supervisor(lambda _: None) as supervisor:
        supervisor.start(child(tmp_path, "raise SystemExit('cannot')"))
        with pytest.raises(CannotStart, match=r"(?s)exit code 1.*cannot"):
            supervisor.until(lambda: False, 30, "nothing")


def test_a_child_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path):
    program = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); open(os.environ['FILE'], 'w').write(f'{p.pid} ')\n"
        "time.sleep(600)"
    )
    stubborn = child(tmp_path, program)
    stubborn.start()
    grandchild = int(until(lambda: (tmp_path / "file").exists() and (tmp_path / "file").read_text(encoding="utf-8")))
    stubborn.stop(grace_seconds=0.2)
    assert stubborn.code == -signal.SIGKILL
    until(lambda: not Path(f"/proc/{grandchild}").exists() or ") Z " in Path(f"/proc/{grandchild}/stat").read_text(encoding="utf-8"))


def test_a_failed_errand_is_told_with_its_log(tmp_path):
    with Supervisor(lambda _: None) as supervisor:
        supervisor.finish(child(tmp_path, "pass"), 30)
        with pytest.raises(CannotStart, match="no luck"):
            supervisor.finish(child(tmp_path, "raise SystemExit('no luck')"), 30)


# --- doctor ------------------------------------------------------------------------------------------------------


def findings() -> dict[str, str]:
    found = examine()
    assert all(each.remedy for each in found if each.verdict != "ok")
    return {each.name: each.verdict for each in found}


@pytest.fixture
def quiet(monkeypatch):
    """Settings that point to where nobody is."""
    monkeypatch.setenv("CAPIBARA_EDGE__PORT", str(free_port("127.0.0.1")))
    monkeypatch.setenv("CAPIBARA_NATS__URL", f"nats://127.0.0.1:{free_port('127.0.0.1')}")


def test_doctor_fails_when_the_broker_that_was_named_is_away(quiet):
    assert findings()["broker"] == "fail"
    result = run("doctor")
    assert result.exit_code == 1
    assert "CAPIBARA_NATS__URL" in result.output


def test_doctor_tells_a_wrong_setting(monkeypatch):
    monkeypatch.setenv("CAPIBARA_NATS__REPLICAS", "9")
    assert findings()["settings"] == "fail"


def test_a_wrong_password_is_told_at_once_and_by_name(monkeypatch, broker, tmp_path):
    (tmp_path / "f.toml").write_text(fleets.fleet_toml([Served("one", "http://127.0.0.1:9")]), encoding="utf-8")
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(tmp_path / "f.toml"))
    for name, value in broker.environment().items():
        monkeypatch.setenv(name, value)
    assert run("streams", "apply").exit_code == 0
    assert "CF_OUT" in run("streams", "show").output
    assert findings()["streams"] == "ok"
    for command, role in (("apply", "PROVISIONER"), ("show", "OBSERVER")):
        monkeypatch.setenv(f"CAPIBARA_NATS__PASSWORDS__{role}", "wrong")
        result = run("streams", command)
        assert (result.exit_code, f"check CAPIBARA_NATS__PASSWORDS__{role}" in result.stderr) == (1, True)
    [found] = [each for each in examine() if each.name == "streams"]
    assert (found.verdict, found.remedy) == ("fail", "check CAPIBARA_NATS__PASSWORDS__OBSERVER")


def test_doctor_finds_the_edges_port_free_or_taken(monkeypatch, quiet):
    assert findings()["edge"] == "ok"
    with serving({"/": lambda _: web.Response(text="something else")}) as url:
        monkeypatch.setenv("CAPIBARA_EDGE__PORT", url.rpartition(":")[2])
        assert findings()["edge"] == "fail"


@pytest.mark.parametrize(
    ("body", "status", "verdict"), [({"ready": True}, 200, "ok"), ({"ready": False, "missing": {"x": "y"}}, 503, "warn")]
)
def test_doctor_asks_the_edge(monkeypatch, quiet, body, status, verdict):
    with serving({"/ready": lambda _: web.json_response(body, status=status)}) as url:
        monkeypatch.setenv("CAPIBARA_EDGE__PORT", url.rpartition(":")[2])
        assert findings()["edge"] == verdict
        assert local_get("127.0.0.1", int(url.rpartition(":")[2]), "/ready") == (status, json.dumps(body).encode())


def test_doctor_asks_the_engines_of_the_fleet(monkeypatch, quiet, tmp_path):
    with serving({"/v1/models": lambda _: web.json_response({"data": []})}) as up, serving({}) as lost:
        gone = f"http://127.0.0.1:{free_port('127.0.0.1')}/v1"
        served = [Served("up", f"{up}/v1"), Served("root", up), Served("lost", lost), Served("gone", gone)]
        (tmp_path / "f.toml").write_text(fleets.fleet_toml(served), encoding="utf-8")
        monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(tmp_path / "f.toml"))
        found = findings()
    assert {name: found[f"engine {name}"] for name in ("up", "root", "lost", "gone")} == {
        "up": "ok",
        "root": "ok",
        "lost": "warn",
        "gone": "fail",
    }


def test_doctor_tells_a_broken_fleet(monkeypatch, quiet, tmp_path):
    (tmp_path / "f.toml").write_text("experts = []", encoding="utf-8")
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(tmp_path / "f.toml"))
    assert findings()["fleet"] == "fail"


def test_doctor_keeps_a_password_of_the_fleet_to_itself(monkeypatch, quiet, tmp_path):
    (tmp_path / "f.toml").write_text(fleets.fleet_toml([Served("one", "http://user:hunter2@h:1/v1")]), encoding="utf-8")
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(tmp_path / "f.toml"))
    [found] = [each for each in examine() if each.name == "fleet"]
    assert (found.verdict, "api_key" in found.detail) == ("fail", True)
    assert not any("hunter2" in each.detail + each.remedy for each in examine())


def test_a_missing_browser_is_no_failure():
    assert (browser(lambda _: None).verdict, browser(lambda name: f"/bin/{name}").verdict) == ("warn", "ok")


def test_a_running_up_is_found_and_a_dead_one_is_not(monkeypatch, tmp_path):
    assert not state.adopt(tmp_path)
    facts = {"pid": os.getpid(), "environment": {"CAPIBARA_NATS__URL": "nats://x:1"}}
    (tmp_path / state.FILE).write_text(json.dumps(facts), encoding="utf-8")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert state.adopt(tmp_path)
    assert os.environ["CAPIBARA_NATS__URL"] == "nats://x:1"
    assert not state.adopt(tmp_path), "what the environment says goes first"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / state.FILE).write_text(json.dumps(facts | {"pid": ended.pid}), encoding="utf-8")
    assert state.running(tmp_path) is None


def test_what_up_was_told_is_told_on_but_no_secrets() -> None:
    def names(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, bool]]:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from names(inner, f"{prefix}{name.upper()}__")
            else:
                yield f"{prefix}{name.upper()}", "SecretStr" in str(inner) or name == "keys"

    every = dict(names(settings.Settings, "CAPIBARA_"))
    assert state.told_on(dict.fromkeys((*every, "PATH"), "x")) == {name: "x" for name, secret in every.items() if not secret}
    assert {name for name, secret in every.items() if secret} >= {"CAPIBARA_AUTH__KEYS", "CAPIBARA_KNOWLEDGE__POSTGRES"}


def test_a_port_is_free_until_somebody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
    assert is_free("127.0.0.1", port)


# --- dead letters, and erasing -----------------------------------------------------------------------------------

TURN, OTHER = ("01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F"[:-1] + each for each in "AB")
REQUEST = ChatRequest(messages=(ChatMessage(role="user", content="¿capital de Francia?"),))
ACME = {TENANT: "acme", PRINCIPAL: "ana"}


def letter(turn: str = TURN, stage: str = "router", body: str | None = None, detail: str = "no such thing") -> TurnFailed:
    asked = RouteTurn(turn=turn, request=REQUEST).model_dump_json()
    return TurnFailed(turn=turn, stage=stage, title="bad request", detail=detail, body=asked if body is None else body)


async def posted(known: settings.Settings, *letters: TurnFailed, headers: dict[str, str]) -> None:
    """Leave *letters* as a caller does."""
    async with wiring.connected(known, "caller") as client:
        for each in letters:
            await client.jetstream().publish(each.subject, each.model_dump_json().encode(), headers=headers)


def post(*letters: TurnFailed) -> None:
    asyncio.run(posted(settings.load(), *letters, headers=ACME))


def listed() -> list[dict]:
    return json.loads(run("dead", "list", "--json").stdout)


def held(stream: str) -> int:
    async def look() -> int:
        async with wiring.connected(settings.load(), "provisioner") as client:
            return (await client.jetstream().stream_info(stream)).state.messages

    return asyncio.run(look())


@pytest.fixture
def provisioned(monkeypatch, broker, tmp_path):
    """A broker with its streams, that the environment tells of; nobody works there."""
    (tmp_path / "f.toml").write_text(fleets.fleet_toml([Served("one", "http://127.0.0.1:9")]), encoding="utf-8")
    monkeypatch.setenv("CAPIBARA_FLEET__FILE", str(tmp_path / "f.toml"))
    for name, value in broker.environment().items():
        monkeypatch.setenv(name, value)
    assert run("streams", "apply").exit_code == 0
    return broker


def test_nothing_dead_says_so(provisioned):
    result = run("dead", "list")
    assert (result.exit_code, result.stdout) == (0, "no dead letters\n")
    assert listed() == []


def test_dead_letters_are_listed_the_newest_first(provisioned):
    post(letter(), letter(OTHER, "caller", detail="it\nbroke \x1b[2J [red]off[/]"))
    assert [(each["turn"], each["stage"], each["tenant"], each["principal"]) for each in listed()] == [
        (OTHER, "caller", "acme", "ana"),
        (TURN, "router", "acme", "ana"),
    ]
    shown = run("dead", "list").stdout
    assert shown.index(OTHER) < shown.index(TURN)
    assert "it broke \ufffd[2J [red]off[/]" in shown
    assert shown.rstrip().endswith("2 in all")
    some = run("dead", "list", "--limit", "1").stdout
    assert (TURN in some, "1 of 2" in some) == (False, True)


def test_a_dead_letter_is_shown_with_its_command(provisioned):
    post(letter(), letter(stage="caller", body='{"turn": "cut off \x1b[2J'))
    result = run("dead", "show", TURN)
    first, _, second = result.stdout.partition(f"\n\nturn      {TURN}")
    assert (result.exit_code, "\x1b" in result.stdout) == (0, False)
    for fact in ("tenant    acme", "principal ana", "title     bad request", "detail    no such thing", "stage     router"):
        assert fact in first
    assert json.loads(first.partition("command\n")[2]) == RouteTurn(turn=TURN, request=REQUEST).model_dump(mode="json")
    assert "¿capital de Francia?" in first
    assert "cut off \ufffd[2J" in second


@pytest.mark.parametrize("words", [["show", TURN], ["retry", TURN], ["show", "*"], ["retry", ">"]])
def test_a_turn_without_dead_letters_is_told(provisioned, words):
    post(letter(OTHER))
    result = run("dead", *words)
    assert (result.exit_code, f"no dead letter of {words[1]}" in result.stderr.replace("'", "")) == (1, True)
    assert len(listed()) == 1


def test_a_retry_is_asked_once(provisioned):
    post(letter())
    result = run("dead", "retry", TURN)
    [new] = re.findall(r"asked again as (\w{32})", result.stdout)
    assert result.exit_code == 0
    assert belongs(new, "acme")
    assert f"curl -N http://127.0.0.1:5001/api/chat/{new}/events -H 'Authorization: Bearer KEY'  (a key of acme)" in result.stdout
    assert (held("CF_WORK_ROUTER"), held("CF_DEAD")) == (1, 0)
    assert run("dead", "retry", TURN).exit_code == 1
    assert held("CF_WORK_ROUTER") == 1


def test_a_kept_letter_may_be_asked_again(provisioned):
    post(letter())
    assert [run("dead", "retry", TURN, "--keep").exit_code for _ in range(2)] == [0, 0]
    assert (held("CF_WORK_ROUTER"), held("CF_DEAD")) == (2, 1)


def test_of_several_letters_one_chooses(provisioned):
    call = CallExpert(turn=TURN, expert="one", bucket=1, request=REQUEST, passed=3)
    post(letter(), letter(stage="caller", body=call.model_dump_json()))
    unclear = run("dead", "retry", TURN)
    assert (unclear.exit_code, "2 dead letters (at caller, router)" in unclear.stderr) == (1, True)
    assert run("dead", "retry", TURN, "--stage", "caller", "--keep").stdout.count("asked again") == 1
    assert held("CF_WORK_ROUTER") == 1  # from the first step on
    assert run("dead", "retry", TURN, "--all").stdout.count("asked again") == 2
    assert (held("CF_WORK_ROUTER"), held("CF_DEAD")) == (3, 0)


def test_of_several_letters_none_is_asked_when_one_cannot_be(provisioned):
    post(letter(), letter(stage="caller", body='{"turn": "cut off'))
    result = run("dead", "retry", TURN, "--all")
    assert (result.exit_code, f"the letter of {TURN} at caller keeps no whole command" in result.stderr) == (1, True)
    assert (held("CF_WORK_ROUTER"), held("CF_DEAD")) == (0, 2)


def test_a_full_queue_keeps_what_was_not_asked(provisioned):
    async def narrow() -> None:
        async with wiring.connected(settings.load(), "provisioner") as client:
            config = (await client.jetstream().stream_info("CF_WORK_ROUTER")).config
            config.max_msgs = 1
            await client.jetstream().update_stream(config)

    asyncio.run(narrow())
    post(letter(), letter(OTHER))
    assert run("dead", "retry", TURN).exit_code == 0
    result = run("dead", "retry", OTHER)
    assert (result.exit_code, result.stderr.startswith("error: too many turns are waiting")) == (1, True)
    assert [each["turn"] for each in listed()] == [OTHER]


def test_dead_letters_need_their_roles(provisioned, monkeypatch):
    monkeypatch.setenv("CAPIBARA_NATS__PASSWORDS__OBSERVER", "wrong")
    assert "check CAPIBARA_NATS__PASSWORDS__OBSERVER" in run("dead", "list").stderr
    monkeypatch.setenv("CAPIBARA_NATS__PASSWORDS__PROVISIONER", "wrong")
    for words in (["dead", "retry", TURN], ["erase", TURN]):
        assert "check CAPIBARA_NATS__PASSWORDS__PROVISIONER" in run(*words).stderr


def test_erasing_removes_a_turn_and_says_how_much_that_was(provisioned):
    post(letter(), letter(stage="caller"), letter(OTHER))
    result = run("erase", TURN)
    assert (result.exit_code, result.stdout) == (0, f"{TURN}: 2 messages are gone\n")
    assert run("erase", TURN, "--yes").stdout == f"{TURN}: nothing was kept of it\n"
    assert [each["turn"] for each in listed()] == [OTHER]
    assert (run("erase", "*").exit_code, len(listed())) == (1, 1)


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_erasing_asks_first(provisioned, answer, left):
    post(letter())
    ours, theirs = pty.openpty()
    erasing = subprocess.Popen([*CAPIBARA, "erase", TURN], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(theirs)
    os.write(ours, answer)
    out, err = erasing.communicate(timeout=60)
    os.close(ours)
    assert b"for good?" in out + err
    assert (erasing.returncode, held("CF_DEAD")) == (left, left)


RECOVERS = """
[[answer]]
when = "capital"
text = "Paris."
fail = { before = 400, times = 1 }
"""


@pytest.fixture
async def recovering(broker, tmp_path):
    """Everything of `up`, with an engine that refuses the first question; the address of its door, and its settings."""
    (tmp_path / "s.toml").write_text(RECOVERS, encoding="utf-8")
    runner, url = await engine.serve(load_script(tmp_path / "s.toml"))
    (tmp_path / "f.toml").write_text(fleets.fleet_toml([Served("one", url)]), encoding="utf-8")
    known = settings_for(broker, tmp_path / "f.toml")
    await wiring.apply_streams(known)
    installation = Installation(known, url)
    try:
        for name in ("router", "caller"):
            await installation.start_worker(name)
        door = await installation.start_edge()
        facts = {"pid": os.getpid(), "url": door, "environment": broker.environment()}
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / state.FILE).write_text(json.dumps(facts), encoding="utf-8")
        yield door, known
    finally:
        await installation.aclose()
        await runner.cleanup()


async def capibara(*words: str) -> str:
    """What the command prints, as who has set nothing but has an `up` running."""
    done = await asyncio.to_thread(subprocess.run, [*CAPIBARA, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def answer_to(told: str) -> str:
    """The answer that the words of `dead retry` lead to."""
    [url] = re.findall(r"curl -N (\S+)", told)
    async with ClientSession() as session, session.get(url) as response:
        events = EventReader().feed(await response.read())
    assert events[-1].name == "done"
    return "".join(event.data["text"] for event in events if event.name == "token")


async def test_a_turn_that_failed_is_answered_when_it_is_retried(recovering):
    door, _ = recovering
    async with ClientSession() as session:
        body = {"messages": [{"role": "user", "content": "capital of France"}]}
        async with session.post(f"{door}/api/chat", json=body) as response:
            turn, events = response.headers["X-Capibara-Turn"], EventReader().feed(await response.read())
        assert events[-1].name == "error"
        found: list = []
        while not found:
            found = json.loads(await capibara("dead", "list", "--json"))
        assert [(each["turn"], each["stage"]) for each in found] == [(turn, "caller")]
        assert "capital of France" in await capibara("dead", "show", turn)
        told = await capibara("dead", "retry", turn)
        assert await answer_to(told) == "Paris."
        assert await capibara("dead", "list") == "no dead letters\n"
        [again] = re.findall(r"asked again as (\w+)", told)
        assert "messages are gone" in await capibara("erase", again)
        async with session.get(f"{door}/api/chat/{again}/events") as response:
            assert response.status in {404, 410}


async def test_what_the_router_gave_up_is_routed_when_it_is_retried(recovering):
    door, known = recovering
    await posted(known, letter(), headers={TENANT: "anonymous", PRINCIPAL: "anonymous:127.0.0.1"})
    async with (
        ClientSession() as session,
        session.post(f"{door}/api/chat", json={"messages": [{"role": "user", "content": "capital"}]}) as first,
    ):
        await first.read()  # the one that the engine refuses
    assert await answer_to(await capibara("dead", "retry", TURN)) == "Paris."


# --- chat --------------------------------------------------------------------------------------------------------


def sse(name: str, number: int | None = None, **data) -> bytes:
    head = f"id: {number}\n" if number else ""
    return f"{head}event: {name}\ndata: {json.dumps({'turn': 'T1', **data})}\n\n".encode()


class FakeEdge:
    """Answers a turn with *parts*, one list of chunks a connection; at ``BREAK`` it hangs up, at ``HANG`` it waits."""

    BREAK, HANG = b"BREAK", b"HANG"

    def __init__(self, *parts: list[bytes]) -> None:
        self._parts = iter(parts)
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.resumed: list[tuple[str, str | None]] = []
        self.cancelled: list[str] = []

    @property
    def routes(self) -> dict[str, Callable]:
        return {"POST /api/chat": self.open, "GET /api/chat/{turn}/events": self.resume, "DELETE /api/chat/{turn}": self.cancel}

    async def open(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        return await self.answer(request)

    async def resume(self, request: web.Request) -> web.StreamResponse:
        self.resumed.append((request.match_info["turn"], request.headers.get("Last-Event-ID")))
        return await self.answer(request)

    async def cancel(self, request: web.Request) -> web.Response:
        self.cancelled.append(request.match_info["turn"])
        return web.Response(status=202)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in next(self._parts):
            if chunk == self.BREAK:
                request.transport.abort()
            elif chunk == self.HANG:
                await asyncio.sleep(600)
            else:
                await response.write(chunk)
        return response


ROUTED = sse("routed", 1, model_id="small", route_name="default")
DONE = sse("done", 9, finish_reason="stop", model_id="small", timings={})


def test_chat_shows_text_on_stdout_and_the_rest_on_stderr():
    edge = FakeEdge(
        [sse("turn"), ROUTED, sse("token", 2, text="Hola, "), sse("surprise", 3), sse("token", 4, text="mundo", reasoning="hm"), DONE]
    )
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url, "--model", "small", "--key", "k1")
    assert (result.exit_code, result.stdout) == (0, "Hola, mundo\n")
    assert "small" in result.stderr
    assert "hm" in result.stderr
    assert edge.asked == [{"messages": [{"role": "user", "content": "hi"}], "model": "small"}]
    assert edge.keys == ["Bearer k1"]


def test_chat_shows_what_the_answer_cites():
    sources = [{"n": 1, "title": "Agua\x1b[2J", "url": "agua.md", "date": "2026-01-02"}, {"n": 2, "title": "Comida", "url": "comida.md"}]
    cited = sse("citations", 4, cited=[1], unknown=[9])
    edge = FakeEdge([sse("turn"), sse("sources", 2, sources=sources), sse("token", 3, text="Nadan [1] y vuelan [9]."), cited, DONE])
    with serving(edge.routes) as url:
        result = run("chat", "¿nadan?", "--url", url)
    assert result.stdout == "Nadan [1] y vuelan [9].\n"
    assert "[1] Agua" in result.stderr
    assert "agua.md · 2026-01-02" in result.stderr
    assert "[9] is none of the sources" in result.stderr
    assert "Comida" not in result.stderr
    assert "\x1b" not in result.stderr


def test_chat_says_why_there_are_no_sources():
    problem = sse("sources", 2, sources=[], problem="the passages cannot be reached")
    edge = FakeEdge([sse("turn"), problem, sse("token", 3, text="Hola"), DONE])
    with serving(edge.routes) as url:
        assert "without sources: the passages cannot be reached" in run("chat", "hi", "--url", url).stderr


def test_chat_reads_the_question_from_a_pipe():
    edge = FakeEdge([sse("turn"), DONE])
    with serving(edge.routes) as url:
        assert run("chat", "--url", url, input="from a pipe\n").exit_code == 0
    assert edge.asked[0]["messages"][0]["content"] == "from a pipe"
    assert run("chat", input="").exit_code == 2


@pytest.mark.parametrize("end", [FakeEdge.BREAK, b": the stream just ends\n\n"])
def test_chat_resumes_after_the_last_whole_batch(end):
    first = [sse("turn"), sse("token", 2, text="a"), sse("token", text="b"), end]
    edge = FakeEdge(first, [sse("token", text="b"), sse("token", 3, text="c"), end], [sse("token", 4, text="d"), DONE])
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.exit_code, result.stdout) == (0, "abcd\n")
    assert edge.resumed == [("T1", "2"), ("T1", "3")]


def test_chat_gives_up_when_nothing_can_be_resumed(monkeypatch):
    monkeypatch.setattr("capibara_flow.cli.chat.RESUMES", 2)
    edge = FakeEdge([sse("turn", 1), FakeEdge.BREAK], [FakeEdge.BREAK], [FakeEdge.BREAK], [FakeEdge.BREAK])
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.exit_code, "could not be resumed" in result.stderr) == (1, True)


def test_chat_ends_with_1_on_an_error_event():
    edge = FakeEdge([sse("turn"), sse("token", 1, text="half"), sse("error", 2, title="engine broke", status=502, detail="it stalled")])
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "half\n", "error: engine broke: it stalled\n")


def test_chat_shows_a_reset():
    edge = FakeEdge([sse("turn"), sse("token", 1, text="wrong"), sse("reset", 2, reason="again"), sse("token", 3, text="right"), DONE])
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.stdout, "starts again: again" in result.stderr) == ("wrong\nright\n", True)


def test_chat_tells_what_it_waits_for_and_leaves_out_what_it_does_not_know():
    waiting, unknown = sse("waiting", 2, reason="the engine is busy", attempt=2), sse("continued", 3, how="skip", expert="a", attempt=3)
    edge = FakeEdge([sse("turn"), sse("token", 1, text="one"), waiting, unknown, sse("token", 4, text=" two"), DONE])
    with serving(edge.routes) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.stdout, result.stderr) == ("one two\n", "waiting: the engine is busy\n")


def test_chat_tells_refusals():
    details = {"title": "unauthorized", "detail": "no key", "status": 401}
    with serving({"POST /api/chat": lambda _: web.json_response(details, status=401)}) as url:
        result = run("chat", "hi", "--url", url)
    assert (result.exit_code, result.stderr) == (1, "error: unauthorized: no key (give a key with --key or CAPIBARA_KEY)\n")
    with serving({}) as url:
        assert "404" in run("chat", "hi", "--url", url).stderr
    nobody = run("chat", "hi", "--url", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    assert (nobody.exit_code, "capibara up" in nobody.stderr) == (1, True)


def test_ctrl_c_cancels_the_turn():
    edge = FakeEdge([sse("turn"), sse("token", 1, text="an endless"), FakeEdge.HANG])
    with serving(edge.routes) as url:
        asking = subprocess.Popen([*CAPIBARA, "chat", "hi", "--url", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert asking.stdout.read(10) == b"an endless"
        asking.send_signal(signal.SIGINT)
        _, errors = asking.communicate(timeout=30)
    assert (asking.returncode, edge.cancelled) == (130, ["T1"])
    assert b"Traceback" not in errors


def test_who_stops_reading_cancels_the_turn_without_a_word():
    edge = FakeEdge([sse("turn"), sse("token", 1, text="an endless"), FakeEdge.HANG])
    ours, theirs = os.pipe()
    os.close(ours)
    with serving(edge.routes) as url:
        asking = subprocess.Popen([*CAPIBARA, "chat", "hi", "--url", url], stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        _, errors = asking.communicate(timeout=30)
    assert (asking.returncode, errors, edge.cancelled) == (128 + signal.SIGPIPE, b"", ["T1"])


def test_a_conversation_is_kept_until_new():
    answers = [[sse("turn"), sse("token", 1, text=f"answer {n}"), DONE] for n in range(3)]
    edge = FakeEdge(*answers)
    ours, theirs = pty.openpty()
    with serving(edge.routes) as url:
        talking = subprocess.Popen([*CAPIBARA, "chat", "--url", url], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.close(theirs)
        os.write(ours, b"one\ntwo\n/new\n/model big\nthree\n/exit\n")
        out, _ = talking.communicate(timeout=30)
        with suppress(OSError):
            os.close(ours)
    assert talking.returncode == 0
    assert b"answer 2" in out
    assert [[each["content"] for each in asked["messages"]] for asked in edge.asked] == [["one"], ["one", "answer 0", "two"], ["three"]]
    assert [asked.get("model") for asked in edge.asked] == [None, None, "big"]


@given(st.lists(st.integers(1, 200)))
def test_events_are_read_however_the_bytes_are_cut(cuts):
    wire = b': hello\r\n\r\nid: 7\r\nevent: token\r\ndata: {"text":\r\ndata: "\xc3\xb1"}\r\n\r\nevent:done\ndata:{}\n\nevent: lost\ndata: {'
    reader, found, at = EventReader(), [], 0
    for cut in [*cuts, len(wire)]:
        found += reader.feed(wire[at : at + cut])
        at += cut
    assert found == [ServerEvent("token", {"text": "ñ"}, "7"), ServerEvent("done", {})]
