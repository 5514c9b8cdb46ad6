"""Logs of child processes: a fresh one for each run, and the end of one for whoever has to know why it failed."""

from pathlib import Path
from typing import IO

_TAIL = 16_384  # bytes


def put_aside(path: Path) -> None:
    """Let the log at *path*, if there is one, become ``NAME.1``."""
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))


def fresh_log(path: Path) -> IO[bytes]:
    """An empty log at *path*; the one of the run before becomes ``NAME.1``."""
    put_aside(path)
    return path.open("ab")


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, or an empty string where there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
