"""Ending tasks that go on in the background."""

import asyncio
from typing import Any

#: Seconds, more than it takes to end an engine or a server that has only just been started.
LONG = 60.0


async def ended(*tasks: "asyncio.Task[Any] | None", again: float = 1.0) -> None:
    """Cancel *tasks*, as far as there are any, and return when none of them goes on; how they ended is not told.

    They are cancelled *again* every so many seconds: ``asyncio.wait_for`` of Python 3.11 swallows a cancellation that comes together with
    what it waited for. It breaks off what they do to end in order: of who has much to do for that, say ``LONG``.
    """
    there = {task for task in tasks if task is not None}
    going = {task for task in there if not task.done()}
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=again)
    for task in there:
        if not task.cancelled():
            task.exception()  # else asyncio complains that nobody looked
