"""Publishing what makes a turn of what is kept of another one: copies of its facts, and the command that begins the rest."""

from collections.abc import Mapping, Sequence

from capibara_flow.domain.forking import Sent
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.lease import unbegun
from capibara_flow.runtime.output import asking, publish_once
from topics.message import TENANT


async def publish(client: TokenClient, messages: Sequence[Sent], headers: Mapping[str, str]) -> None:
    """Store *messages* in order, each with *headers* and its own; raises ``QueueFull``, ``TooLarge`` and ``BrokerUnavailable``.

    The command comes last: until it is stored nobody does anything.
    """
    jetstream = client.jetstream()
    for each in messages:
        if each.call:
            await Lanes(client).announce(each.call, headers[TENANT])  # else nobody may look where it waits
        own = {"Nats-Msg-Id": each.dedupe, "content-type": "application/json"} | each.headers
        if each.opening:
            own |= unbegun(each.subject)
        with asking():
            await publish_once(client, jetstream, each.subject, each.data, own | dict(headers))
