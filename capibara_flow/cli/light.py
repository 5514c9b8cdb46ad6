"""For commands that have to be quick: the broker's client without what only others need of it."""

import sys
from importlib import import_module


def load_client() -> None:
    """Import nats-py, unless somebody has, without aiohttp: it would load that for WebSockets, and half of its time goes there."""
    if "nats" in sys.modules or "aiohttp" in sys.modules:
        return
    sys.modules["aiohttp"] = None  # type: ignore[assignment]  # as Python wants it of what shall not be found
    try:
        import_module("nats.aio.client")
    finally:
        del sys.modules["aiohttp"]
