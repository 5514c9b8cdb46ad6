"""The command lines by which engines are started for an expert: its own settings, then its profiles, then its *args*, the last one wins.

Checked against llama.cpp's server of 2026 and the argument parser of vLLM 0.33.0. Keys travel in the environment: command lines
can be seen by everybody on the machine.
"""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capibara_flow.domain.fleet import Dialect, Expert, Launch
from capibara_flow.domain.hosting import TOKEN_BYTES, Need, estimated_mib
from capibara_flow.engines.host import machine

Options = Mapping[str, str | int | float | bool]

#: Tokens of context that an expert has where its settings tell none: as much as our own llama.cpp gives.
CONTEXT_TOKENS = 8192
_GIB = 1024**3
#: What *hardware* says of a host without an accelerator, and of one that has some as well.
_CPU = re.compile(r"\b(v?cpu|arm|arm64|aarch64|axion|graviton|neoverse)s?\b", re.IGNORECASE)
_GPU = re.compile(r"\b(gpu|cuda|rocm|nvidia|rtx|[ahb]\d00)s?\b", re.IGNORECASE)
#: Few answers at a time, and prompts cut into parts so that a long one does not hold the others up.
_LOW_LATENCY: Options = {"max-num-seqs": 8, "max-num-batched-tokens": 2048, "enable-chunked-prefill": True}
#: Common beginnings of prompts are kept. An accelerator keeps them in 8 bits; vLLM on ARM cannot, and likes larger blocks.
_KV_CACHE: Options = {"enable-prefix-caching": True, "kv-cache-dtype": "fp8"}
_KV_CACHE_ON_CPU: Options = {"enable-prefix-caching": True, "block-size": 128}
#: Processors that vLLM on a CPU leaves to its HTTP server, where there are enough.
_SPARED_CPUS, _ENOUGH_CPUS = 2, 8


@dataclass(frozen=True)
class Command:
    """How an engine is started, what it speaks, and whether it can be told to sleep."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect = "llama_server"
    sleeps: bool = False


@dataclass(frozen=True)
class Place:
    """Where an engine shall listen: *port* of 127.0.0.1, for who has *key*; idle for *rest_after_s* it may sleep by itself."""

    port: int
    key: str
    rest_after_s: float | None = None


def command(expert: Expert, place: Place) -> Command:
    """The command line of the engine that *expert* is launched with."""
    launch = _launch(expert)
    arguments = {name: value for name, value in launch.args.items() if not name.isupper()}
    own = {name: str(value) for name, value in launch.args.items() if name.isupper()}
    match launch.engine:
        case "xllamacpp":
            made = _xllamacpp(expert, place, arguments)
        case "llama_server":
            made = _llama_server(expert, place, arguments)
        case "vllm":
            made = _vllm(expert, place, arguments)
    return Command(made.argv, {**made.environment, **own}, made.dialect, made.sleeps)


def need(expert: Expert) -> Need:
    """What hosting *expert* takes, as far as it can be told before it is loaded."""
    launch = _launch(expert)
    estimate = estimated_mib(weights_bytes(expert.weights or ""), context_tokens(expert))
    return Need(expert.name, expert.priority, launch.memory_mib, estimate, launch.load_seconds)


def context_tokens(expert: Expert) -> int:
    """Tokens that an engine keeps for all answers that it gives at the same time."""
    return expert.context_length * expert.concurrency if expert.context_length else CONTEXT_TOKENS


def weights_bytes(weights: str) -> int | None:
    """The size of a GGUF file with its other parts, or of a model's folder; none for a name on a hub."""
    path = Path(weights)
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.suffix in (".safetensors", ".bin", ".gguf", ".pt"))
    if not path.is_file():
        return None
    parts = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", path.name)
    files = [path] if parts == path.name else list(path.parent.glob(parts))
    return sum(each.stat().st_size for each in files)


def _launch(expert: Expert) -> Launch:
    if expert.launch is None:
        raise ValueError(f"{expert.name} has no launch: nothing tells how to start it")
    return expert.launch


def options(arguments: Options) -> list[str]:
    """``{"max_model_len": 8, "a": True, "b": False}`` is ``--max-model-len 8 --a --no-b``."""
    line: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", str(value)]
    return line


def _merged(*groups: Options) -> dict[str, str | int | float | bool]:
    """All options; later groups win however they spell a name."""
    return {name.replace("_", "-"): value for group in groups for name, value in group.items()}


def _alias(expert: Expert) -> str:
    return expert.model or expert.name


def _llama_dialect(expert: Expert) -> Dialect:
    return "llama_completion" if expert.dialect == "llama_completion" else "llama_server"


def _xllamacpp(expert: Expert, place: Place, arguments: Options) -> Command:
    own: dict[str, str | int | float | bool] = {"model": expert.weights or "", "alias": _alias(expert), "port": place.port}
    if expert.context_length:
        own |= {"context": context_tokens(expert), "slots": expert.concurrency}
    if place.rest_after_s is not None:
        own["sleep-idle-seconds"] = max(1, math.floor(place.rest_after_s))
    argv = [sys.executable, "-m", "capibara_flow.engines.xllamacpp", *options(_merged(own, arguments))]
    return Command(tuple(argv), {"LLAMA_API_KEY": place.key}, _llama_dialect(expert))


def _llama_server(expert: Expert, place: Place, arguments: Options) -> Command:
    own: dict[str, str | int | float | bool] = {
        "model": expert.weights or "",
        "alias": _alias(expert),
        "host": "127.0.0.1",
        "port": place.port,
        "parallel": expert.concurrency,
    }
    if expert.context_length:
        own["ctx-size"] = context_tokens(expert)
    argv = ["llama-server", *options(_merged(own, arguments))]
    # Threads that spin while they wait starve a busy machine.
    return Command(tuple(argv), {"LLAMA_API_KEY": place.key, "OMP_WAIT_POLICY": "passive"}, _llama_dialect(expert))


def _vllm(expert: Expert, place: Place, arguments: Options) -> Command:
    hardware = expert.hardware or ""
    on_cpu = bool(_CPU.search(hardware)) and not _GPU.search(hardware)
    own: dict[str, str | int | float | bool] = {
        "host": "127.0.0.1",
        "port": place.port,
        "served-model-name": _alias(expert),
        "max-num-seqs": expert.concurrency,
        "dtype": "bfloat16" if on_cpu else "auto",
    }
    if expert.context_length:
        own["max-model-len"] = expert.context_length
    profiles = {"low_latency_batching": _LOW_LATENCY, "optimized_kv_cache": _KV_CACHE_ON_CPU if on_cpu else _KV_CACHE}
    chosen = _merged(own, *(profiles[name] for name in _launch(expert).profiles), arguments)
    sleeps = chosen.get("enable-sleep-mode") is True
    # Its /sleep and /wake_up are there in this mode only, and ask nobody for a key: so only where the operator wants sleep.
    environment = {"VLLM_API_KEY": place.key, **({"VLLM_SERVER_DEV_MODE": "1"} if sleeps else {}), **(_cpu(expert) if on_cpu else {})}
    return Command(("vllm", "serve", expert.weights or "", *options(chosen)), environment, "vllm", sleeps)


def _cpu(expert: Expert) -> dict[str, str]:
    """vLLM on processors: left alone it takes half of the machine's memory for its cache, and every processor for itself."""
    gib = max(1, math.ceil(context_tokens(expert) * TOKEN_BYTES / _GIB))
    return {"VLLM_CPU_KVCACHE_SPACE": str(gib), "VLLM_CPU_OMP_THREADS_BIND": bound(machine.cpus())}


def bound(cpus: Sequence[int]) -> str:
    """The processors for the computing threads, as ``0-29``; a few are spared where there are many."""
    chosen = cpus[:-_SPARED_CPUS] if len(cpus) >= _ENOUGH_CPUS else cpus
    ranges: list[list[int]] = []
    for cpu in chosen:
        if ranges and cpu == ranges[-1][-1] + 1:
            ranges[-1].append(cpu)
        else:
            ranges.append([cpu])
    return ",".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges)


def environment(command: Command) -> dict[str, str]:
    """What an engine finds in its environment: ours, without our own settings, in which there are passwords."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CAPIBARA_")} | dict(command.environment)
