"""The message at work: what every stage and all that it calls may want to know of it."""

import time
from collections.abc import Mapping
from contextvars import ContextVar

from nats.aio.msg import Msg

from topics.message import DEADLINE, ORIGIN, PRINCIPAL, TENANT, TRACE

_CARRIED = (TENANT, PRINCIPAL, DEADLINE, TRACE, ORIGIN)
_work: ContextVar[Msg] = ContextVar("work")
_begun: ContextVar[int] = ContextVar("begun", default=0)
_waited: ContextVar[bool] = ContextVar("waited", default=False)
_tries: ContextVar[int] = ContextVar("tries", default=0)
_trouble: ContextVar[str] = ContextVar("trouble", default="")


def begin(message: Msg) -> None:
    """From here on *message* is at work in this task, and in those that it starts."""
    _work.set(message)


def message() -> Msg:
    """The message at work."""
    return _work.get()


def try_again(error: Exception) -> None:
    """Note that this delivery has failed with *error*, and is tried once more."""
    _tries.set(tries() + 1)
    _trouble.set(str(error))


def trouble() -> str:
    """What the last try of this delivery failed with, or nothing."""
    return _trouble.get()


def carried() -> dict[str, str]:
    """The headers of the message at work that everything said about its turn carries on."""
    headers: Mapping[str, str] = _work.get().headers or {}
    return {name: headers[name] for name in _CARRIED if name in headers}


def tenant() -> str:
    """Whose turn is at work."""
    return carried().get(TENANT, "")


def delivered() -> int:
    """How often the broker has delivered the message at work, this time included."""
    return int(_work.get().metadata.num_delivered)


def deliveries() -> int:
    """How many deliveries of the message at work were begun with, this one included: all, unless ``begun`` knows better."""
    return _begun.get() or delivered()


def waited() -> None:
    """Note that the message that this task is for was held here for a while."""
    _waited.set(True)


def comes_late() -> bool:
    """Whether much may have happened to the turn since the message was first delivered: it came again, is tried again, or was held."""
    return _waited.get() or delivered() > 1 or tries() > 0


def begun(before: int) -> None:
    """Note that *before* this delivery only so many were begun with: the others were held for a while, and given back."""
    _begun.set(before + 1)


def attempts() -> int:
    """As ``deliveries``; 1 where no message is at work."""
    return 1 if _work.get(None) is None else deliveries()


def tries() -> int:
    """How often this delivery has been tried before."""
    return _tries.get()


def attempt() -> int:
    """How often the work at hand has been begun, as far as this process knows, this time included."""
    return deliveries() + tries()


def seconds_left() -> float | None:
    """Until the deadline of the message at work, if it has one."""
    deadline = (_work.get().headers or {}).get(DEADLINE)
    return None if deadline is None else float(deadline) - time.time()
