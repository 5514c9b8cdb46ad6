"""The pump against a real broker that deletes, forgets and dies."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from threading import Thread

import nats
import pytest
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from capibara_flow.runtime import connection
from capibara_flow.runtime.pump import Pump
from tests.runtime.rig import Line, Rig, ensured, line
from tests.waiting import until
from topics.streams import router_consumer


class Hands:
    """A handler that remembers: who is at work, who is done; jobs last as long as their message is told to."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.most = 0
        self.done: list[str] = []
        self.redelivered = 0
        self.release = asyncio.Event()
        self.seconds: Callable[[], float] | None = None

    async def __call__(self, message: Msg) -> None:
        turn = message.subject.split(".")[2]
        self.redelivered += message.metadata.num_delivered > 1
        self.running.add(turn)
        self.most = max(self.most, len(self.running))
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds())
            else:
                await self.release.wait()
            self.done.append(turn)
        except asyncio.CancelledError:
            await message.nak()
            raise
        finally:
            self.running.discard(turn)
        with suppress(NatsError, TimeoutError):  # while the broker is away
            await message.ack_sync(timeout=2)


@pytest.fixture
def hands() -> Hands:
    return Hands()


Started = Callable[..., Awaitable[Pump]]


@pytest.fixture
async def pumping(rig: Rig, hands: Hands):
    pumps = []

    async def start(
        handle: Callable[[Msg], Awaitable[None]] = hands, client: Line | None = None, ack_wait: float = 60, **options: float
    ) -> Pump:
        connection = client or await rig.client("router")
        consumer = replace(router_consumer(), ack_wait=ack_wait)
        jetstream = connection.jetstream()
        arguments = {"permits": 4, "heartbeat": 0.5, **options}
        pump = Pump(connection, consumer.stream, consumer.durable, handle=handle, ensure=lambda: ensured(jetstream, consumer), **arguments)
        await pump.start()
        pumps.append(pump)
        return pump

    yield start
    for pump in pumps:
        await pump.unsubscribe()
        await pump.finish(0.1)


async def asked(rig: Rig) -> bool:
    """Whether somebody's request stands at the broker."""
    return (await rig.admin.consumer_info("CF_WORK_ROUTER", "router")).num_waiting > 0


async def test_never_more_messages_than_hands(rig: Rig, hands: Hands, pumping: Started):
    chance = random.Random(7)
    hands.seconds = lambda: chance.choice([0, 0.01, 0.1])
    await pumping(permits=5)
    outstanding = []
    for number in range(120):
        await rig.ask(f"T{number}")
        info = await rig.admin.consumer_info("CF_WORK_ROUTER", "router")
        outstanding.append(info.num_ack_pending)
    while len(hands.done) < 120:
        outstanding.append((await rig.admin.consumer_info("CF_WORK_ROUTER", "router")).num_ack_pending)
    assert max(outstanding) == hands.most == 5
    assert Counter(hands.done) == Counter({f"T{number}": 1 for number in range(120)})
    await until(lambda: empty(rig))


async def empty(rig: Rig) -> bool:
    return await rig.waiting() == 0


async def test_hands_that_are_all_busy_leave_the_rest_to_others(rig: Rig, hands: Hands, pumping: Started):
    await pumping(permits=2)
    for number in range(5):
        await rig.ask(f"T{number}")
    await until(lambda: len(hands.running) == 2)
    other = Hands()
    other.seconds = lambda: 0
    await pumping(other, permits=1)
    await until(lambda: len(other.done) == 3)
    hands.release.set()
    await until(lambda: len(hands.done) == 2)
    assert not set(hands.done) & set(other.done)


async def test_goes_on_after_its_consumer_was_deleted(rig: Rig, hands: Hands, pumping: Started):
    hands.release.set()
    await pumping()
    await until(lambda: asked(rig))
    await rig.admin.delete_consumer("CF_WORK_ROUTER", "router")
    await rig.ask("T1")
    await until(lambda: hands.done == ["T1"])


async def test_creates_its_stream_anew_when_it_was_deleted(rig: Rig, hands: Hands, pumping: Started):
    hands.release.set()
    await pumping()
    await until(lambda: asked(rig))
    await rig.admin.delete_stream("CF_WORK_ROUTER")

    async def there() -> bool:
        try:
            return (await rig.admin.consumer_info("CF_WORK_ROUTER", "router")).num_waiting > 0
        except NotFoundError:
            return False

    await until(there)
    await rig.ask("T1")
    await until(lambda: hands.done == ["T1"])


async def test_goes_on_after_the_broker_was_killed(rig: Rig, hands: Hands, pumping: Started):
    hands.release.set()
    await pumping()
    await rig.ask("T1")
    await until(lambda: hands.done == ["T1"])
    await rig.restart()
    await rig.ask("T2")
    await until(lambda: hands.done == ["T1", "T2"])


async def test_asks_again_when_its_last_hand_got_free_while_the_broker_was_away(rig: Rig, hands: Hands, pumping: Started):
    client = await rig.client("router")
    await pumping(client=client, permits=1)
    await rig.ask("T1")
    await until(lambda: hands.running)
    await asyncio.to_thread(rig.broker.kill)
    await until(lambda: not client.is_connected)
    hands.release.set()
    await until(lambda: hands.done)
    await asyncio.to_thread(rig.broker.restart)
    await rig.ask("T2")
    await until(lambda: "T2" in hands.done)


@pytest.mark.slow
async def test_no_hand_is_lost_with_the_requests_that_the_broker_forgot(rig: Rig, hands: Hands, pumping: Started):
    # Two of four hands wait in a request that dies with the broker, while work goes on and on, so that there is never silence.
    client = await rig.client("router")
    await pumping(client=client, heartbeat=2)
    await rig.ask("T1")
    await rig.ask("T2")
    await until(lambda: len(hands.running) == 2)
    await rig.restart()
    await until(lambda: client.is_connected)
    hands.release.set()
    hands.seconds = lambda: 0.1
    hands.most = 0

    async def feed() -> None:
        for number in range(100_000):
            await rig.ask(f"M{number}")
            await asyncio.sleep(0.005 if await rig.waiting() < 50 else 0.1)

    feeding = asyncio.create_task(feed())
    await until(lambda: hands.most == 4, 20)
    feeding.cancel()


@pytest.mark.slow
async def test_a_request_that_never_arrived_is_made_anew(rig: Rig, hands: Hands, pumping: Started):
    # As when the leader of a cluster dies: nobody says so, and heartbeats of later requests go on.
    client = await line(rig, "router")
    hands.seconds = lambda: 0.05
    lost = []

    def swallow(subject: str, body: bytes) -> bool:
        lost.append(subject)
        return ".MSG.NEXT." in subject and len([each for each in lost if ".MSG.NEXT." in each]) == 3

    client.swallow = swallow
    await pumping(client=client, expires=2)
    hands.most = 0

    async def feed() -> None:
        for number in range(100_000):
            await rig.ask(f"T{number}")
            await asyncio.sleep(0.005 if await rig.waiting() < 50 else 0.1)

    feeding = asyncio.create_task(feed())
    await until(lambda: len([each for each in lost if ".MSG.NEXT." in each]) > 10)
    hands.most = 0
    await until(lambda: hands.most == 4, 20)
    feeding.cancel()


async def test_stopping_takes_nothing_more_and_lets_work_finish(rig: Rig, hands: Hands, pumping: Started):
    pump = await pumping()
    await rig.ask("T1")
    await until(lambda: hands.running)
    await pump.unsubscribe()
    await rig.ask("T2")
    hands.release.set()
    await pump.finish(20)
    assert hands.done == ["T1"]
    info = await rig.admin.consumer_info("CF_WORK_ROUTER", "router")
    assert (info.num_pending, info.num_ack_pending, info.num_waiting) == (1, 0, 0)


async def test_late_work_is_handed_over_at_once(rig: Rig, hands: Hands, pumping: Started):
    pump = await pumping(ack_wait=60)
    await rig.ask("T1")
    await until(lambda: hands.running)
    await pump.unsubscribe()
    await pump.finish(0.05)
    assert hands.done == []
    other = Hands()
    other.release.set()
    await pumping(other)
    await until(lambda: other.done == ["T1"], 20)


async def publish(addresses: list[str], subject: str) -> None:
    client = await nats.connect(addresses, inbox_prefix="_INBOX_edge")
    await client.jetstream().publish(subject, b"{}")
    await asyncio.sleep(0.2)
    await client.close()


async def test_what_arrives_at_a_closing_door_is_given_back_at_once(rig: Rig, hands: Hands, pumping: Started):
    pump = await pumping(ack_wait=60)
    await until(lambda: asked(rig))
    # The broker hands over while this loop does not look: messages lie in the socket when we say that we want no more.
    publishing = Thread(target=asyncio.run, args=(publish(connection.addresses(rig.settings, "edge"), "cf.work.T1.router"),))
    publishing.start()
    publishing.join()
    await pump.unsubscribe()
    assert not hands.running
    other = Hands()
    other.release.set()
    await pumping(other)
    await until(lambda: other.done == ["T1"], 20)


async def test_provisioning_is_tried_until_it_works(rig: Rig, hands: Hands, pumping: Started):
    hands.release.set()
    await asyncio.to_thread(rig.broker.kill)
    starting = asyncio.create_task(pumping(client=rig.clients[0]))  # the provisioner may not publish work, but pull it
    await starting
    await asyncio.to_thread(rig.broker.restart)
    await rig.ask("T1")
    await until(lambda: hands.done == ["T1"])


async def test_what_comes_again_while_it_is_at_work_here_is_not_begun_again(rig: Rig, hands: Hands, pumping: Started):
    """As after a pause of the whole process: the broker gave the message to somebody else, and that was the same process."""
    await pumping(ack_wait=0.5)
    await rig.ask("T1")
    await until(lambda: hands.running)

    async def came_again() -> bool:
        info = await rig.admin.consumer_info("CF_WORK_ROUTER", "router")
        return bool(info.num_redelivered and info.delivered.consumer_seq > 2)

    await until(came_again)
    hands.release.set()

    async def settled() -> bool:
        return await rig.waiting() == 0

    await until(settled)
    assert hands.done == ["T1"]
    await rig.ask("T2")
    await until(lambda: hands.done == ["T1", "T2"])
