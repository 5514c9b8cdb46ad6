"""Connections to NATS: one role each, with its own inbox, that never give up reconnecting."""

import asyncio
import time
from typing import Any
from urllib.parse import quote

from capibara_flow.runtime.client import TokenClient
from capibara_flow.settings import Settings, SettingsError
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log

_DIFFERENT = 100  # errors remembered
_SAY_AGAIN = 30.0  # seconds between two log lines of the same words


def inbox_prefix(role: str) -> str:
    """Replies to *role* arrive below this subject, which no other role may read."""
    return f"_INBOX_{role}"


def options(settings: Settings, role: str) -> dict[str, Any]:
    """Connection options of *role*, as nats-py takes them.

    User and password are among them, unless the configured address has some: servers that a cluster tells us of come without.
    """
    said: dict[str, float] = {}

    async def failed(error: Exception) -> None:
        words, now = repr(error), time.monotonic()
        if now - said.get(words, -_SAY_AGAIN) >= _SAY_AGAIN:
            if len(said) >= _DIFFERENT:
                said.clear()
            said[words] = now
            log.warning("nats_error", role=role, error=words)

    password = settings.nats.passwords.get(role)
    own = {} if password is None or "@" in settings.nats.url else {"user": role, "password": password.get_secret_value()}
    return own | {
        "name": f"capibara-{role}",
        "inbox_prefix": inbox_prefix(role),
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.2,
        # A server that hangs, or whose machine is gone without a word, is left after 4 to 6 seconds: nats-py's own 120 would take minutes.
        "ping_interval": 2,
        "max_outstanding_pings": 2,
        "error_cb": failed,
    }


def addresses(settings: Settings, role: str) -> list[str]:
    """The servers, each with the role's credentials unless the configured address has some of its own."""
    password = settings.nats.passwords.get(role)
    urls = settings.nats.url.split(",")
    if password is None or "@" in settings.nats.url:
        return urls
    credentials = f"{role}:{quote(password.get_secret_value(), safe='')}@"
    return [url.replace("://", f"://{credentials}", 1) for url in urls]


async def connect(settings: Settings, role: str) -> TokenClient:
    """A raw connection, for tokens, the door and tools: waits for a broker, but raises ``SettingsError`` when one refuses the password."""
    client = TokenClient()
    refused = asyncio.Event()
    wanted = options(settings, role)
    told = wanted["error_cb"]

    async def failed(error: Exception) -> None:
        await told(error)
        if "authorization violation" in str(error).lower():
            refused.set()

    connecting = asyncio.create_task(client.connect(addresses(settings, role), **(wanted | {"error_cb": failed})))
    refusal = asyncio.create_task(refused.wait())
    try:
        await asyncio.wait({connecting, refusal}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await ended(refusal, None if connecting.done() else connecting)
    if refused.is_set():
        raise SettingsError(f"the broker refuses the password of {role}: set CAPIBARA_NATS__PASSWORDS__{role.upper()}")
    await connecting
    return client
