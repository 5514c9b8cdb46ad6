"""A server as a child process, in a folder of its own that nobody else may use meanwhile: what a broker and a database have in common."""

import fcntl
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar, Self

_LOOK = 0.005  # seconds between looks whether it answers


class ChildServer(ABC):
    """A server that lives as long as the ``with`` block or this process; *folder* holds its data, its log and a lock.

    Use it from a thread that outlives it (see ``leash``).
    """

    #: What ends it in order, and the seconds after which it is ended by force.
    ending: ClassVar[signal.Signals] = signal.SIGTERM
    grace_seconds: ClassVar[float] = 10
    #: Seconds until a folder that is in use is given up: a server whose supervisor was just killed needs a moment to put its data away.
    lock_seconds: float = 5

    def __init__(self, folder: Path, log: str) -> None:
        self.folder = folder.absolute()
        self.log = self.folder / log
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Its process id, if it was started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @abstractmethod
    def start(self) -> None:
        """Start and wait until it answers."""

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self, grace_seconds: float | None = None) -> None:
        """End it in order, with force after *grace_seconds* (the usual ones when they are not given), and free the folder."""
        self._end(self.ending, grace_seconds)
        if self._lock:
            self._lock.close()
            self._lock = None

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the process that was started is ready."""

    @abstractmethod
    def _in_use(self) -> Exception:
        """What to raise when somebody else uses the folder."""

    def _take_lock(self) -> None:
        lock = (self.folder / "lock").open("ab")
        end = time.monotonic() + self.lock_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    lock.close()
                    raise self._in_use() from None
                time.sleep(0.05)
            else:
                self._lock = lock
                return

    def _begin(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str], folder: Path | None = None) -> None:
        """Let *command* run in *folder*, with nothing but *environment*; what it says goes to *log*."""
        assert self._lock is not None, "start before restart"  # noqa: S101  a programming error
        self._process = subprocess.Popen(  # noqa: S603  the program is the subclass's
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # The server holds the lock too: a folder is free only when both are gone.
            pass_fds=[self._lock.fileno()],
        )

    def _wait(self, end: float) -> bool:
        """Whether it answers before *end* (of ``time.monotonic``); one that does not is ended."""
        while not self._answers():
            if not self.alive or time.monotonic() > end:
                self._end(signal.SIGKILL)
                return False
            time.sleep(_LOOK)
        return True

    def _end(self, sign: signal.Signals, grace_seconds: float | None = None) -> None:
        if self._process is None:
            return
        self._process.send_signal(sign)
        try:
            self._process.wait(self.grace_seconds if grace_seconds is None else grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
