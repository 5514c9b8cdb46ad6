"""Child processes of the supervisor: each on a leash, in a session of its own, with a log of its own."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capibara_flow.errors import CannotStart
from capibara_flow.processes.leash import leashed
from capibara_flow.processes.logs import fresh_log, last_lines

GRACE_SECONDS = 10.0
RESTARTS = 5
STEADY_SECONDS = 20.0


def back_off(failures: int) -> float | None:
    """Seconds to wait after that many crashes in a row, or ``None`` when it is time to give up."""
    return None if failures > RESTARTS else 0.5 * 2.0 ** (failures - 1)


@dataclass
class Child:
    """A program that the supervisor keeps alive; *environment* is what it gets beside our own."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    failures: int = 0
    restart_at: float | None = None
    _started: float = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        """Its process id while there is a process."""
        return self._process.pid if self._process else None

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended, negative for a signal."""
        return self._process.poll() if self._process else None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it with an empty log."""
        with fresh_log(self.log) as log:
            self._process = subprocess.Popen(  # noqa: S603  our own programs
                leashed(self.command),
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for the supervisor alone, which then ends the others in order.
                start_new_session=True,
            )
        self._started = time.monotonic()
        self.restart_at = None

    def crashed(self, now: float) -> float | None:
        """Note a crash seen at *now*; the seconds until the restart, or ``None`` when it crashed too often in a row."""
        self.sweep()
        self.failures = 1 if now - self._started > STEADY_SECONDS else self.failures + 1
        delay = back_off(self.failures)
        self.restart_at = now + delay if delay is not None else None
        return delay

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """End it: SIGTERM, SIGKILL after *grace_seconds*, and whatever it left in its session with it."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
        self.sweep()
        self._process.wait()

    def sweep(self) -> None:
        """Kill everything that is left of its process group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def check(self) -> None:
        """Raise ``CannotStart`` with the end of its log if it has ended."""
        if not self.alive:
            raise CannotStart(f"{self.name} ended with {ending(self.code)}; its log, {self.log}, ends with:\n{last_lines(self.log)}")


def ending(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
