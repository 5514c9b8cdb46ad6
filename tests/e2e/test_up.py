"""``capibara up`` as a person meets it: everything starts, answers, recovers, and leaves nothing behind."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from tests.webserver import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CAPIBARA = [sys.executable, "-m", "capibara_flow"]
WORDS = ["The ", "quick ", "capybara ", "swims."]


async def completions(request: web.Request) -> web.StreamResponse:
    """An engine that says the same to everybody, in OpenAI's dialect."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    deltas = [{"delta": {"content": word}, "finish_reason": None} for word in WORDS] + [{"delta": {}, "finish_reason": "stop"}]
    for each in deltas:
        chunk = {"id": "c", "object": "chat.completion.chunk", "model": "script", "choices": [{"index": 0, **each}]}
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
def engine() -> Iterator[str]:
    models = {"object": "list", "data": [{"id": "script", "object": "model", "owned_by": "tests"}]}
    with serving({"/v1/models": lambda _: web.json_response(models), "POST /v1/chat/completions": completions}) as url:
        yield f"{url}/v1"


def until(condition: Callable[[], object], seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def gone(process: psutil.Process) -> bool:
    try:
        # Nobody may reap orphans where process 1 is a plain command.
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Up:
    """A running ``capibara up``."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.state, self.ready, self.log = folder / "state", folder / "ready.json", folder / "up.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CAPIBARA_")}
        self.environment = environment | {"CAPIBARA_STATE": str(self.state)} | variables
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*CAPIBARA, "up", "--port", "0", "--ready-file", str(self.ready), *words],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.supervisor = psutil.Process(self.process.pid)
        self.family: set[psutil.Process] = set()

    def facts(self) -> dict:
        """What the ready file says, once it is there and ours."""
        until(lambda: self.is_ready() or self.process.poll() is not None)
        assert self.is_ready(), self.said()
        self.look()
        return json.loads(self.ready.read_text(encoding="utf-8"))

    def is_ready(self) -> bool:
        return self.ready.exists() and json.loads(self.ready.read_text(encoding="utf-8"))["pid"] == self.process.pid

    def look(self) -> None:
        """Remember who descends from it now."""
        self.family |= set(self.supervisor.children(recursive=True))

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def run(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*CAPIBARA, *words], env=self.environment, check=False, capture_output=True, text=True, timeout=120)

    def ask(self, url: str, question: str = "hi") -> str:
        done = self.run("chat", question, "--url", url)
        assert done.returncode == 0, done.stderr + self.said()
        return done.stdout

    def routed(self, url: str, query: str) -> dict:
        """Who would answer *query*."""
        body, headers = json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/router/test", body, headers), timeout=60) as response:
            return json.load(response)

    def all_gone(self) -> None:
        """Wait until nobody of the family is left."""
        until(lambda: all(gone(each) for each in self.family))


@contextmanager
def running(folder: Path, *words: str, **variables: str) -> Iterator[Up]:
    up = Up(folder, *words, **variables)
    try:
        yield up
    finally:
        up.process.terminate()
        up.process.wait(60)


def test_starts_answers_and_ends_in_order(tmp_path, engine):
    with running(tmp_path, "--engine", engine) as up:
        facts = up.facts()
        assert facts["models"] == ["script"]
        assert facts["pids"].keys() == {"broker", "workers", "edge"}
        assert up.ask(facts["url"]).strip() == "".join(WORDS)
        command = next(line for line in up.said().splitlines() if "curl -N" in line)
        for address in facts["metrics"]:
            with urllib.request.urlopen(address, timeout=60) as response:
                assert b"capibara_" in response.read()
        url, body = re.search(r"curl -N (\S+) .*-d '(.*)'", command).groups()
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            stream = response.read().decode()
        assert "event: done" in stream
        shown = up.run("streams", "show")
        assert (shown.returncode, "CF_OUT" in shown.stdout) == (0, True), shown.stderr
        examined = up.run("doctor")
        assert examined.returncode == 0, examined.stdout + examined.stderr
        up.look()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0, up.said()
        up.all_gone()
        assert not up.ready.exists()
        assert not (up.state / "running.json").exists()
        assert "Traceback" not in up.said() + "".join(log.read_text(encoding="utf-8") for log in (up.state / "logs").iterdir())
        assert (up.state / "fleet.toml").stat().st_mode & 0o077 == 0


def test_nothing_outlives_a_killed_supervisor(tmp_path, engine):
    with running(tmp_path, "--engine", engine) as up:
        up.facts()
        assert len(up.family) >= 3
        up.process.kill()
        up.all_gone()
    with running(tmp_path, "--engine", engine) as again:
        assert again.ask(again.facts()["url"]).strip() == "".join(WORDS)


def test_whatever_is_killed_comes_back(tmp_path, engine):
    with running(tmp_path, "--engine", engine) as up:
        facts = up.facts()
        for name in ("workers", "edge", "broker"):
            os.kill(facts["pids"][name], signal.SIGKILL)
            until(lambda name=name: f"{name} runs again" in up.said())
            told = [up.facts(), json.loads((up.state / "running.json").read_text(encoding="utf-8"))]
            for pids in (each["pids"] for each in told):
                assert pids.keys() == facts["pids"].keys()
                assert pids[name] != facts["pids"][name]
                assert all(psutil.pid_exists(pid) for pid in pids.values())
            up.look()
            until(lambda: up.run("chat", "hi", "--url", facts["url"]).stdout.strip() == "".join(WORDS))
        up.look()
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(60) == 0, up.said()
        up.all_gone()


def test_together_one_process_serves_comes_back_and_ends_in_order(tmp_path, engine):
    with running(tmp_path, "--engine", engine, "--together") as up:
        facts = up.facts()
        assert facts["pids"].keys() == {"broker", "together"}
        assert up.ask(facts["url"]).strip() == "".join(WORDS)
        [metrics] = facts["metrics"]
        with urllib.request.urlopen(metrics, timeout=60) as response:
            told = response.read()
        assert b"capibara_tokens_total{" in told  # the caller's
        assert b"capibara_http_responses_total{" in told  # the edge's
        examined = up.run("doctor")
        assert examined.returncode == 0, examined.stdout + examined.stderr
        os.kill(facts["pids"]["together"], signal.SIGKILL)
        until(lambda: "together runs again" in up.said())
        assert up.facts()["pids"]["together"] != facts["pids"]["together"]
        until(lambda: up.run("chat", "hi", "--url", facts["url"]).stdout.strip() == "".join(WORDS))
        up.look()
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(60) == 0, up.said()
        up.all_gone()
        log = (up.state / "logs" / "together.log").read_text(encoding="utf-8")
        assert "workers_stopping" in log  # it came to its end by itself
        assert "Traceback" not in up.said() + log


def test_a_part_that_cannot_start_is_told_and_the_rest_ended(tmp_path):
    (tmp_path / "fleet.toml").write_text('[[experts]]\nname = "a"\nurls = ["http://127.0.0.1:9"]\nconcurrency = 0\n', encoding="utf-8")
    with running(tmp_path, "--fleet", str(tmp_path / "fleet.toml")) as up:
        until(lambda: up.process.poll() is not None)
        assert up.process.returncode == 1
        assert "concurrency" in up.said()
        assert "Traceback" not in up.said()


@pytest.mark.model
def test_the_local_model_answers_and_nothing_outlives_a_killed_supervisor(tmp_path):
    if importlib.util.find_spec("xllamacpp") is None:  # imported beside all that is loaded here it might end the process
        pytest.skip("xllamacpp is not installed")
    with running(tmp_path) as up:
        facts = up.facts()
        assert facts["models"] == ["smollm2-135m", "smollm2-135m-creative"]
        assert up.ask(facts["url"], "Say hello.").strip()
        creative, factual = (up.routed(facts["url"], text) for text in ("Escribe un poema sobre Python", "What is the capital of Peru?"))
        assert (creative["route_name"], creative["model_id"]) == ("creative_writing", "smollm2-135m-creative")
        assert (factual["route_name"], factual["model_id"]) == ("quick_facts", "smollm2-135m")
        asked = up.run("chat", "What is the capital of France?", "--url", facts["url"])
        assert (asked.returncode, asked.stdout.strip() != "") == (0, True), asked.stderr
        assert "ended by" not in asked.stderr
        assert "not answer quality" in up.said()
        up.look()
        up.process.kill()
        up.all_gone()


def test_a_passphrase_encrypts_what_it_keeps_and_is_told_to_the_broker_only(tmp_path, engine):
    def words_kept() -> list[Path]:
        return [path for path in (up.state / "nats" / "jetstream").rglob("*") if path.is_file() and b"capybara" in path.read_bytes()]

    with running(tmp_path, "--engine", engine) as up:
        up.ask(up.facts()["url"])
        until(words_kept)
    with running(tmp_path, "--engine", engine, CAPIBARA_NATS__STORE_KEY="one", CAPIBARA_NATS__SYNC="always") as up:
        facts = up.facts()
        assert "quick" in up.ask(facts["url"])
        assert not words_kept()
        told = [each.pid for each in up.family if not gone(each) and "one" in each.environ().get("CAPIBARA_NATS__STORE_KEY", "")]
        assert told == [facts["pids"]["broker"]]
    with running(tmp_path, "--engine", engine, CAPIBARA_NATS__STORE_KEY="another") as up:
        assert up.process.wait(60) == 1
        assert "is encrypted, with another passphrase" in up.said()
    with running(tmp_path, "--engine", engine, CAPIBARA_NATS__SYNC="sometimes") as up:
        assert up.process.wait(60) == 1
        assert "CAPIBARA_NATS__SYNC" in up.said()
