"""The embedded broker: real servers on free ports."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import nats
import pytest

from capibara_flow import wiring
from capibara_flow.errors import CannotStart
from capibara_flow.processes.leash import leashed
from capibara_flow.processes.logs import fresh_log
from capibara_flow.runtime import embedded
from capibara_flow.runtime.answers import FencedAnswers
from capibara_flow.runtime.embedded import EmbeddedBroker, greeting
from capibara_flow.runtime.output import stored
from capibara_flow.settings import FleetSettings, NatsSettings, Settings
from tests.conftest import ROOT
from topics.output import Done, Token

CONFIG = """
port: 4222
jetstream { max_file: 1GB }
authorization { users: [
  { user: edge, password: $CAPIBARA_NATS__PASSWORDS__EDGE, permissions { publish: "allowed.>", subscribe: ">" } }
  { user: provisioner, password: $CAPIBARA_NATS__PASSWORDS__PROVISIONER }
] }
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "nats.conf"
    path.write_text(CONFIG, encoding="utf-8")
    return path


#: Like CONFIG, with a store as the project's has it.
STORE = CONFIG.replace("max_file: 1GB", "max_file: 1GB, cipher: chachapoly, key: $CAPIBARA_NATS__STORE_KEY, sync: $CAPIBARA_NATS__SYNC")
SECRET = b"capybaras keep no secrets"


def until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return True
    # Nobody may reap orphans where process 1 is a plain command.
    return status.rpartition(")")[2].split()[0] == "Z"


def files_with(words: bytes, folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and words in path.read_bytes()]


async def connect(broker: EmbeddedBroker, role: str = "provisioner", **more):
    return await nats.connect(broker.url, user=role, password=broker.passwords[role], allow_reconnect=False, **more)


async def test_takes_a_free_port_and_serves_jetstream_to_those_with_a_password(tmp_path, config):
    with EmbeddedBroker(tmp_path / "store", config=config) as broker:
        assert broker.port not in (0, 4222)
        assert greeting("127.0.0.1", broker.port)["jetstream"]
        client = await connect(broker)
        await client.jetstream().add_stream(name="S", subjects=["s"])
        await client.close()
        with pytest.raises(nats.errors.Error):
            await nats.connect(broker.url, user="edge", password="wrong", allow_reconnect=False)
    assert not broker.alive


def test_makes_a_password_for_each_role_of_the_configuration(tmp_path, config):
    first, second = (EmbeddedBroker(tmp_path / "store", config=config) for _ in range(2))
    assert set(first.passwords) == {"edge", "provisioner"}
    assert len({*first.passwords.values(), *second.passwords.values()}) == 4
    assert all(password[0].isalpha() for password in first.passwords.values())
    assert first.environment("edge", "nobody") == {
        "CAPIBARA_NATS__URL": first.url,
        "CAPIBARA_NATS__PASSWORDS__EDGE": first.passwords["edge"],
    }


async def test_the_projects_own_configuration_starts(tmp_path):
    with EmbeddedBroker(tmp_path / "store") as broker:
        client = await connect(broker, inbox_prefix="_INBOX_provisioner")
        assert (await client.jetstream().account_info()).streams == 0
        await client.close()


async def test_restarts_on_the_same_port_with_the_same_data(tmp_path, config):
    with EmbeddedBroker(tmp_path / "store", config=config) as broker:
        client, url, old = await connect(broker), broker.url, broker.pid
        await client.jetstream().add_stream(name="S", subjects=["s"])
        await client.jetstream().publish("s", b"kept")
        broker.kill()
        assert not broker.alive
        broker.restart()
        assert (broker.url, broker.pid != old) == (url, True)
        again = await connect(broker)
        assert (await again.jetstream().get_msg("S", 1)).data == b"kept"
        await again.close()


async def say(broker: EmbeddedBroker) -> None:
    """Let a caller answer with SECRET, in the project's own streams."""
    settings = Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords))
    await wiring.apply_streams(settings.model_copy(update={"fleet": FleetSettings(file=ROOT / "deploy" / "fleets" / "example.toml")}))
    async with wiring.connected(settings, "caller") as client:
        answers = FencedAnswers(client, "test")
        await answers.start()
        async with answers.open("T1", "main") as answer:
            await answer.finish(Token(turn="T1", text=SECRET.decode()), Done(turn="T1", finish_reason="stop", model_id="phi"))
        await answers.stop()


async def heard(broker: EmbeddedBroker) -> bytes:
    """What the project's output stream has of that answer."""
    settings = Settings(nats=NatsSettings(url=broker.url, passwords=broker.passwords))
    async with wiring.connected(settings, "observer") as client:
        return b"".join(each.data for each in await stored(client, "cf.out.T1.data.main", 0))


async def test_without_a_key_anybody_can_read_the_store(tmp_path):
    with EmbeddedBroker(tmp_path / "store") as broker:
        await say(broker)
        assert SECRET in await heard(broker)
    assert files_with(SECRET, tmp_path)


@pytest.mark.parametrize("key", ["a passphrase", "4711", 'of "all" \\ kinds, ñ $HOME # {', "two\nlines"])
async def test_with_a_key_no_file_holds_words_of_an_answer_and_the_same_key_reads_them(tmp_path, key):
    with EmbeddedBroker(tmp_path / "store", store_key=key) as broker:
        await say(broker)
        broker.kill()
        assert not files_with(SECRET, tmp_path)
        broker.restart()
        assert SECRET in await heard(broker)
    assert not files_with(SECRET, tmp_path)
    with EmbeddedBroker(tmp_path / "store", store_key=key) as broker:
        assert SECRET in await heard(broker)
    assert not files_with(SECRET, tmp_path)


@pytest.mark.parametrize(("other", "why"), [("another", "with another passphrase than that of"), ("", "and there is no")])
async def test_without_its_key_a_store_is_refused_and_left_as_it_is(tmp_path, other, why):
    with EmbeddedBroker(tmp_path / "store", store_key="one") as broker:
        await say(broker)
    stranger = EmbeddedBroker(tmp_path / "store", store_key=other)
    with pytest.raises(CannotStart, match=f"is encrypted, {why} CAPIBARA_NATS__STORE_KEY: set it to"), stranger:
        pass
    assert not stranger.alive
    with EmbeddedBroker(tmp_path / "store", store_key="one") as broker:
        assert SECRET in await heard(broker)


async def test_a_key_makes_a_store_secret_that_was_not(tmp_path):
    with EmbeddedBroker(tmp_path / "store") as broker:
        await say(broker)
    with EmbeddedBroker(tmp_path / "store", store_key="one") as broker:
        assert SECRET in await heard(broker)
    assert not files_with(SECRET, tmp_path)


@pytest.mark.parametrize("asked", [{"store_key": "one"}, {"sync": "always"}])
def test_a_configuration_without_these_settings_is_no_place_for_them(tmp_path, config, asked):
    with pytest.raises(CannotStart, match=r"CAPIBARA_NATS__\w+ would have no effect"):
        EmbeddedBroker(tmp_path / "store", config=config, **asked)


@pytest.mark.parametrize(("sync", "always", "seconds"), [("2m", False, 120), ("90s", False, 90), ("always", True, 120)])
def test_says_when_to_force_what_is_stored_to_the_disk(tmp_path, config, sync, always, seconds):
    config.write_text(f"http: 127.0.0.1:-1\n{STORE}", encoding="utf-8")
    with EmbeddedBroker(tmp_path / "store", config=config, sync=sync) as broker:
        ports = json.loads((broker.folder / f"nats-server_{broker.pid}.ports").read_text(encoding="utf-8"))
        with urllib.request.urlopen(f"{ports['monitoring'][0]}/jsz", timeout=10) as answer:
            told = json.load(answer)["config"]
    assert told.get("sync_always", False) == always
    assert told["sync_interval"] == seconds * 1_000_000_000


def test_a_second_broker_on_one_store_is_refused(tmp_path, config):
    with EmbeddedBroker(tmp_path / "store", config=config) as broker:
        second = EmbeddedBroker(tmp_path / "store", config=config)
        with pytest.raises(CannotStart, match="another broker uses"):
            second.start()
        assert broker.alive
    with EmbeddedBroker(tmp_path / "store", config=config) as third:
        assert third.alive


def test_dies_with_its_parent_and_frees_the_store(tmp_path, config):
    program = (
        "import sys, time; from pathlib import Path; from capibara_flow.runtime.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker(Path(sys.argv[1]), config=Path(sys.argv[2])); broker.start()\n"
        "print(broker.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "store"), str(config)], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    until(lambda: gone(pid))
    with EmbeddedBroker(tmp_path / "store", config=config) as successor:
        assert successor.alive


def test_a_store_whose_broker_outlives_its_parent_stays_locked(tmp_path, config):
    with EmbeddedBroker(tmp_path / "store", config=config) as broker:
        # The parent's own hold on the lock goes, as it would with its death; the server's is left.
        broker._lock.close()
        with pytest.raises(CannotStart, match="another broker uses"):
            EmbeddedBroker(tmp_path / "store", config=config).start()


def test_a_broken_configuration_is_told_with_the_servers_words(tmp_path, config):
    config.write_text("port: {", encoding="utf-8")
    with pytest.raises(CannotStart, match=r"did not start; its log(.|\n)*nats-server"), EmbeddedBroker(tmp_path / "store", config=config):
        pass


def test_a_missing_binary_is_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("NATS_SERVER", str(tmp_path / "none"))
    with pytest.raises(CannotStart, match="NATS_SERVER"):
        embedded.find_server()
    monkeypatch.delenv("NATS_SERVER")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CannotStart, match="pip install"):
        embedded.find_server()


def test_greeting_tells_a_broker_from_another_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        impostor = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail.example\r\n"))
        impostor.start()
        with pytest.raises(ValueError, match="does not speak NATS"):
            greeting("127.0.0.1", port)
        impostor.join()
    with pytest.raises(ConnectionRefusedError):
        greeting("127.0.0.1", port)


def test_logs_of_the_run_before_are_kept(tmp_path):
    log = tmp_path / "x.log"
    for words in (b"first", b"second"):
        with fresh_log(log) as file:
            file.write(words)
    assert (log.read_bytes(), (tmp_path / "x.log.1").read_bytes()) == (b"second", b"first")


def test_a_leashed_command_that_does_not_exist_exits_with_127():
    done = subprocess.run(leashed(["no-such-program"]), check=False, capture_output=True, text=True)
    assert (done.returncode, "no-such-program" in done.stderr) == (127, True)


def test_a_child_whose_parent_is_already_gone_does_not_begin():
    command = leashed([sys.executable, "-c", "print('began')"])
    command[command.index(str(os.getpid()))] = "1"
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
