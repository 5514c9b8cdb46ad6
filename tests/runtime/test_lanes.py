"""Turns that wait in lanes, taken by pumps that share: on a real broker, in order, once each, whatever dies or gets lost."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from nats.js.api import ConsumerConfig

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime import brokers, lanes, places, provision
from capibara_flow.runtime.client import flushed
from capibara_flow.runtime.erasing import erase
from capibara_flow.runtime.gating import Gate
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.lanes import Lanes
from capibara_flow.runtime.peers import QUEUE, Peers
from capibara_flow.runtime.queues import Queues, Waits
from capibara_flow.runtime.reports import Reporter
from capibara_flow.runtime.work import attempt, delivered
from tests.runtime.rig import EXPERT, QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import CallExpert, Priority
from topics.flow import hop
from topics.message import TENANT
from topics.output import Failed, Queued
from topics.streams import CALLS, LANES, Consumer, caller_consumer, every_stream, lane_key


@dataclass
class Process:
    """A caller: its stage with *permits* hands, its reports, and what it did; a call lasts until it is let go."""

    rig: Rig
    name: str
    permits: int = 1
    ack_wait: float = 30
    weights: dict[str, float] = field(default_factory=dict)
    every: float = 0.1
    gate: Gate | None = None
    begun: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    deliveries: list[int] = field(default_factory=list)
    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def run(self, stack: AsyncExitStack) -> "Process":
        client = await line(self.rig, "caller")
        self.client: Line = client
        self.lanes = Lanes(client, every=self.every)
        self.peers = Peers(client, (self.name,))
        self.queues = Queues(self.lanes, self.peers, self.weights)
        for each in (self.lanes, self.peers):
            await each.start()
            stack.push_async_callback(each.stop)
        reporter = Reporter(client, "caller", self.name, lambda: {QUEUE: self.queues.facts()})
        self.queues.on_change = reporter.changed
        self.broker = brokers.broker(self.rig.settings, "caller")
        answers = await self.rig.answers(client)
        stage = Stage(self.broker, hop("caller"), answers, lanes=self.lanes, queues=self.queues, retry_seconds=0.05)
        consumer = replace(EXPERT, ack_wait=self.ack_wait)
        stage.takes(consumer, permits=self.permits, gate=self.gate)(self._call)
        await self.broker.start()
        stack.push_async_callback(self.broker.stop)
        reporter.start()
        stack.push_async_callback(reporter.stop)
        return self

    async def _call(self, command: CallExpert) -> None:
        self.begun.append(command.turn)
        self.attempts.append(attempt())
        self.deliveries.append(delivered())
        await self.steps.acquire()

    @property
    def pump(self) -> Any:
        return self.queues._pumps["phi"][0]

    @property
    def held(self) -> int:
        return sum(self.pump.facts()["held"].values())

    async def step(self, count: int = 1) -> None:
        """Let *count* calls end, one after the other, each followed by the next one if any waits."""
        for _ in range(count):
            before = len(self.begun)
            self.steps.release()
            await until(lambda before=before: len(self.begun) > before)

    def release(self, count: int = 1) -> None:
        """Let *count* calls end, now or later."""
        for _ in range(count):
            self.steps.release()

    async def die(self) -> None:
        """As SIGKILL: the connections are gone, and nothing is given back."""
        for client in (self.broker._connection, self.client):
            client._transport.close()
            client.options["allow_reconnect"] = False


@dataclass
class Sender:
    """A router, as far as it sends calls."""

    client: Line
    lanes: Lanes

    async def send(self, turn: str, bucket: int = 0, priority: Priority = "normal", tenant: str = "", *, told: bool = True) -> None:
        command = CallExpert(turn=turn, expert="phi", bucket=bucket, priority=priority, request=QUESTION)
        if told:
            await self.lanes.announce(command, tenant)
        headers = {TENANT: tenant, "content-type": "application/json"}
        await self.client.jetstream().publish(command.subject, command.model_dump_json().encode(), headers=headers)


@pytest.fixture
async def sender(rig: Rig) -> Sender:
    client = await line(rig, "router")
    return Sender(client, Lanes(client))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as open_:
        yield open_


def lanes_config(consumer: Consumer) -> ConsumerConfig:
    return provision.consumer_config(consumer)


async def settled(rig: Rig, left: int = 0) -> None:
    async def empty() -> bool:
        return await rig.waiting(CALLS) == left

    await until(empty)


async def test_tenants_are_served_in_turn_however_many_one_has(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a").run(stack)
    for number in range(6):
        await sender.send(f"H{number}", 1, tenant="heavy")
    await until(lambda: caller.begun)
    for number in range(2):
        await sender.send(f"L{number}", 2, tenant="light")
        await sender.send(f"N{number}", 0)
    await until(lambda: caller.held == 3)
    await caller.step(9)
    assert caller.begun[0] == "H0"
    assert set(Counter(turn[0] for turn in caller.begun[:6]).values()) == {2}
    assert all(
        [turn for turn in caller.begun if turn[0] == who] == sorted(turn for turn in caller.begun if turn[0] == who) for who in "HLN"
    )
    caller.steps.release()
    await settled(rig)
    assert set(caller.attempts) == {1}


async def test_weights_decide_how_often(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a", weights={"big": 3}).run(stack)
    for number in range(10):
        await sender.send(f"B{number}", 1, tenant="big")
        await sender.send(f"S{number}", 2, tenant="small")
    await until(lambda: caller.held == 2)
    await caller.step(8)
    assert 5 <= Counter(turn[0] for turn in caller.begun[1:9])["B"] <= 7
    await caller.step(11)
    caller.steps.release()
    await settled(rig)
    assert set(Counter(caller.begun).values()) == {1}


async def test_a_tenants_urgent_turns_go_first_and_cost_others_nothing(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a").run(stack)
    await sender.send("first", 1)
    await until(lambda: caller.begun)
    for turn, priority in (("low", "low"), ("normal", "normal"), ("high", "high"), ("high2", "high")):
        await sender.send(turn, 1, priority)
        await sender.send(f"other-{turn}", 2)
    await until(lambda: caller.held == 4)
    await caller.step(8)
    mine = [turn for turn in caller.begun if not turn.startswith("other")]
    assert mine == ["first", "high", "high2", "normal", "low"]
    assert sum(turn.startswith("other") for turn in caller.begun[1:7]) == 3
    caller.steps.release()
    await settled(rig)


# --- several processes ----------------------------------------------------------------------------------------------


async def test_what_is_held_goes_to_whoever_gets_a_hand_free(rig: Rig, sender: Sender, stack: AsyncExitStack):
    full = await Process(rig, "full").run(stack)
    await sender.send("T0", 1)
    await until(lambda: full.begun)
    await sender.send("T1", 1)
    await sender.send("T2", 2)
    await until(lambda: full.held == 2)
    idle = await Process(rig, "idle", permits=2).run(stack)
    await until(lambda: len(idle.begun) == 2)
    assert full.begun == ["T0"]
    assert idle.attempts == [1, 1]  # that it was held is no attempt
    await sender.send("T3", 2)
    await until(lambda: full.held + idle.held == 1)  # both are full again: somebody holds it
    for each in (full, idle):
        each.release(3)
    await settled(rig)
    assert sorted(full.begun + idle.begun) == ["T0", "T1", "T2", "T3"]


async def test_while_others_have_hands_free_a_full_process_holds_nothing(rig: Rig, sender: Sender, stack: AsyncExitStack):
    full = await Process(rig, "full").run(stack)
    idle = await Process(rig, "idle", permits=8).run(stack)
    await sender.send("T0", 1)
    await until(lambda: full.begun or idle.begun)
    for number in range(1, 8):
        await sender.send(f"T{number}", 1 + number % 3)
    await until(lambda: len(full.begun + idle.begun) == 8)
    assert full.held == idle.held == 0
    for each in (full, idle):
        each.release(8)
    await settled(rig)


async def test_what_a_dead_process_held_is_done_by_another_and_counts_no_attempt(rig: Rig, sender: Sender, stack: AsyncExitStack):
    first = await Process(rig, "first", ack_wait=1).run(stack)
    await sender.send("T0", 1)
    await until(lambda: first.begun)
    for number in range(1, 4):
        await sender.send(f"T{number}", number)
    await until(lambda: first.held == 3)
    await first.die()
    second = await Process(rig, "second", permits=4, ack_wait=1).run(stack)
    await until(lambda: len(second.begun) == 4)
    assert Counter(second.begun) == Counter({f"T{number}": 1 for number in range(4)})
    assert set(second.attempts) == {1}  # T0 had written nothing either
    for _ in range(4):
        second.steps.release()
    await settled(rig)


async def test_what_was_held_for_longer_than_the_broker_waits_is_not_begun_here(rig: Rig, sender: Sender, stack: AsyncExitStack):
    first = await Process(rig, "first", ack_wait=1).run(stack)
    await sender.send("T0", 1)
    await until(lambda: first.begun)
    await sender.send("T1", 2)
    await until(lambda: first.held == 1)
    for lane in first.pump._lanes.values():
        for head in lane.held.values():
            head.kept -= 5  # as if this process had been paused
    first.steps.release()
    first.steps.release()
    await until(lambda: len(first.begun) == 2)  # the broker gives it again
    await settled(rig)
    assert (first.begun, first.deliveries, first.attempts) == (["T0", "T1"], [1, 2], [1, 1])


async def test_what_was_erased_while_it_was_held_is_not_begun(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a").run(stack)
    await sender.send("T0", 1)
    await until(lambda: caller.begun)
    await sender.send("T1", 2)
    await sender.send("T2", 3)
    await until(lambda: caller.held == 2)
    await erase(await rig.client("undertaker"), "T1", every_stream(), retry_seconds=0)
    caller.release(2)
    await settled(rig)
    assert caller.begun == ["T0", "T2"]
    assert await rig.said("T1") == []


async def test_held_turns_are_given_back_when_the_gate_shuts_and_at_the_end(rig: Rig, sender: Sender, stack: AsyncExitStack):
    gate = Gate()
    first = await Process(rig, "first", gate=gate).run(stack)
    await sender.send("T0", 1)
    await until(lambda: first.begun)
    await sender.send("T1", 2)
    await sender.send("T2", 3)
    await until(lambda: first.held == 2)
    gate.turn(False)
    await until(lambda: first.held == 0)
    second = await Process(rig, "second").run(stack)
    await until(lambda: len(second.begun) == 1 and second.held == 1)
    gate.turn(True)
    first.steps.release()  # T0 ends: a free hand here, and what the other one holds comes back
    await until(lambda: len(first.begun) == 2)
    assert sorted(first.begun + second.begun) == ["T0", "T1", "T2"]
    first.steps.release()
    second.steps.release()
    await settled(rig)


async def test_nobody_dies_of_being_held_again_and_again(rig: Rig, sender: Sender, stack: AsyncExitStack):
    await sender.lanes.announce(CallExpert(turn="T", expert="phi", bucket=1, request=QUESTION), "")
    client = await rig.client("caller")
    jetstream = client.jetstream()
    consumer = caller_consumer("phi", "1")
    await rig.admin.add_consumer(CALLS, lanes_config(consumer))
    await sender.send("T1", 1)
    subscription = await jetstream.pull_subscribe_bind(consumer.durable, CALLS)
    for _ in range(6):  # more than the four that an attempt may fail
        [message] = await subscription.fetch(1, timeout=20)
        await message.nak()
    await subscription.unsubscribe()
    caller = await Process(rig, "a").run(stack)
    await until(lambda: caller.begun == ["T1"])
    assert caller.attempts == [1]
    caller.steps.release()
    await settled(rig)


async def test_a_turn_that_its_processes_do_not_survive_ends(rig: Rig, sender: Sender, stack: AsyncExitStack):
    client = await rig.client("caller")
    hub = await rig.answers()
    await sender.send("T1", 0)
    subscription = await client.jetstream().pull_subscribe_bind(EXPERT.durable, CALLS)
    [message] = await subscription.fetch(1, timeout=20)
    await client.publish("cf.out.T1.lease.main", b"somebody who died of it 4")
    await flushed(client)
    await message.nak()
    await subscription.unsubscribe()
    caller = await Process(rig, "a").run(stack)
    await settled(rig)
    assert caller.begun == []
    said = [output for batch in await rig.said("T1") for output in batch]
    assert isinstance(said[-1], Failed)
    await hub.stop()


# --- lanes come and go ------------------------------------------------------------------------------------------------


async def test_a_notice_that_got_lost_strands_no_turn(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a").run(stack)
    caller.client.overhear = lambda subject, headers, data, hear: None if b"CF_LANES" in subject else hear(subject, headers, data)
    caller.steps.release()
    await sender.send("T1", 7, "high")
    await until(lambda: caller.begun == ["T1"])
    await settled(rig)


async def test_who_starts_later_finds_the_lanes_that_there_are(rig: Rig, sender: Sender, stack: AsyncExitStack):
    await sender.send("T1", 7, "low", "acme")
    caller = await Process(rig, "a", every=60).run(stack)
    await until(lambda: caller.begun == ["T1"])
    assert caller.lanes.of("phi") == {"7-low": "acme"}
    caller.steps.release()
    await settled(rig)


async def test_turns_whose_lane_nobody_has_told_are_found_in_the_queue(rig: Rig, sender: Sender, stack: AsyncExitStack):
    """A release that knew of no lanes sent them to a bucket, or the lanes were lost."""
    await sender.send("T1", 7, told=False)
    caller = await Process(rig, "a", every=0.05).run(stack)
    await until(lambda: caller.begun == ["T1"])
    await sender.send("T2", 8, told=False)
    caller.steps.release()
    await until(lambda: caller.begun == ["T1", "T2"])
    assert caller.lanes.of("phi") == {"7": "", "8": ""}
    caller.steps.release()
    await settled(rig)


async def test_a_lane_that_is_used_no_more_is_let_go_and_comes_back(
    rig: Rig, sender: Sender, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
):
    caller = await Process(rig, "a", every=0.05).run(stack)
    await sender.send("T1", 7)
    await until(lambda: caller.begun == ["T1"])
    caller.steps.release()
    await settled(rig)
    await rig.admin.purge_stream(LANES)
    monkeypatch.setattr(lanes, "LANE_SECONDS", 0.0)
    await until(lambda: caller.pump.lanes == {"0"})
    monkeypatch.undo()
    again = Sender(sender.client, Lanes(sender.client))
    await again.send("T2", 7)
    await until(lambda: caller.begun == ["T1", "T2"])
    caller.steps.release()
    await settled(rig)


async def test_a_lane_is_told_once_in_a_while_and_the_first_one_never(rig: Rig):
    client = await rig.client("router")
    times = [0.0]
    told = Lanes(client, clock=lambda: times[-1])
    command = CallExpert(turn="T", expert="phi", bucket=3, request=QUESTION)

    async def keys() -> int:
        return int((await rig.admin.stream_info(LANES)).state.last_seq)

    await told.announce(command.model_copy(update={"bucket": 0}), "")
    assert await keys() == 0
    for each in (0.0, 599.0, 601.0):
        times.append(each)
        await told.announce(command, "acme")
    assert await keys() == 2
    last = await rig.admin.get_last_msg(LANES, lane_key("phi", "3"))
    assert last.data == b"acme"
    await rig.admin.delete_stream(LANES)
    times.append(2000.0)
    with pytest.raises(BrokerUnavailable):
        await told.announce(command, "acme")


# --- how long it will take ------------------------------------------------------------------------------------------


async def test_who_has_to_wait_is_told_his_place_and_who_does_not_is_not(rig: Rig, sender: Sender, stack: AsyncExitStack):
    caller = await Process(rig, "a").run(stack)
    peers = Peers(sender.client)
    await peers.start()
    waits = Waits(sender.client, peers, sender.lanes, {})

    async def told(turn: str, bucket: int) -> list[int]:
        command = CallExpert(turn=turn, expert="phi", bucket=bucket, request=QUESTION)
        async with waits.telling(command, "") as found:
            await sender.send(turn, bucket)
        return [each.position for each in found]

    await until(lambda: peers.of("phi"))
    assert await told("T0", 1) == []
    await until(lambda: caller.begun)
    assert await told("T1", 1) == [1]
    assert await told("T2", 1) == [2]
    assert await told("T3", 1) == [3]
    assert await told("L1", 2) == [1]  # not behind all of them
    assert await told("T4", 1) == [5]
    for _ in range(6):
        caller.steps.release()
    await settled(rig)


async def test_who_waits_hears_of_his_place_again_until_somebody_begins(
    rig: Rig, sender: Sender, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(places, "SHORT", 0.0)  # calls are short here, and it is told all the same
    caller = await Process(rig, "a").run(stack)
    peers = Peers(sender.client)
    await peers.start()
    turns = [f"T{number}" for number in range(6)]
    for turn in turns:
        await sender.send(turn, 1)
    await until(lambda: caller.begun == ["T0"] and [desk.work for desk in peers.of("phi")] == [{"1": 1}])
    for _ in range(2):  # as two routers
        told_by = places.Places(sender.client, peers, sender.lanes, {}, lambda: ["phi", "nobody"], every=0.05)
        told_by.start()
        stack.push_async_callback(told_by.stop)

    async def told() -> list[list[int]]:
        said = [[output for batch in await rig.said(turn) for output in batch] for turn in turns]
        return [[output.position for output in each if isinstance(output, Queued)] for each in said]

    async def heard(*positions: list[int]) -> None:
        async def so() -> bool:
            return await told() == list(positions)

        await until(so)

    await heard([], [1], [2], [3], [4], [5])
    await caller.step()  # T1
    await heard([], [1], [2, 1], [3], [4, 3], [5])
    async with (await rig.answers(await line(rig, "caller"))).open("T3", "main"):  # somebody begins who reports nothing
        await caller.step()
        await heard([], [1], [2, 1], [3], [4, 3], [5, 3])
        await caller.step()
        await heard([], [1], [2, 1], [3], [4, 3, 1], [5, 3])
    caller.release(3)
    await settled(rig)


async def test_who_comes_late_by_an_old_name_stands_behind_those_who_wait(
    rig: Rig, sender: Sender, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(places, "SHORT", 0.0)
    caller = await Process(rig, "a").run(stack)
    peers = Peers(sender.client)
    await peers.start()
    told_by = places.Places(sender.client, peers, sender.lanes, {}, lambda: ["phi"], every=0.05)
    stack.push_async_callback(told_by.stop)
    told_by.start()

    async def told(turn: str) -> list[int]:
        return [output.position for batch in await rig.said(turn) for output in batch if isinstance(output, Queued)]

    async def heard(turn: str, *positions: int) -> None:
        async def so() -> bool:
            return await told(turn) == list(positions)

        await until(so)

    for turn in ("T2", "T3", "T4"):
        await sender.send(turn, 1)
    await heard("T4", 2)
    await sender.send("T1", 1)  # asked first, but its sources took their time
    await heard("T1", 3)
    await caller.step()
    await heard("T4", 2, 1)
    assert await told("T3") == [1]
    assert await told("T2") == []
    caller.release(3)
    await settled(rig)
