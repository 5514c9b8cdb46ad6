"""Tasks in the background end when they shall, whatever they wait for."""

import asyncio

from capibara_flow.runtime.tasks import ended


async def test_one_that_misses_a_cancellation_is_cancelled_again():
    missed = asyncio.Event()

    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            missed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await ended(task, None, again=0.01)
    assert (missed.is_set(), task.cancelled()) == (True, True)


async def test_how_they_ended_is_no_news():
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def broken() -> None:
        raise ValueError

    task = asyncio.create_task(broken())
    await asyncio.wait({task})
    await ended(task, None)
    del task
    await asyncio.sleep(0)
    assert complaints == []
