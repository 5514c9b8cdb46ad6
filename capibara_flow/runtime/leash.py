"""Run a command that ends when its parent does, however the parent ends.

Used as a script, ``python leash.py PARENT_PID COMMAND...``: it asks the kernel for a SIGTERM at the parent's death
(``PR_SET_PDEATHSIG``, prctl(2)) and becomes COMMAND, keeping its process id. A wrapper, because Python code between
fork and exec may deadlock when the parent has threads. The kernel watches the *thread* that started the child:
start leashed commands from one that lives on. Where there is no prctl the command runs without a leash.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def leashed(command: Sequence[str]) -> list[str]:
    """*command* as this process must start it for it to die with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> None:
    """Put the leash on and become the command; exits with 127 when there is no such command."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise SystemExit("the parent died before its child began")
    # Python ignores SIGPIPE, and what is ignored stays so over exec: the command did not ask for that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  the command is the caller's, and no shell is wanted
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from error


if __name__ == "__main__":
    main(sys.argv[1:])
