"""The command lines: what they say, and whether vLLM itself understands them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.hosting import MIB, TOKEN_BYTES, Need
from capibara_flow.engines import xllamacpp
from capibara_flow.engines.host import launch, machine
from capibara_flow.engines.host.launch import Place

PLACE = Place(8123, "hush")
ARM = "Google Axion, 32 vCPU (ARM)"


def expert(engine: str, /, *, launched: dict[str, Any] | None = None, **changes: Any) -> Expert:
    given = {"name": "phi4_fast", "weights": "models/phi-4-mini", "launch": {"engine": engine, **(launched or {})}, **changes}
    return Expert.model_validate(given)


def made(engine: str, /, **changes: Any) -> launch.Command:
    return launch.command(expert(engine, **changes), PLACE)


def values(command: launch.Command) -> dict[str, str]:
    """Its options: a flag's value is empty."""
    found: dict[str, str] = {}
    words = list(command.argv)
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            assert word not in found, "said twice"
            found[word] = "" if following.startswith("--") else following
    return found


def vllm_lines() -> dict[str, launch.Command]:
    """Every kind of vLLM command line that we make."""
    profiles = {"profiles": ["low_latency_batching", "optimized_kv_cache"]}
    args = {"args": {"gpu_memory_utilization": 0.45, "enable_sleep_mode": True, "enable_prefix_caching": False}}
    return {
        "gpu": made("vllm"),
        "gpu, profiles": made("vllm", launched=profiles, context_length=24576),
        "gpu, own options": made("vllm", launched=profiles | args),
        "arm": made("vllm", hardware=ARM, context_length=4096),
        "arm, profiles": made("vllm", hardware=ARM, launched=profiles, context_length=4096, model="microsoft/Phi-4-mini-instruct"),
    }


# --- what they say ----------------------------------------------------------------------------------------------


def test_vllm_on_a_gpu() -> None:
    command = made("vllm", context_length=24576, concurrency=6)
    assert command.argv[:3] == ("vllm", "serve", "models/phi-4-mini")
    assert values(command) == {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--served-model-name": "phi4_fast",
        "--max-num-seqs": "6",
        "--max-model-len": "24576",
        "--dtype": "auto",
    }
    assert command.environment == {"VLLM_API_KEY": "hush"}
    assert (command.dialect, command.sleeps) == ("vllm", False)


def test_vllm_on_arm_knows_its_threads_its_memory_and_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpus", lambda: list(range(32)))
    command = made("vllm", hardware=ARM, context_length=4096, concurrency=4)
    assert values(command)["--dtype"] == "bfloat16"
    assert command.environment == {
        "VLLM_API_KEY": "hush",
        "VLLM_CPU_OMP_THREADS_BIND": "0-29",
        "VLLM_CPU_KVCACHE_SPACE": str(4096 * 4 * TOKEN_BYTES // 1024**3),
    }


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [(None, "auto"), ("RTX 4090, 16 vCPU", "auto"), ("GH200: ARM with an H200", "auto"), ("c4a, 32 vCPU", "bfloat16"), ("cpu", "bfloat16")],
)
def test_the_hardware_tells_whether_there_is_an_accelerator(hardware: str | None, dtype: str) -> None:
    command = made("vllm", hardware=hardware)
    assert values(command)["--dtype"] == dtype
    assert ("VLLM_CPU_KVCACHE_SPACE" in command.environment) == (dtype == "bfloat16")


def test_profiles_are_vllms_own_flags_and_the_operator_has_the_last_word() -> None:
    both = {"profiles": ["low_latency_batching", "optimized_kv_cache"]}
    on_gpu, on_arm = values(made("vllm", launched=both)), values(made("vllm", launched=both, hardware=ARM))
    for options in (on_gpu, on_arm):
        assert options["--max-num-seqs"] == "8"
        assert options["--max-num-batched-tokens"] == "2048"
        assert {"--enable-chunked-prefill", "--enable-prefix-caching"} <= options.keys()
    assert on_gpu["--kv-cache-dtype"] == "fp8"
    # vLLM refuses 8 bits there, and works best with blocks of a multiple of 32.
    assert "--kv-cache-dtype" not in on_arm
    assert on_arm["--block-size"] == "128"
    own = values(made("vllm", launched=both | {"args": {"max_num_seqs": 3, "enable_prefix_caching": False}}))
    assert own["--max-num-seqs"] == "3"
    assert "--no-enable-prefix-caching" in own
    assert "--enable-prefix-caching" not in own


def test_sleep_is_only_for_who_asks_for_it() -> None:
    command = made("vllm", launched={"args": {"enable_sleep_mode": True}})
    assert command.sleeps
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enable-sleep-mode" in values(command)


def test_args_in_capitals_go_into_the_environment() -> None:
    command = made("vllm", hardware=ARM, launched={"args": {"VLLM_CPU_OMP_THREADS_BIND": "0-15", "VLLM_CPU_KVCACHE_SPACE": 20}})
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-15"
    assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == "20"
    assert "--VLLM-CPU-KVCACHE-SPACE" not in values(command)


def test_llama_server_divides_its_context_among_the_slots() -> None:
    command = made(
        "llama_server", context_length=4096, concurrency=2, launched={"args": {"n_gpu_layers": 99, "jinja": True, "mmap": False}}
    )
    assert command.argv[0] == "llama-server"
    assert values(command) == {
        "--model": "models/phi-4-mini",
        "--alias": "phi4_fast",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--parallel": "2",
        "--ctx-size": "8192",
        "--n-gpu-layers": "99",
        "--jinja": "",
        "--no-mmap": "",
    }
    assert command.environment == {"LLAMA_API_KEY": "hush", "OMP_WAIT_POLICY": "passive"}


def test_a_bare_prompt_stays_one() -> None:
    assert made("llama_server").dialect == "llama_server"
    assert made("llama_server", dialect="llama_completion").dialect == "llama_completion"
    assert made("xllamacpp", dialect="llama_completion").dialect == "llama_completion"


def test_our_own_llama_cpp_understands_its_command_line(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF")
    hosted = expert("xllamacpp", weights=str(weights), context_length=1024, concurrency=3, launched={"args": {"threads": 2}})
    command = launch.command(hosted, Place(8123, "hush", rest_after_s=150))
    assert command.argv[:3] == (sys.executable, "-m", "capibara_flow.engines.xllamacpp")
    options = xllamacpp._parser().parse_args(command.argv[3:])
    assert (options.model, options.alias, options.port) == (weights, "phi4_fast", 8123)
    assert (options.context, options.slots, options.threads, options.sleep_idle_seconds) == (3072, 3, 2, 150)
    assert options.ready_file is None


def test_keys_are_in_no_command_line() -> None:
    for command in (made("xllamacpp"), made("llama_server"), made("vllm")):
        assert not [word for word in command.argv if "hush" in word]
        assert "hush" in command.environment.values()


def test_engines_find_none_of_our_settings_in_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_NATS__STORE_KEY", "hush")
    monkeypatch.setenv("HF_HOME", "there")
    found = launch.environment(made("vllm"))
    assert "CAPIBARA_NATS__STORE_KEY" not in found
    assert (found["HF_HOME"], found["VLLM_API_KEY"]) == ("there", "hush")


# --- what they need ---------------------------------------------------------------------------------------------


def test_the_need_is_the_operators_word_or_an_estimate(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    weights.write_bytes(bytes(5 * MIB))
    launched = {"memory_mib": 700, "load_seconds": 30}
    told = launch.need(expert("xllamacpp", weights=str(weights), priority=4, launched=launched, context_length=1024, concurrency=1))
    assert told == Need("phi4_fast", 4, memory_mib=700, estimate_mib=6 + 1024 * TOKEN_BYTES // MIB, load_seconds=30)
    assert launch.need(expert("xllamacpp", weights=str(weights))).memory_mib is None


def test_weights_are_a_file_its_parts_a_folder_or_a_name(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"big-0000{number}-of-00003.gguf").write_bytes(bytes(10))
    (tmp_path / "other-00001-of-00003.gguf").write_bytes(bytes(7))
    (tmp_path / "tokenizer.json").write_bytes(bytes(99))
    assert launch.weights_bytes(str(tmp_path / "big-00001-of-00003.gguf")) == 30
    assert launch.weights_bytes(str(tmp_path / "other-00001-of-00003.gguf")) == 7
    assert launch.weights_bytes(str(tmp_path)) == 37
    assert launch.weights_bytes("microsoft/Phi-4-mini-instruct") is None


@given(st.sets(st.integers(0, 200), min_size=1))
def test_processors_are_told_in_ranges(chosen: set[int]) -> None:
    told = launch.bound(sorted(chosen))
    read: list[int] = []
    for part in told.split(","):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    spared = 2 if len(chosen) >= 8 else 0
    assert read == sorted(chosen)[: len(chosen) - spared]


# --- the machine ------------------------------------------------------------------------------------------------


def test_free_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4096 kB\n")
    assert machine.free_mib(tmp_path, tmp_path / "none") == 4


def test_a_control_group_has_its_own_limit(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable:    409600 kB\n")
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{70 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {40 * MIB}\ninactive_file {20 * MIB}\n")
    assert machine.free_mib(tmp_path, tmp_path) == 50
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_mib(tmp_path, tmp_path) == 400


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path) -> None:
    assert machine.free_mib(tmp_path, tmp_path) == machine.UNKNOWN_MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_process_takes_some_memory() -> None:
    assert os.getpid() in machine.family(os.getpid())
    assert (machine.resident_mib([os.getpid()]) or 0) > 5
    assert machine.resident_mib([2**22 + 1]) is None


# --- vLLM itself ------------------------------------------------------------------------------------------------


def vllm_python() -> str:
    """A Python that has vLLM: the one of ``$VLLM_PYTHON``, or this one."""
    if named := os.environ.get("VLLM_PYTHON"):
        return named
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: `pip install 'capibara-flow[vllm]'`, or name a Python that has it in VLLM_PYTHON")
    return sys.executable


@pytest.mark.slow
def test_vllms_own_parser_understands_every_command_line() -> None:
    lines = vllm_lines()
    asked = "".join(json.dumps(command.argv) + "\n" for command in lines.values())
    program = Path(__file__).with_name("parse_vllm.py")
    run = subprocess.run([vllm_python(), str(program)], input=asked, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    parsed = [json.loads(line.removeprefix("PARSED ")) for line in run.stdout.splitlines() if line.startswith("PARSED ")]
    understood = dict(zip(lines, parsed, strict=True))
    for options in understood.values():
        assert options["model_tag"] == "models/phi-4-mini"
        assert options["port"] == 8123
    assert understood["gpu, profiles"]["kv_cache_dtype"] == "fp8"
    assert understood["gpu, profiles"]["max_num_batched_tokens"] == 2048
    assert understood["gpu, own options"]["enable_sleep_mode"] is True
    assert understood["gpu, own options"]["enable_prefix_caching"] is False
    assert understood["arm, profiles"]["block_size"] == 128
    assert understood["arm, profiles"]["dtype"] == "bfloat16"
    assert understood["arm, profiles"]["served_model_name"] == ["microsoft/Phi-4-mini-instruct"]
