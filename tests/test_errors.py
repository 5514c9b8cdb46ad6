"""The tree in the docstring of ``errors`` is the tree of its classes."""

import inspect
import re

from capibara_flow import errors
from capibara_flow.errors import CapibaraError, Terminal, Transient


def drawn() -> dict[str, str]:
    """The classes of the docstring, each with the one above it."""
    parents, above = {}, {}
    for indent, name in re.findall(r"^( *)[*x-] (\w+)", errors.__doc__ or "", re.MULTILINE):
        above[len(indent)] = name
        parents[name] = above.get(len(indent) - 2, "Exception")
    return parents


def test_the_tree_is_drawn_as_it_grows() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]
    assert drawn() == {each.__name__: each.__base__.__name__ for each in classes if each.__base__}
    assert drawn()["BadRequest"] == "Terminal"


def test_only_errors_that_may_be_tried_again_say_so() -> None:
    assert all(each.retryable for each in Transient.__subclasses__())
    assert [each.__name__ for each in Terminal.__subclasses__() if each.retryable] == ["QueueFull"]
    assert CapibaraError().title == "capibara error"
