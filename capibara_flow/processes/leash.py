"""Run a command that ends when its parent does, however the parent ends; with fewer rights, if that is wanted.

Used as a script, ``python leash.py PARENT_PID SIGNAL UID:GID COMMAND...``: as root it becomes that user of that group (with an empty
``UID:GID`` it stays who it is), asks the kernel for SIGNAL at the parent's death (``PR_SET_PDEATHSIG``, prctl(2)), and becomes COMMAND,
keeping its process id. A wrapper, because Python code between fork and exec may deadlock when the parent has threads. The kernel watches
the *thread* that started the child: start leashed commands from one that lives on. Where there is no prctl the command runs without a
leash: whoever starts it must end it.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine, and its group, by their numbers."""

    uid: int
    gid: int


def leashed(command: Sequence[str], *, ending: signal.Signals = signal.SIGTERM, account: Account | None = None) -> list[str]:
    """*command* as this process must start it to die with this process, by *ending*, and to run as *account*, if we are to choose."""
    who = f"{account.uid}:{account.gid}" if account else ""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(ending)), who, *command]


def main(arguments: Sequence[str]) -> None:
    """Put the leash on and become the command; exits with 127 when it cannot be run."""
    parent, ending, who, *command = arguments
    if who and os.geteuid() == 0:
        uid, gid = map(int, who.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # Behind the change of the user, which takes the signal back.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(ending))
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
