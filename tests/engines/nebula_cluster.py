"""A small NebulaGraph in containers: one meta, one storage and one graph service. Where Docker answers only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import stamina
from nebula3.Config import Config
from nebula3.gclient.net.ConnectionPool import ConnectionPool
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

VERSION = "v3.8.0"
_META = "metad0:9559"
#: What a service of that kind listens at, and where it keeps its data.
_SERVICES = {"metad": ("metad0", 9559, "/data/meta"), "storaged": ("storaged0", 9779, "/data/storage"), "graphd": ("graphd0", 9669, "")}


@contextmanager
def cluster() -> Iterator[tuple[str, int]]:
    """The address of its graph service, which knows its storage."""
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        running = {kind: stack.enter_context(_service(kind, network)) for kind in _SERVICES}
        graphd = running["graphd"]
        host = graphd.get_container_host_ip()
        address = ("127.0.0.1" if host == "localhost" else host, int(graphd.get_exposed_port(9669)))
        _add_storage(address)
        yield address


def _service(kind: str, network: Network) -> DockerContainer:
    name, port, data = _SERVICES[kind]
    options = [f"--meta_server_addrs={_META}", f"--local_ip={name}", f"--ws_ip={name}", f"--port={port}", "--heartbeat_interval_secs=1"]
    options += [f"--data_path={data}"] if data else []
    container = DockerContainer(f"vesoft/nebula-{kind}:{VERSION}").with_command(options)
    return container.with_network(network).with_network_aliases(name).with_exposed_ports(port)


def _add_storage(address: tuple[str, int]) -> None:
    for attempt in stamina.retry_context(on=Exception, attempts=None, timeout=120, wait_max=2):
        with attempt:
            pool = ConnectionPool()
            pool.init([address], Config())
            with pool.session_context("root", "nebula") as session:
                told = session.execute('ADD HOSTS "storaged0":9779')
                assert told.is_succeeded() or "Existed" in told.error_msg(), told.error_msg()
            pool.close()
