"""What this machine has left, and what a process and its children take of it. Linux; elsewhere nothing is known, and so nothing refused."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path

MIB = 1024 * 1024
#: Where nothing is known of the memory: more than any expert needs.
UNKNOWN_MIB = 1 << 40
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def free_mib(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Main memory that may still be taken: what the kernel calls available, within the limit of our control group (v2)."""
    available = _fields(proc / "meminfo").get("MemAvailable:")
    free = UNKNOWN_MIB if available is None else available // 1024
    return min(free, _left_in_group(cgroup))


def _left_in_group(cgroup: Path) -> int:
    try:
        limit = int((cgroup / "memory.max").read_text())
        current = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or ``max``: no limit
        return UNKNOWN_MIB
    # Cached files that nobody looks at are given up before anybody is killed.
    return max(0, limit - current + _fields(cgroup / "memory.stat").get("inactive_file", 0)) // MIB


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def family(pid: int) -> list[int]:
    """*pid* and all that it started, and so on, as far as they live."""
    found, new = [], [pid]
    while new:
        pid = new.pop()
        found.append(pid)
        for file in (_PROC / str(pid) / "task").glob("*/children"):
            new += _numbers(file)
    return found


def _numbers(file: Path) -> list[int]:
    try:
        return [int(word) for word in file.read_text().split()]
    except OSError:
        return []


def resident_mib(pids: Iterable[int]) -> int | None:
    """The memory of all *pids* together, what they share counted once; none where it cannot be told."""
    taken = [_fields(_PROC / str(pid) / "smaps_rollup").get("Pss:") for pid in pids]
    known = [each for each in taken if each is not None]
    return sum(known) // 1024 if known else None


def free_port() -> int:
    """A port of this machine's own address that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpus() -> list[int]:
    """The processors that we may use, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
