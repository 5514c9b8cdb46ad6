"""IngestDocument in; what became of the document out: Ingested and Done to whoever waits, DocumentIngested to the log.

It also looks, on request, whether the stores agree, for it knows what is being worked on.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from faststream import FastStream
from faststream.nats import NatsBroker

from capibara_flow.domain.continuing import held
from capibara_flow.domain.ingesting import Finding
from capibara_flow.errors import CapibaraError, DocumentRefused
from capibara_flow.ports import Answers
from capibara_flow.runtime.depositing import Deposit
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.ingesting import File, Taken, disagreement
from capibara_flow.runtime.requests import refusal
from capibara_flow.runtime.work import carried, tenant
from capibara_flow.telemetry import INGESTED
from topics.flow import hop
from topics.grounding import Checked, CheckStores, DocumentIngested, IngestDocument
from topics.knowledge import Scope
from topics.message import PRINCIPAL
from topics.output import Done, Ingested
from topics.streams import Consumer, Layout

HOP = hop("ingester")
_MOST = 5000  # findings in one reply: the broker takes messages of so many bytes only


class TakeIn(Protocol):
    """Takes a file in; doing it twice is doing it once. Raises ``DocumentRefused`` and transient errors."""

    def __call__(self, scope: Scope, file: File) -> Awaitable[Taken]:
        """Take *file* in."""
        ...


def build(
    broker: NatsBroker,
    *,
    ingest: TakeIn,
    check: Callable[[bool], Awaitable[Sequence[Finding]]],
    deposit: Deposit,
    answers: Answers,
    consumer: Consumer,
    permits: int = 2,
    layout: Layout | None = None,
    retry_seconds: float = 2.0,
    patience_seconds: float | None = None,
    clock: Callable[[], float] = time.time,
) -> FastStream:
    """Wire the ingester onto *broker*: *permits* documents at once."""
    stage = Stage(broker, HOP, answers, layout=layout, retry_seconds=retry_seconds, patience_seconds=patience_seconds)

    @stage.serves(CheckStores)
    async def look(asked: CheckStores) -> Checked:
        try:
            found = await check(asked.repair)
        except CapibaraError as error:
            return Checked(refused=refusal(error))
        return Checked(findings=tuple(map(disagreement, found[:_MOST])), more=max(0, len(found) - _MOST))

    @stage.takes(consumer, permits=permits)
    async def take_in(command: IngestDocument) -> None:
        started = clock()
        async with answers.open(command.turn, "main") as answer:
            if held(answer.said).ended:
                await deposit.remove(command.turn)
                return
            taken: Taken | None = None
            async with answer.until_cancelled():
                data = await deposit.fetch(command.turn, command.pieces, command.size)
                try:
                    taken = await ingest(Scope(tenant(), command.collection), _file(command, data))
                except DocumentRefused:
                    await deposit.remove(command.turn)  # who sends it again has corrected it
                    raise
            if taken is None:
                await answer.finish(Done(turn=command.turn, finish_reason="cancelled", model_id=""))
            else:
                await answer.finish(*_told(command, taken, clock() - started))
        if taken is not None:
            INGESTED.labels(taken.how).inc()
            facts = {"document": taken.document.id, "how": taken.how, "passages": taken.document.passages}
            await stage.say(DocumentIngested(turn=command.turn, **facts, started=started, ended=clock()))
        await deposit.remove(command.turn)

    return FastStream(broker)


def _file(command: IngestDocument, data: bytes) -> File:
    same = {name: getattr(command, name) for name in ("name", "address", "title")}
    return File(data, media_type=command.media_type or None, owner=carried().get(PRINCIPAL, ""), **same)


def _told(command: IngestDocument, taken: Taken, seconds: float) -> tuple[Ingested, Done]:
    document = taken.document
    ingested = Ingested(turn=command.turn, document=document.id, how=taken.how, title=document.title, passages=document.passages)
    return ingested, Done(turn=command.turn, finish_reason="ingested", model_id="", timings={"total": round(seconds, 3)})
