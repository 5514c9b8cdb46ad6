"""What a running ``capibara up`` tells other commands: ``running.json`` in its state folder, for our eyes only."""

import json
import os
from pathlib import Path
from typing import Any

DEFAULT_STATE = Path(".capibara")
FILE = "running.json"


def running(state: Path) -> dict[str, Any] | None:
    """What the live supervisor of *state* wrote, or ``None`` when there is none."""
    try:
        facts: dict[str, Any] = json.loads((state / FILE).read_text(encoding="utf-8"))
        os.kill(int(facts["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return None
    return facts


def adopt(state: Path) -> bool:
    """Let this process reach the broker of a running ``up``, unless the environment names another; whether it did."""
    if "CAPIBARA_NATS__URL" in os.environ or (facts := running(state)) is None:
        return False
    for name, value in facts["environment"].items():
        os.environ.setdefault(name, value)
    return True
