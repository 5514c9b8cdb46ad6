"""AsyncAPI 3.0 of all workers, computed from what they really subscribe to and publish: ``python -m workers.asyncapi FILE``."""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from faststream.nats import NatsBroker
from faststream.specification import AsyncAPI

from capibara_flow import __version__
from topics.chat import CallExpert
from topics.flow import DOOR, FLOW
from topics.streams import Consumer, accountant_consumer, ingester_consumer, retriever_consumer, router_consumer, undertaker_consumer

#: Needs that exist only once a worker runs; describing it takes none of them.
_NEEDS: dict[str, dict[str, Any]] = {
    "router": {"fleet": None, "answers": None, "consumer": router_consumer()},
    "caller": {"engines": {}, "answers": None, "consumers": {Consumer("CF_WORK_CALL", "caller-{expert}", CallExpert.subjects()): 1}},
    "retriever": {
        "search": None,
        "written": None,
        "documents": None,
        "remove": None,
        "answers": None,
        "join": None,
        "consumer": retriever_consumer(),
    },
    "ingester": {"ingest": None, "check": None, "deposit": None, "answers": None, "consumer": ingester_consumer()},
    "undertaker": {"answers": None, "erase": None, "consumer": undertaker_consumer()},
    "accountant": {"record": None, "by_day": None, "consumer": accountant_consumer()},
}


def described(*names: str) -> dict[str, Any]:
    """The document of the workers *names* (all, and the door, when none is named)."""
    broker = NatsBroker("nats://localhost:4222")
    for hop in FLOW:
        if not names or hop.worker in names:
            import_module(f"workers.{hop.worker}").build(broker, **_NEEDS[hop.worker])
    if not names:
        for message in DOOR:
            broker.publisher(message.pattern, schema=message, title=message.__name__)
    with warnings.catch_warnings():
        # Several workers may say the same message; the document names it once.
        warnings.simplefilter("ignore", RuntimeWarning)
        document = AsyncAPI(broker, title="Capibara Flow", version=__version__).to_specification().to_jsonable()
    return dict(document)


def main() -> int:
    """Write the document to the file that is named."""
    if len(sys.argv) != 2:
        print("usage: python -m workers.asyncapi FILE", file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(yaml.safe_dump(described(), sort_keys=True, allow_unicode=True, width=120), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
