"""The fleet as it changes: read again whenever its file does."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.runtime.watching import Watched
from capibara_flow.settings import Settings, read_fleet

OnChange = Callable[[Fleet], Awaitable[object] | object]


def is_hosted(expert: Expert) -> bool:
    """Whether an expert host starts *expert*: who has addresses is started by somebody else."""
    return expert.launch is not None and not expert.urls


async def watched_fleet(settings: Settings, stack: AsyncExitStack, on_change: OnChange) -> Watched[Fleet]:
    """The fleet of *settings*, read again whenever its file changes; *on_change* gets the new one, and may refuse it."""
    watched = Watched(settings.fleet_file, read_fleet, on_change)
    watched.start()
    stack.push_async_callback(watched.stop)
    return watched
