"""Run a command with few rights, and no longer than its parent lives.

Used as a script, ``python lowered.py PARENT_PID UID GID COMMAND...``: as root it becomes the user UID of the group GID, asks the
kernel for a SIGINT at the parent's death (``PR_SET_PDEATHSIG``, prctl(2)), which PostgreSQL takes as a fast shutdown, and becomes
COMMAND, keeping its process id. A wrapper, because Python code between fork and exec may deadlock when the parent has threads. The
kernel watches the *thread* that started it: start it from one that lives on. Where there is no prctl, whoever starts it must end it.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def lowered(command: Sequence[str], uid: int, gid: int) -> list[str]:
    """*command* as this process must start it to run as *uid* and *gid* and to die with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(uid), str(gid), *command]


def main(arguments: Sequence[str]) -> None:
    """Give the rights up and become the command; exits with 127 when it cannot be run."""
    parent, uid, gid, *command = arguments
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    # Behind the change of the user, which takes the signal back.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != int(parent):
        raise SystemExit("the parent died before its child began")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execv(command[0], command)  # noqa: S606  the command is the caller's, and no shell is wanted
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(127) from error


if __name__ == "__main__":
    main(sys.argv[1:])
