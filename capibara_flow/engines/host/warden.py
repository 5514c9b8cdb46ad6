"""Stands between a host and an engine, so that nothing of the engine outlives the host, however that ends.

Used as a script, ``python warden.py PARENT_PID GRACE_SECONDS COMMAND...``, it starts COMMAND in a session of its own. At SIGTERM,
which the kernel also sends at the parent's death (``PR_SET_PDEATHSIG``, prctl(2)), it passes SIGTERM on to the whole session and
after GRACE_SECONDS kills it. Whatever COMMAND started and left is killed as well; should the warden itself be killed, the kernel
kills COMMAND. It exits with COMMAND's code, 128 and its number for a signal, 127 when there is no such command.

The kernel watches the *thread* that started the warden: start it from one that lives on. Where there is no prctl, whoever starts
it must end it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_HEARD = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


def watched(command: Sequence[str], grace_seconds: float) -> list[str]:
    """*command* as this process must start it for a warden to keep it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace_seconds), *command]


def main(arguments: Sequence[str]) -> int:
    """Run the command to its end, or to ours; its exit code."""
    parent, grace, *command = arguments
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Before we look for the parent and before there is a child: none of these signals may be missed.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    if os.getppid() != int(parent):
        return 0

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        # We have one thread only, so that Python code between fork and exec is safe.
        engine = subprocess.Popen(command, start_new_session=True, preexec_fn=prepare)  # noqa: S603, PLW1509
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    try:
        if _ended_or_told(engine):
            _signal_all(engine, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                engine.wait(float(grace))
    finally:
        _signal_all(engine, signal.SIGKILL)
        code = engine.wait()
        _sweep()
    return 128 - code if code < 0 else code


def _ended_or_told(engine: "subprocess.Popen[bytes]") -> bool:
    """Wait for the engine's end (false) or for our own (true)."""
    while engine.poll() is None:
        if signal.sigwait(_HEARD) != signal.SIGCHLD:
            return True
    return False


def _signal_all(engine: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(engine.pid, number)
    except (ProcessLookupError, PermissionError):  # nobody is left; macOS says so by the second
        return


def _sweep() -> None:
    """Kill what left the engine's session: at its end it became ours."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    while own.is_file() and (left := own.read_text().split()):
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
