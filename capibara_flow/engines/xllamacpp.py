"""llama.cpp's server in a process of its own, by the package ``xllamacpp``.

``python -m capibara_flow.engines.xllamacpp --model FILE.gguf --alias NAME`` loads the model, serves llama-server's HTTP API on
127.0.0.1, writes ``{"url", "pid"}`` to its ``--ready-file``, if it has one, once ``/health`` answers 200, and ends with SIGTERM,
SIGINT, or its parent. Only who has the key in ``LLAMA_API_KEY`` is answered, where there is one, as with llama-server itself.
"""

import argparse
import ctypes
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Slots share the context: with more of them a long answer would not fit into its part.
CONTEXT_TOKENS, SLOTS, CACHE_MIB = 8192, 2, 256
HEALTH_SECONDS = 600
_PR_SET_PDEATHSIG = 1


def command(model: Path, alias: str, ready_file: Path, port: int = 0) -> list[str]:
    """The command line that serves *model* as *alias* and reports to *ready_file*; port 0 finds a free one."""
    options = ["--model", str(model), "--alias", alias, "--port", str(port), "--ready-file", str(ready_file)]
    return [sys.executable, "-m", "capibara_flow.engines.xllamacpp", *options]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a message when the model cannot be served."""
    options = _parser().parse_args(arguments)
    if options.ready_file:
        options.ready_file.unlink(missing_ok=True)
    _end_with_parent()
    print(f"loading {options.alias} ({options.model.stat().st_size / 1e6:.0f} MB)", flush=True)
    started = time.monotonic()
    try:
        server = _load(options)
    except RuntimeError as error:
        sys.exit(f"{options.model}: {error}")
    # Only now: while it loads, the library keeps Python from running, and the system's own handling ends us at once.
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    print(f"loaded in {time.monotonic() - started:.1f} s", flush=True)
    _await_health(server.listening_address, stop)
    if options.ready_file:
        _report(options.ready_file, server.listening_address)
    print(f"{options.alias} is served at {server.listening_address}", flush=True)
    stop.wait()
    if options.ready_file:
        options.ready_file.unlink(missing_ok=True)
    # The destructor stops the server and its threads.
    del server
    print("stopped", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m capibara_flow.engines.xllamacpp", description="Serve a GGUF model with llama.cpp.")
    parser.add_argument("--model", type=_file, required=True)
    parser.add_argument("--alias", required=True, help="the model's name on the API")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS, help="tokens, shared by all slots")
    parser.add_argument("--slots", type=int, default=SLOTS, help="answers at the same time")
    parser.add_argument("--threads", type=int, default=-1, help="for computing; -1: as many as llama.cpp thinks best")
    parser.add_argument("--sleep-idle-seconds", type=int, default=-1, help="give most memory back when idle for so long; -1: never")
    parser.add_argument("--verbosity", type=int, default=1, help="of llama.cpp on standard error: 0 to 5")
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def _load(options: argparse.Namespace) -> Any:
    # OpenMP reads it when the library is loaded; threads that spin while they wait starve a busy machine.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import xllamacpp  # noqa: PLC0415  not before the environment is set, and only where an engine is wanted

    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias}
    params.port = options.port
    params.n_ctx, params.n_parallel = options.context, options.slots
    params.cache_ram_mib = CACHE_MIB
    params.sleep_idle_seconds = options.sleep_idle_seconds
    params.cpuparams.n_threads = options.threads
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [key]
    params.verbosity = options.verbosity
    params.endpoint_metrics = True
    params.ui = False
    # Pages of other origins have no business with an engine on this machine.
    params.cors_origins = ""
    return xllamacpp.Server(params)


def _end_with_parent() -> None:
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        # Not Linux: whoever starts us must end us.
        return
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def _await_health(url: str, stop: threading.Event) -> None:
    deadline = time.monotonic() + HEALTH_SECONDS
    while not _is_healthy(url):
        if stop.wait(0.05):
            sys.exit("stopped while loading")
        if time.monotonic() > deadline:
            sys.exit(f"{url}/health was not 200 within {HEALTH_SECONDS} s")


def _is_healthy(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _report(ready_file: Path, url: str) -> None:
    """Written beside and renamed: whoever sees the file sees all of it."""
    draft = ready_file.with_name(f"{ready_file.name}.{os.getpid()}")
    draft.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")
    draft.replace(ready_file)


if __name__ == "__main__":
    main()
