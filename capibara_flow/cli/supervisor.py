"""Children that are started together, kept alive, and ended in reverse order."""

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from capibara_flow.cli.children import STEADY_SECONDS, Child, back_off, ending
from capibara_flow.errors import CannotStart
from capibara_flow.processes.logs import last_lines
from capibara_flow.runtime.embedded import EmbeddedBroker

TICK_SECONDS = 0.1


class Stopped(BaseException):
    """Somebody asked us to stop: not an error, and nobody's to catch but the one who ends the children."""


class Supervisor:
    """The broker and the children around it, inside a ``with`` block.

    SIGINT, SIGTERM and SIGHUP end the block's waiting with ``Stopped``; a second one kills the children at once. *report*
    gets a line for whatever happens to a child, and ``on_restart`` is called when one has another pid. Use it in the main
    thread: signals and leashes belong to it.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.children: list[Child] = []
        self.broker: EmbeddedBroker | None = None
        self.on_broker_restart: Callable[[], None] = lambda: None
        self.on_restart: Callable[[], None] = lambda: None
        self._report = report
        self._signals = 0
        self._broker_crashes = 0
        self._broker_started = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[each] = signal.signal(each, self._asked_to_stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._signals:
            self._report("stopping ...")
        for child in reversed(self.children):
            child.stop()
        if self.broker:
            self.broker.stop()
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            for child in self.children:
                child.sweep()

    def pause(self) -> None:
        """Sleep for a tick; raises ``Stopped`` once a signal came."""
        if self._signals:
            raise Stopped
        time.sleep(TICK_SECONDS)

    def start_broker(self, broker: EmbeddedBroker) -> None:
        """Start *broker*, which is ended last."""
        self.broker = broker
        broker.start()
        self._broker_started = time.monotonic()

    def start(self, child: Child) -> None:
        """Start *child* and keep it."""
        self.children.append(child)
        child.start()

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for *condition* while everything started is alive; raises ``CannotStart``, ``Stopped``."""
        end = time.monotonic() + seconds
        while not condition():
            for child in self.children:
                child.check()
            if time.monotonic() > end:
                logs = "".join(f"\n--- {child.log}\n{last_lines(child.log)}" for child in self.children)
                raise CannotStart(f"{what} within {seconds:.0f} s{logs}")
            self.pause()

    def finish(self, child: Child, seconds: float) -> None:
        """Run *child* to its end; raises ``CannotStart`` unless it ends well and in time."""
        child.start()
        try:
            end = time.monotonic() + seconds
            while child.code is None and time.monotonic() < end:
                self.pause()
        finally:
            child.stop(grace_seconds=1)
        if child.code != 0:
            raise CannotStart(f"{child.name} failed:\n{last_lines(child.log)}")

    def watch(self) -> None:
        """Restart what crashes, for ever; raises ``Stopped``, or ``CannotStart`` when something crashes again and again."""
        while True:
            self.pause()
            self._watch_broker()
            for child in self.children:
                self._watch_child(child, time.monotonic())

    def _watch_broker(self) -> None:
        if self.broker is None or self.broker.alive:
            return
        lived, log = time.monotonic() - self._broker_started, self.broker.log
        self._broker_crashes = 1 if lived > STEADY_SECONDS else self._broker_crashes + 1
        if back_off(self._broker_crashes) is None:
            raise CannotStart(f"the broker died {self._broker_crashes} times in a row; its log, {log}, ends with:\n{last_lines(log)}")
        self._report(f"the broker died: starting it again at {self.broker.url}")
        self.broker.restart()
        self._broker_started = time.monotonic()
        self.on_broker_restart()
        self.on_restart()
        self._report(f"the broker runs again (pid {self.broker.pid})")

    def _watch_child(self, child: Child, now: float) -> None:
        if child.restart_at is not None:
            if now >= child.restart_at:
                child.start()
                self.on_restart()
                self._report(f"{child.name} runs again (pid {child.pid})")
        elif not child.alive:
            code, delay = child.code, child.crashed(now)
            if delay is None:
                raise CannotStart(f"{child.name} crashed {child.failures} times in a row; {child.log} ends with:\n{last_lines(child.log)}")
            self._report(f"{child.name} ended with {ending(code)} (see {child.log}.1): starting it again in {delay:g} s")


def free_port(host: str) -> int:
    """A port that nobody uses at this moment."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True


def local_get(host: str, port: int, path: str, timeout: float = 2) -> tuple[int, bytes]:
    """Status and body of ``GET path`` from our own edge; raises ``OSError`` or ``ValueError``.

    Over a bare socket: every HTTP client of the standard library loads TLS, a third of the supervisor's memory.
    """
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    with socket.create_connection((reachable, port), timeout=timeout) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {reachable}\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1:2][0] if head.startswith(b"HTTP/") else b"none"), body
