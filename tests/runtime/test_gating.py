"""Who takes work while engines are down: on a real broker, with stages whose gates are turned, and kept by what processes report."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest
from nats.aio.msg import Msg

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.engines import scripted
from capibara_flow.engines.pool import Probing
from capibara_flow.engines.pools import Pools
from capibara_flow.engines.script import Script
from capibara_flow.errors import EngineUnreachable
from capibara_flow.runtime.gating import Gate, Gatekeeper
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.pump import Pump
from capibara_flow.runtime.reports import Reporter, reports_or_none
from capibara_flow.runtime.work import deliveries
from tests.runtime.rig import Rig, ensured
from tests.waiting import until
from topics.chat import RouteTurn
from topics.message import DEADLINE
from topics.streams import router_consumer


def remembering(
    done: list[str], deed: Callable[[], Awaitable[None]] | None = None
) -> Callable[[Stage], Callable[[RouteTurn], Awaitable[None]]]:
    def build(stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            if deed:
                await deed()
            done.append(command.turn)

        return handle

    return build


async def settled(rig: Rig) -> None:
    async def empty() -> bool:
        return await rig.waiting() == 0

    await until(empty)


async def test_while_the_gate_is_shut_others_take_the_work(rig: Rig) -> None:
    gate, here, there = Gate(), [], []
    gate.turn(False)
    async with rig.routing(remembering(here), gate=gate), rig.routing(remembering(there)):
        for number in range(8):
            await rig.ask(f"T{number}")
        await settled(rig)
    assert (here, len(there)) == ([], 8)


async def test_what_waits_is_taken_when_the_gate_opens_again(rig: Rig) -> None:
    gate, here = Gate(), []
    async with rig.routing(remembering(here), gate=gate):
        await rig.ask("T0")
        await settled(rig)
        for number in range(1, 4):  # again and again: a pause leaves nothing behind
            gate.turn(False)
            await paused(rig)
            await rig.ask(f"T{number}")
            await asyncio.sleep(0.1)
            assert len(here) == number
            gate.turn(True)
            await until(lambda number=number: len(here) > number)
        await settled(rig)


async def asking(rig: Rig) -> None:
    """Wait until somebody asks the broker for work."""

    async def heard() -> bool:
        return bool((await rig.admin.consumer_info("CF_WORK_ROUTER", "router")).num_waiting)

    await until(heard)


async def paused(rig: Rig) -> None:
    """Wait until nobody asks the broker for work."""

    async def silent() -> bool:
        return (await rig.admin.consumer_info("CF_WORK_ROUTER", "router")).num_waiting == 0

    await until(silent)


async def test_what_is_at_work_goes_on_behind_a_shut_gate(rig: Rig) -> None:
    gate, here, begun, release = Gate(), [], asyncio.Event(), asyncio.Event()

    async def deed() -> None:
        begun.set()
        await release.wait()

    async with rig.routing(remembering(here, deed), gate=gate):
        await rig.ask("T0")
        await asyncio.wait_for(begun.wait(), 20)
        gate.turn(False)
        await paused(rig)
        release.set()
        await settled(rig)
    assert here == ["T0"]


async def test_what_cannot_be_done_here_goes_to_others_once_it_is_known_that_they_can(rig: Rig) -> None:
    gate, tries, there = Gate(), [], []

    async def deed() -> None:
        tries.append(deliveries())
        if len(tries) == 3:
            gate.turn(False)
        raise EngineUnreachable("gone")

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(rig.routing(remembering([], deed), gate=gate, retry_seconds=0.05))
        await rig.ask("T0", headers={DEADLINE: "99999999999"})
        await until(lambda: len(tries) == 3)
        await stack.enter_async_context(rig.routing(remembering(there)))
        await settled(rig)
    assert (tries, there) == ([1, 1, 1], ["T0"])


async def test_the_last_delivery_is_not_given_away(rig: Rig) -> None:
    gate, tries = Gate(), []
    gate.turn(False)

    async def deed() -> None:
        tries.append(deliveries())
        if len(tries) < 4:
            raise EngineUnreachable("gone")

    opened = Gate()
    async with rig.routing(remembering([], deed), gate=opened, retry_seconds=0.05, max_deliver=1):
        await rig.ask("T0", headers={DEADLINE: "99999999999"})
        await until(lambda: tries)
        opened.turn(False)
        await settled(rig)
    assert set(tries) == {1}
    assert len(tries) == 4


@pytest.fixture
async def pump(rig: Rig) -> AsyncIterator[Callable[..., Awaitable[tuple[Gate, list[str]]]]]:
    """Starts a pump with a gate; what it takes is remembered."""
    pumps: list[Pump] = []

    async def start(heartbeat: float) -> tuple[Gate, list[str]]:
        client = await rig.client("router")
        taken: list[str] = []
        gate = Gate()

        async def handle(message: Msg) -> None:
            taken.append(message.subject)
            await message.ack()

        async def ensure() -> None:
            await ensured(client.jetstream(), router_consumer())

        what = {"permits": 4, "handle": handle, "ensure": ensure, "gate": gate, "heartbeat": heartbeat}
        pumps.append(Pump(client, "CF_WORK_ROUTER", "router", **what))
        await pumps[-1].start()
        return gate, taken

    yield start
    for each in pumps:
        await each.unsubscribe()


async def test_a_pump_that_is_paused_is_not_taken_for_one_whose_requests_got_lost(rig: Rig, pump) -> None:
    gate, taken = await pump(heartbeat=0.1)
    await asking(rig)
    gate.turn(False)
    await paused(rig)
    await rig.ask("T0")
    await asyncio.sleep(1)  # as long as ten heartbeats
    assert taken == []
    gate.turn(True)
    await until(lambda: taken)


async def test_a_pump_goes_on_at_once_when_its_gate_opens(rig: Rig, pump) -> None:
    gate, taken = await pump(heartbeat=14)
    await asking(rig)
    gate.turn(False)
    await paused(rig)
    await rig.ask("T0")
    gate.turn(True)
    await until(lambda: taken, 10)


def told(process: str, *, phi: bool) -> dict[str, Any]:
    return {"process": process, "facts": {"experts": {"phi": {"available": phi}}}}


async def test_the_gate_follows_what_others_report() -> None:
    available, reports, asked = {"phi": True}, [told("b", phi=True)], []

    async def read() -> list[dict[str, Any]]:
        asked.append(True)
        return reports

    keeper = Gatekeeper("a", lambda: available, read, every=0.02)
    gate, other = keeper.gate("phi"), keeper.gate("other")
    keeper.start()
    available["phi"] = False
    keeper.look()
    await asyncio.wait_for(gate.until_shut(), 20)
    assert other.is_open
    reports[:] = [told("b", phi=False)]  # nobody can: it is taken, and so goes on to another expert
    await asyncio.wait_for(gate.until_open(), 20)
    reports[:] = [told("b", phi=True)]
    await asyncio.wait_for(gate.until_shut(), 20)
    available["phi"] = True
    keeper.look()
    await asyncio.wait_for(gate.until_open(), 20)
    seen = len(asked)
    await asyncio.sleep(0.1)
    assert len(asked) == seen  # while all is well nobody is asked
    await keeper.stop()


class Caller:
    """A process that answers with engines: its pools, its reports and its gate, around the handler of a stage."""

    def __init__(self, rig: Rig, name: str, url: str) -> None:
        self.rig, self.name, self.url = rig, name, url
        self.answered: list[str] = []
        self.failed: list[str] = []

    async def run(self, stack: AsyncExitStack) -> None:
        client = await self.rig.client("caller")
        expert = Expert(name="phi", dialect="llama_server", urls=(self.url,))
        self.pools = Pools(Fleet(experts=(expert,)), probing=Probing(up_seconds=0.1, down_seconds=0.1))
        reporter = Reporter(client, "caller", self.name, lambda: {"experts": self.pools.facts()})
        keeper = Gatekeeper(self.name, self.pools.available, lambda: reports_or_none(client), every=0.1)
        self.gate = keeper.gate("phi")
        self.pools.on_change = lambda: (reporter.changed(), keeper.look())[0]
        for each in (self.pools, reporter, keeper):
            each.start()
        stack.push_async_callback(self.pools.aclose)
        stack.push_async_callback(reporter.stop)
        stack.push_async_callback(keeper.stop)
        await stack.enter_async_context(self.rig.routing(self._build, gate=self.gate, retry_seconds=0.05))

    def _build(self, stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            try:
                async with aclosing(self.pools["phi"].stream(command.request)) as pieces:
                    async for _ in pieces:
                        pass
            except EngineUnreachable:
                if self.gate.is_open:
                    self.failed.append(command.turn)  # where a real caller passes it on to the next expert
                    return
                raise
            self.answered.append(command.turn)

        return handle


async def test_a_caller_whose_engines_are_down_leaves_its_turns_to_another_until_that_one_fails_too(rig: Rig) -> None:
    engine, url = await scripted.serve(Script())
    nobody, dead = await scripted.serve(Script())
    await nobody.cleanup()
    async with AsyncExitStack() as stack:
        ill, well = Caller(rig, "ill", dead), Caller(rig, "well", url)
        await well.run(stack)
        await ill.run(stack)
        await asyncio.wait_for(ill.gate.until_shut(), 20)
        for number in range(6):
            await rig.ask(f"T{number}")
        await settled(rig)
        assert (len(well.answered), ill.answered, ill.failed) == (6, [], [])
        await engine.cleanup()
        await until(lambda: not well.pools["phi"].available)
        await asyncio.wait_for(ill.gate.until_open(), 20)
        for number in range(6, 12):
            await rig.ask(f"T{number}")
        await settled(rig)  # nobody waits for its deadline
        assert len(ill.failed) + len(well.failed) == 6


@pytest.mark.parametrize("well", [True, False])
async def test_two_processes_learn_of_each_other_by_their_reports(rig: Rig, well: bool) -> None:
    mine, theirs = {"phi": False}, {"phi": well}
    client, others = await rig.client("caller"), await rig.client("caller")
    reporter = Reporter(others, "caller", "b", lambda: {"experts": {name: {"available": known} for name, known in theirs.items()}})
    reporter.start()
    keeper = Gatekeeper("a", lambda: mine, lambda: reports_or_none(client), every=0.05)
    gate = keeper.gate("phi")
    keeper.start()
    if well:
        await asyncio.wait_for(gate.until_shut(), 20)
        theirs["phi"] = False
        reporter.changed()
    await asyncio.wait_for(gate.until_open(), 20)
    await keeper.stop()
    await reporter.stop()
