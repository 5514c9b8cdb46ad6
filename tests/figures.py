"""Keeping figures: rows in a CSV file, each with the code and the machine that it was measured on."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append *rows*, which all have the same columns, behind a line of their names if there is none."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def code(path: Path) -> dict[str, str]:
    """The commit that is measured, and whether anything but *path* differs from it."""
    ours = [f":!{path.relative_to(ROOT)}"] if path.is_relative_to(ROOT) else []
    dirty = _git("status", "--porcelain", "--", ".", *ours)
    return {"commit": _git("rev-parse", "--short=12", "HEAD") or "unknown", "dirty": str(int(bool(dirty)))}


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
