"""Other people's proxies in front of the same engine, each installed into an environment of its own, outside the tree."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from capibara_flow.cli.supervisor import free_port

from .system import System, started

_INSTALL_SECONDS = 900


class NotInstalled(RuntimeError):
    """A peer cannot be installed here; the message tells why."""


@dataclass(frozen=True)
class Peer:
    """A proxy: pip installs *requirement*; *command* starts *program* before an engine (port, Prometheus port, home, engine's URL)."""

    name: str
    requirement: str
    program: str
    command: Callable[[int, int, Path, str], list[str]]
    health: str
    environment: dict[str, str]

    @property
    def folder(self) -> Path:
        """Its environment; `CAPIBARA_BENCH_CACHE` says where all of them are."""
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "capibara-bench")
        return Path(os.environ.get("CAPIBARA_BENCH_CACHE") or usual, self.requirement.replace("[proxy]", "").replace("==", "-"))

    def install(self) -> Path:
        """Its program, which is installed first if it is not there yet; raises ``NotInstalled``."""
        complete = self.folder / "complete"
        if not complete.exists():
            python = self.folder / "bin" / "python"
            _run([sys.executable, "-m", "venv", str(self.folder)])
            _run([str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", self.requirement])
            complete.touch()
        return self.folder / "bin" / self.program

    @contextlib.contextmanager
    def before(self, engine: str) -> Iterator[System]:
        """It runs in front of *engine* for the length of a block; raises ``NotInstalled`` and ``DidNotStart``."""
        program = self.install()
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as home:
            port = free_port("127.0.0.1")
            command = [str(program), *self.command(port, free_port("127.0.0.1"), Path(home), engine)]
            with started(self.name, command, Path(home), {**self.environment, "PYTHONPATH": ""}) as running:
                yield System(self.name, running.until_healthy(f"http://127.0.0.1:{port}", self.health), running.tree, "mock")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    if done.returncode:
        raise NotInstalled((done.stderr.strip().splitlines() or ["no reason given"])[-1])


def _litellm(port: int, _: int, home: Path, engine: str) -> list[str]:
    config = home / "config.yaml"
    config.write_text(
        f'model_list:\n  - model_name: mock\n    litellm_params: {{model: openai/mock, api_base: "{engine}/v1", api_key: none}}\n'
        "litellm_settings: {telemetry: false}\n"
    )
    return ["--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def _vllm_router(port: int, prometheus: int, _: Path, engine: str) -> list[str]:
    words = ["--worker-urls", engine, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    words += ["--prometheus-port", str(prometheus), "--worker-startup-check-interval", "1"]
    # Nothing in front of the engine is to refuse what a scenario asks.
    return [*words, "--max-concurrent-requests", "4096", "--queue-size", "4096"]


#: Without a database, a key to check or callbacks: as cheap as each can be.
PEERS = (
    Peer(
        "litellm",
        "litellm[proxy]==1.106.0",
        "litellm",
        _litellm,
        "/health/liveliness",
        {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        },
    ),
    Peer("vllm-router", "vllm-router==0.1.17", "vllm-router", _vllm_router, "/health", {}),
)
