"""FastStream's connection to NATS, for work messages; the door does without it, and without FastStream in its memory."""

from types import TracebackType

from faststream.nats import NatsBroker
from faststream.security import SASLPlaintext
from nats.errors import ConnectionClosedError, ConnectionReconnectingError

from capibara_flow.runtime.client import closed
from capibara_flow.runtime.connection import options
from capibara_flow.settings import Settings


class _Broker(NatsBroker):
    """FastStream's, but it ends in order also while it looks for a server: there is nobody to take leave of."""

    async def stop(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> None:
        try:
            await super().stop(exc_type, exc_val, exc_tb)
        except (ConnectionReconnectingError, ConnectionClosedError):
            if self._connection is not None:
                await closed(self._connection)
                self._connection = None
            self.config.disconnect()


def broker(settings: Settings, role: str) -> NatsBroker:
    """A FastStream broker, not yet connected: for work messages."""
    wanted = options(settings, role)
    own = {name: wanted.pop(name) for name in ("user", "password") if name in wanted}
    return _Broker(
        settings.nats.url.split(","),
        security=SASLPlaintext(own["user"], own["password"]) if own else None,
        logger=None,
        graceful_timeout=settings.worker.graceful_seconds,
        **wanted,
    )
