"""A host over fake engines: what the host tests share."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.hosting import Limits
from capibara_flow.engines.host import ExpertHost, launch
from capibara_flow.ports import Load, Piece
from topics.chat import ChatRequest

FAKE = Path(__file__).with_name("fake_engine.py")
ASKED = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]})
#: Nobody in a test is to wait as long as an operator may.
QUICK: Mapping[str, Any] = {"crash_base_s": 0.2, "auto_unload_after_s": None, "reserve_mib": 0}


@dataclass
class Rig:
    """Experts on fake engines; each start leaves a line in *record*. Their host's clock is *ahead* of ours."""

    folder: Path
    sleeps: bool = False
    ahead: float = 0

    @property
    def record(self) -> Path:
        return self.folder / "record"

    def expert(self, name: str, *, priority: int = 1, memory_mib: int = 10, **args: Any) -> Expert:
        """An expert whose engine gets *args* as options."""
        launched = {"engine": "llama_server", "memory_mib": memory_mib, "args": args}
        return Expert.model_validate({"name": name, "weights": "none.gguf", "launch": launched, "priority": priority})

    def launcher(self, expert: Expert, place: launch.Place) -> launch.Command:
        """The fake in place of the engine that *expert* names."""
        real = launch.command(expert, place)
        argv = (sys.executable, str(FAKE), *real.argv[1:], "--record", str(self.record))
        return launch.Command(argv, real.environment, real.dialect, self.sleeps)

    def host(
        self, *experts: Expert, free_mib: int = 10_000, grace_s: float = 5, load_timeout_s: float = 60, ask_s: float = 5, **limits: Any
    ) -> ExpertHost:
        """A host of *experts*."""
        chosen = Limits(**{**QUICK, **limits})
        times = {"grace_s": grace_s, "load_timeout_s": load_timeout_s, "ask_s": ask_s}
        clock = lambda: time.monotonic() + self.ahead  # noqa: E731  no name of its own is needed
        return ExpertHost(experts, chosen, launcher=self.launcher, free_mib=lambda: free_mib, clock=clock, **times)

    def lines(self, key: str) -> list[Any]:
        """What was recorded under *key*, in order."""
        if not self.record.exists():
            return []
        whole, _, _ = self.record.read_text(encoding="utf-8").rpartition("\n")  # the last line may be only half written
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line[key] for line in lines if key in line]

    def pids(self) -> list[int]:
        """Every process that was ever started."""
        return [*self.lines("pid"), *self.lines("offspring")]


def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits for its parent to take notice has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def loads(pieces: list[Piece]) -> list[Load]:
    """News of loading among *pieces*."""
    return [piece for piece in pieces if isinstance(piece, Load)]
