"""What processes tell of themselves, on a real broker with the roles of nats.conf."""

from typing import Any

import pytest

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.reports import Reporter, read_reports, reports_or_none, this_process
from tests.runtime.rig import Rig
from tests.waiting import until
from topics.streams import REPORT_SECONDS, REPORTS, report_key, subject_token


async def told(rig: Rig, worker: str, process: str, facts: dict[str, Any], **options: Any) -> Reporter:
    reporter = Reporter(await rig.client(worker), worker, process, lambda: facts, **options)
    reporter.start()
    return reporter


async def seen(rig: Rig) -> dict[str, Any]:
    """Facts by process, as the door reads them."""
    edge = next((each for each in rig.clients if each.options["name"] == "capibara-edge"), None) or await rig.client("edge")
    return {f"{each['worker']}.{each['process']}": each["facts"] for each in await read_reports(edge)}


async def test_everybody_tells_the_last_that_he_knows(rig: Rig) -> None:
    facts = {"experts": {"phi": {"available": True}}}
    first, second = await told(rig, "caller", "a-1", facts, clock=lambda: 7.0), await told(rig, "router", "a-1", {"routes": {"math": 3}})

    async def both() -> bool:
        return await seen(rig) == {"caller.a-1": facts, "router.a-1": {"routes": {"math": 3}}}

    await until(both)
    (report, _) = await read_reports(await rig.client("caller"))
    assert report == {"worker": "caller", "process": "a-1", "since": 7.0, "at": 7.0, "facts": facts}
    await first.stop()
    await second.stop()


async def test_a_change_is_told_at_once_and_otherwise_every_few_seconds(rig: Rig) -> None:
    facts: dict[str, Any] = {"number": 1}
    reporter, regular = await told(rig, "caller", "a", facts, every=3600), await told(rig, "caller", "b", facts, every=0.05)

    async def number(process: str) -> int:
        return int((await seen(rig)).get(f"caller.{process}", {}).get("number", 0))

    async def shows(process: str, wanted: int) -> bool:
        return await number(process) == wanted

    await until(lambda: shows("a", 1))
    facts["number"] = 2
    await until(lambda: shows("b", 2))
    assert await number("a") == 1
    reporter.changed()
    await until(lambda: shows("a", 2))
    await reporter.stop()
    await regular.stop()


async def test_who_stops_vanishes_at_once(rig: Rig) -> None:
    reporter = await told(rig, "caller", "a", {})
    await until(lambda: seen(rig))
    await reporter.stop()

    async def nobody() -> bool:
        return await seen(rig) == {}

    await until(nobody, 10)


async def test_whoever_dies_is_forgotten_by_the_broker(rig: Rig) -> None:
    info = await rig.admin.stream_info(REPORTS)
    assert info.config.max_age == REPORT_SECONDS
    await rig.admin.update_stream(info.config.evolve(max_age=1, duplicate_window=1))
    reporter = await told(rig, "caller", "a", {}, every=3600)
    await until(lambda: seen(rig))
    assert reporter._task
    reporter._task.cancel()

    async def nobody() -> bool:
        return await seen(rig) == {}

    await until(nobody)


async def test_without_a_broker_nothing_is_told_and_nobody_is_seen(rig: Rig) -> None:
    reporter = await told(rig, "caller", "a", {}, every=0.05)
    await until(lambda: seen(rig))
    left = await rig.client("edge")
    await left.close()
    with pytest.raises(BrokerUnavailable):
        await read_reports(left)
    assert await reports_or_none(left) == []
    await rig.restart(0.5)
    await until(lambda: seen(rig))
    await reporter.stop()


def test_the_name_of_a_process_may_stand_in_a_subject() -> None:
    assert this_process() == subject_token(this_process())


async def test_what_is_no_report_is_passed_over(rig: Rig) -> None:
    edge, caller = await rig.client("edge"), await rig.client("caller")
    for process, body in (
        ("a", b"{"),
        ("b", b"[]"),
        ("c", b'{"worker": 7, "process": "c"}'),
        ("d", b'{"worker": "caller", "process": "d"}'),
    ):
        await caller.publish(report_key("caller", process), body)
    await until(lambda: read_reports(edge))
    assert [each["process"] for each in await read_reports(edge)] == ["d"]
