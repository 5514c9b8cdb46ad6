"""Turns that nobody reads: what happens when a reader comes back at the very moment."""

from collections.abc import Awaitable, Callable

import pytest
from nats.aio.msg import Msg

from capibara_flow.runtime import readers
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.output import last_message
from capibara_flow.runtime.readers import Absences
from tests.runtime.rig import Rig, line
from tests.waiting import until
from topics.chat import EXPIRED, CancelTurn
from topics.streams import READERS, Layout, due_key, reader_key


async def test_a_reader_that_comes_back_while_we_hear_of_his_absence_is_no_absence(rig: Rig) -> None:
    edge, client = await rig.client("edge"), await line(rig, "undertaker")
    late: list[str] = []

    async def deliver(message: Msg, take: Callable[[Msg], Awaitable[None]]) -> None:
        if message.subject.startswith("$KV") and message.headers and "Nats-Marker-Reason" in message.headers:
            late.append(message.subject)
            await edge.publish(reader_key("T1"), b"", headers={"Nats-TTL": "60s"})
            await flushed(edge)
        await take(message)

    client.deliver = deliver
    absences = Absences(client, Layout())
    await absences.start()
    await edge.publish(reader_key("T1"), b"", headers={"Nats-TTL": "1s"})
    await until(lambda: late)

    async def settled() -> bool:
        info = await rig.admin.consumer_info(READERS, "undertaker")
        return not info.num_pending and not info.num_ack_pending

    await until(settled)
    await absences.stop()
    assert await rig.waiting("CF_CTL") == 0


async def test_an_outage_that_is_long_over_delays_no_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_RETURN", 1000.0)
    edge, client = await rig.client("edge"), await rig.client("undertaker")
    absences = Absences(client, Layout())
    await absences.start()
    await client.force_reconnect()
    await until(lambda: client.returned > 0)
    client.returned -= 1000.0
    await edge.publish(reader_key("T1"), b"", headers={"Nats-TTL": "1s"})

    async def cancelled() -> bool:
        return await rig.waiting("CF_CTL") > 0

    await until(cancelled)
    await absences.stop()


async def test_a_turn_whose_time_is_up_is_ended_as_one(rig: Rig) -> None:
    edge, client = await rig.client("edge"), await rig.client("undertaker")
    absences = Absences(client, Layout())
    await absences.start()
    await edge.publish(due_key("T1"), b"due", headers={"Nats-TTL": "1s"})
    await edge.publish(due_key("T2"), b"due", headers={"Nats-TTL": "1s"})
    await edge.publish(due_key("T2"), b"", headers={"KV-Operation": "PURGE", "Nats-Rollup": "sub", "Nats-TTL": "1s"})

    async def cancelled() -> bool:
        return await rig.waiting("CF_CTL") > 0

    await until(cancelled)
    found = await last_message(client, "cf.ctl.T1.cancel", "CF_CTL")
    assert found is not None
    assert CancelTurn.read(found.data).reason == EXPIRED

    async def settled() -> bool:
        state = (await rig.admin.stream_info(READERS)).state
        info = await rig.admin.consumer_info(READERS, "undertaker")
        return not info.num_pending and not info.num_ack_pending and state.messages <= 1  # the marker of T1 alone, or nothing

    await until(settled)
    await absences.stop()
    assert await rig.waiting("CF_CTL") == 1  # T2 had ended before
