"""A broker of one's own: ``nats-server`` as a child process, with the configuration that real deployments use.

Free of asyncio and of anything heavy, so that a supervisor stays small and tests may use it anywhere.
"""

import base64
import json
import os
import re
import shutil
import signal
import socket
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from capibara_flow.errors import CannotStart
from capibara_flow.processes.leash import leashed
from capibara_flow.processes.logs import fresh_log, last_lines
from capibara_flow.processes.server import ChildServer

PASSWORD_VARIABLE = "CAPIBARA_NATS__PASSWORDS__"  # noqa: S105  a name, not a password
KEY_VARIABLE, SYNC_VARIABLE = "CAPIBARA_NATS__STORE_KEY", "CAPIBARA_NATS__SYNC"
#: How often a server forces what it stored to the disk unless it is told otherwise.
USUAL_SYNC = "2m"
_ROLE = re.compile(rf"\$\{{?{PASSWORD_VARIABLE}(\w+)")
#: For Go's scheduler. On one thread a token at a common pace costs the broker a quarter less: nobody has to be woken for it.
_ONE_THREAD = {"GOMAXPROCS": "1"}
#: What a server says of a stream whose key it does not have.
_UNREADABLE = b"Error decrypting our stream metafile"


def find_server() -> str:
    """The ``nats-server`` binary: ``$NATS_SERVER``, beside this Python, on the ``PATH``; raises ``CannotStart``."""
    beside = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    chosen = os.environ.get("NATS_SERVER")
    if chosen and not os.access(chosen, os.X_OK):
        raise CannotStart(f"NATS_SERVER={chosen} is not a program: correct or unset it")
    found = chosen or beside or shutil.which("nats-server")
    if not found:
        raise CannotStart("no nats-server: install it with `pip install 'capibara-flow[local]'`, or set NATS_SERVER to its path")
    return found


def default_config() -> Path:
    """``nats.conf`` of the working directory or of the source tree; raises ``CannotStart``."""
    places = (Path("nats.conf"), Path(__file__).parents[2] / "nats.conf")
    for place in places:
        if place.is_file():
            return place
    raise CannotStart("no nats.conf here: run this in the project's folder")


def greeting(host: str, port: int, timeout: float = 2) -> dict[str, Any]:
    """What a NATS server says first (its ``INFO``); raises ``OSError``, or ``ValueError`` from anything but a NATS server."""
    with socket.create_connection((host, port), timeout=timeout) as connection, connection.makefile("rb") as lines:
        line = lines.readline(65536)
    if not line.startswith(b"INFO "):
        raise ValueError(f"{host}:{port} does not speak NATS")
    info: dict[str, Any] = json.loads(line[5:])
    return info


def variables(passwords: Mapping[str, str], *, store_key: str = "", sync: str = USUAL_SYNC) -> dict[str, str]:
    """What nats.conf finds in the environment: *passwords* by role, the passphrase of the store, when it is forced to the disk."""
    # In quotes: as bare words some passphrases would be numbers, and `2m` two million seconds.
    own = {KEY_VARIABLE: _quoted(store_key), SYNC_VARIABLE: _quoted(sync)}
    return own | {_variable(role): password for role, password in passwords.items()}


class EmbeddedBroker(ChildServer):
    """``nats-server`` on a free port of this machine, as long as the ``with`` block or this process lives.

    *store_dir* holds its data, its log and a lock: two brokers on one store would destroy it. *config* is a nats.conf;
    each ``$CAPIBARA_NATS__PASSWORDS__ROLE`` in it gets a fresh random password. The port is chosen at the first start
    and kept over ``restart``. Raises ``CannotStart``. Use it from a thread that outlives it (see ``leash``).

    With a *store_key*, a passphrase, its data is encrypted, and data that was there in plain words becomes so. *sync* says when
    what was acknowledged is forced to the disk: ``always``, or an interval.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        store_dir: Path,
        *,
        config: Path | None = None,
        store_key: str = "",
        sync: str = USUAL_SYNC,
        start_seconds: float = 30,
    ) -> None:
        super().__init__(store_dir, "nats-server.log")
        self.port = 0
        self._config = config or default_config()
        self._start_seconds = start_seconds
        text = _text(self._config)
        self.passwords = {role: _password() for role in _roles(text)}
        self._encrypted = bool(store_key)
        self._variables = variables(self.passwords, store_key=store_key, sync=sync)
        for name, asked in ((KEY_VARIABLE, self._encrypted), (SYNC_VARIABLE, sync != USUAL_SYNC)):
            if asked and f"${name}" not in text:
                raise CannotStart(f"{name} would have no effect: {self._config} does not mention it")

    @property
    def url(self) -> str:
        """Where clients find it, without a user."""
        return f"nats://{self.host}:{self.port}"

    def environment(self, *roles: str) -> dict[str, str]:
        """The variables with which those of *roles* that it knows (all when none is named) reach this broker."""
        chosen = [role for role in self.passwords if not roles or role in roles]
        return {"CAPIBARA_NATS__URL": self.url} | {_variable(role): self.passwords[role] for role in chosen}

    def start(self) -> None:
        """Start and wait until it answers."""
        server = find_server()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for old in self.folder.glob("nats-server_*.ports"):
            old.unlink()
        with fresh_log(self.log) as log:
            self._run(server, log)

    def restart(self) -> None:
        """Start again on the same port with the same data; ends the old process first if it still runs."""
        self._end(self.ending)
        with self.log.open("ab") as log:
            self._run(find_server(), log)

    def _run(self, server: str, log: IO[bytes]) -> None:
        arguments = ["-c", str(self._config), "-a", self.host, "-p", str(self.port or -1)]
        arguments += ["-sd", str(self.folder), "--ports_file_dir", str(self.folder)]
        begin = log.tell()
        self._begin(leashed([server, *arguments]), log, _ONE_THREAD | os.environ | self._variables)
        if not self._wait(time.monotonic() + self._start_seconds):
            raise CannotStart(f"the broker did not start; its log, {self.log}, ends with:\n{last_lines(self.log)}")
        self._refuse_another_key(begin)

    def _refuse_another_key(self, begin: int) -> None:
        """A server leaves data that it cannot decrypt aside, and would begin anew beside it; *begin* is where its log does."""
        if _UNREADABLE not in self.log.read_bytes()[begin:]:
            return
        self._end(signal.SIGTERM)
        fault = "with another passphrase than that of" if self._encrypted else "and there is no"
        raise CannotStart(
            f"{self.folder} is encrypted, {fault} {KEY_VARIABLE}: set it to the one that it was made with, "
            "or choose another folder with --state"
        )

    def _answers(self) -> bool:
        try:
            ports = json.loads((self.folder / f"nats-server_{self.pid}.ports").read_text(encoding="utf-8"))
            self.port = int(ports["nats"][0].rpartition(":")[2])
            return bool(greeting(self.host, self.port))
        except (OSError, ValueError):
            # Not there yet, or half written.
            return False

    def _in_use(self) -> CannotStart:
        return CannotStart(f"another broker uses {self.folder}: stop it, or choose another folder with --state")


def _text(config: Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except OSError as error:
        raise CannotStart(f"{config}: cannot be read: {error.strerror}") from error


def _roles(text: str) -> list[str]:
    return sorted({role.lower() for role in _ROLE.findall(text)})


def _quoted(value: str) -> str:
    """*value* as a string of nats.conf."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _variable(role: str) -> str:
    return f"{PASSWORD_VARIABLE}{role.upper()}"


def _password() -> str:
    # A letter first: nats.conf would read a bare word that begins with a digit as a number. Not by `secrets`, which does
    # the same but loads OpenSSL.
    return "p" + base64.urlsafe_b64encode(os.urandom(24)).decode()
