"""Tasks in the background end when they shall, whatever they wait for."""

import ast
import asyncio
from pathlib import Path

import pytest

from capibara_flow.tasks import ended

ROOT = Path(__file__).parent.parent
#: Where futures of threads are cancelled: these hear it, or have an end.
THREADS = {"capibara_flow/engines/embeddings/threaded.py"}


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


def called(node: ast.AST) -> set[str]:
    """The last names of all that is called in *node*, with those of their keywords."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)]
    return {name for call in calls for name in (call.func.attr, *(word.arg for word in call.keywords if word.arg))}


@pytest.mark.parametrize("folder", ["capibara_flow", "workers"])
def test_whoever_cancels_and_waits_does_it_here(folder: str):
    by_hand = {
        f"{name}: {node.name}"
        for path in (ROOT / folder).rglob("*.py")
        if (name := str(path.relative_to(ROOT))) not in {"capibara_flow/tasks.py", *THREADS}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AsyncFunctionDef) and "cancel" in called(node) and called(node) & {"wait", "return_exceptions"}
    }
    assert by_hand == set(), "use tasks.ended: a task may miss that it is cancelled"


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
