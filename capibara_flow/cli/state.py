"""What a running ``capibara up`` tells other commands: ``running.json`` in its state folder, for our eyes only."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_STATE = Path(".capibara")
FILE = "running.json"
#: Settings that are secret, or hold secrets: no other command needs those of a running ``up``.
_SECRET = re.compile(
    r"CAPIBARA_(AUTH__KEYS|NATS__PASSWORDS|NATS__STORE_KEY|KNOWLEDGE__(POSTGRES|MILVUS_TOKEN|NEBULA_PASSWORD))", re.IGNORECASE
)


def told_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Those settings of *environment* that other commands must know to see things as ``up`` does; without secrets."""
    return {name: value for name, value in environment.items() if name.upper().startswith("CAPIBARA_") and not _SECRET.match(name)}


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
