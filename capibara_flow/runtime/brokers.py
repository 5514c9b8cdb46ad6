"""FastStream's connection to NATS, for work messages; the door does without it, and without FastStream in its memory."""

from contextlib import suppress
from types import TracebackType

from faststream.nats import NatsBroker
from faststream.security import SASLPlaintext
from nats.errors import ConnectionClosedError, ConnectionReconnectingError
from nats.errors import Error as NatsError

from capibara_flow.runtime.client import TokenClient, flushed
from capibara_flow.runtime.connection import options
from capibara_flow.settings import Settings

_FLUSH_SECONDS = 2


class _Broker(NatsBroker):
    """FastStream's, but who has started is heard, and it ends in order also while it looks for a server, with nobody to take leave of."""

    async def start(self) -> None:
        """Connect, and subscribe: what anybody asks from then on comes here."""
        await super().start()
        connection = await self.connect()
        # While the server is away nobody can ask, and once it is back it is told of what is subscribed.
        with suppress(NatsError, TimeoutError):
            await flushed(connection, _FLUSH_SECONDS)

    async def _connect(self) -> TokenClient:
        connection = TokenClient()
        await connection.connect(**self._connection_kwargs)
        self.config.connect(connection)
        return connection

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
                await self._connection.close()
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
        # `Intake` reads what comes: to have FastStream validate it once more costs every turn.
        apply_types=False,
        graceful_timeout=settings.worker.graceful_seconds,
        **wanted,
    )
