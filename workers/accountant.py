"""ExpertCalled in; the tokens of each answer that ended, written down for its tenant. It also tells usage by day on request."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.accounting import spent
from capibara_flow.errors import CapibaraError
from capibara_flow.ports import Spent, SpentDay
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.hops import Facts
from capibara_flow.runtime.requests import refusal
from capibara_flow.runtime.work import tenant
from topics.chat import ExpertCalled
from topics.flow import hop
from topics.streams import Consumer, Layout
from topics.usage import ReadUsage, UsageDay, UsageListing

HOP = hop("accountant")
_MOST = 20_000  # days of tenants and experts in one reply: the broker takes messages of so many bytes only


class ReadDays(Protocol):
    """The days from *since* to before *until*, of *tenant* or of all, and how many facts are not yet in them."""

    def __call__(self, since: datetime, until: datetime, tenant: str | None) -> Awaitable[tuple[list[SpentDay], int]]:
        """Read them; raises what a store raises."""
        ...


def build(
    broker: NatsBroker,
    *,
    record: Callable[[Spent], Awaitable[None]],
    by_day: ReadDays,
    consumer: Consumer,
    gate: Gate | None = None,
    permits: int = 256,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
) -> FastStream:
    """Wire the accountant onto *broker*: *permits* facts at once, and none while *gate* is shut."""
    facts = Facts(broker, HOP, layout=layout, retry_seconds=retry_seconds)

    @facts.takes(consumer, permits=permits, gate=gate)
    async def write_down(fact: ExpertCalled) -> None:
        if (used := spent(fact, tenant())) is not None:
            await record(used)

    @facts.serves(ReadUsage)
    async def tell(asked: ReadUsage) -> UsageListing:
        since, until = (datetime.fromtimestamp(each, UTC) for each in (asked.since, asked.until))
        try:
            found, waiting = await by_day(since, until, asked.tenant)
        except CapibaraError as error:
            return UsageListing(refused=refusal(error))
        return UsageListing(days=tuple(map(_told, found[:_MOST])), waiting=waiting, more=len(found) > _MOST)

    return FastStream(broker)


def _told(day: SpentDay) -> UsageDay:
    names = ("day", "tenant", "expert", "answers", "prompt_tokens", "completion_tokens")
    return UsageDay(**{name: getattr(day, name) for name in names})
