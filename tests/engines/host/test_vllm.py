"""A real vLLM, started by the host: a tiny model with random weights."""

import os
import shutil
from pathlib import Path

import pytest

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.hosting import Limits
from capibara_flow.engines.host import ExpertHost, machine
from capibara_flow.ports import Finish, Load, Tally
from tests.engines.host import tiny_model
from tests.engines.host.rig import ASKED, gone
from tests.engines.listening import heard, text_in


def vllm_program() -> str:
    """``vllm``, as the host will find it."""
    program = shutil.which("vllm")
    if program is None:
        pytest.skip("vllm is not on the PATH: `pip install 'capibara-flow[vllm]'` on a machine that it runs on")
    return program


def hardware() -> str:
    """What vLLM will find here."""
    return "GPU" if Path("/dev/nvidia0").exists() else "CPU"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_real_vllm_is_loaded_answers_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_program()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    profiles = ["low_latency_batching", *(["optimized_kv_cache"] if hardware() == "CPU" else [])]
    args = {"load_format": "dummy", "enforce_eager": True, "seed": 1, "VLLM_CPU_KVCACHE_SPACE": 1}
    launched = {"engine": "vllm", "args": args, "profiles": profiles, "memory_mib": 2000}
    model = {"weights": str(tiny_model.write(tmp_path)), "context_length": 256, "concurrency": 2, "hardware": hardware()}
    expert = Expert.model_validate({"name": "tiny", "launch": launched, "sampling": {"max_tokens": 16, "temperature": 0}, **model})
    host = ExpertHost([expert], Limits(), load_timeout_s=500)
    try:
        whole = await heard(host.engine(expert), ASKED)
        assert isinstance(whole[0], Load)
        assert whole[-1] in (Finish("length"), Finish("stop"))
        assert isinstance(whole[-2], Tally)
        assert text_in(await heard(host.engine(expert), ASKED)) == text_in(whole)
        family = machine.family(os.getpid())
        assert len(family) > 2
    finally:
        await host.aclose()
    assert all(gone(pid) for pid in family if pid != os.getpid())
