"""The fenced writer against a real broker that loses, delays, dies and forgets."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from itertools import groupby

import pytest
from nats.aio.msg import Msg

from capibara_flow.domain.turns import turn_id
from capibara_flow.errors import BrokerUnavailable, LeaseLost, Terminal, TooLarge
from capibara_flow.runtime import answers
from capibara_flow.runtime.answers import FencedAnswer, FencedAnswers
from capibara_flow.runtime.client import Hear, flushed
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import Line, Rig, line
from tests.waiting import until
from topics.chat import CancelTurn
from topics.output import Done, Output, Token, Usage

DATA = "cf.out.T1.data.main"
DONE = Done(turn="T1", finish_reason="stop", model_id="phi")


def token(text: object, turn: str = "T1") -> Token:
    return Token(turn=turn, text=str(text))


async def say(answer: FencedAnswer, *texts: object) -> None:
    """Write tokens, each of them a message of its own."""
    for text in texts:
        await answer.finish(token(text, answer.turn))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after overdue acknowledgements soon."""
    monkeypatch.setattr(answers, "_STUCK", 0.3)
    monkeypatch.setattr(answers, "_WATCH", 0.05)


@pytest.fixture
def impatient(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the broker up soon."""
    monkeypatch.setattr(answers, "_PATIENCE", 0.6)


class Acks:
    """The acknowledgements of a ``Line``: as many as *most* get through, others wait for ``release``, or never come."""

    def __init__(self, client: Line, most: int = 0) -> None:
        self._most = most
        self._ears: list[tuple[bytes, bytes, bytes, Hear]] = []
        client.overhear = self._overhear

    def _overhear(self, subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        is_ack = getattr(ear, "__func__", None) is FencedAnswers._acknowledged
        if is_ack and self._most <= 0:
            self._ears.append((subject, headers, data, ear))
            return
        self._most -= is_ack
        ear(subject, headers, data)

    @property
    def held(self) -> int:
        return len(self._ears)

    def open(self) -> None:
        """Let those through that come from now on."""
        self._most = 1_000_000

    def release(self) -> None:
        """Let those through that were held."""
        ears, self._ears = self._ears, []
        for subject, headers, data, ear in ears:
            ear(subject, headers, data)


def lose(client: Line, *places: int) -> list[bytes]:
    """Lose those batches of T1, counted from 0, on their way to the broker; all that were sent."""
    sent: list[bytes] = []

    def swallow(subject: str, body: bytes) -> bool:
        if subject != DATA:
            return False
        sent.append(body)
        return len(sent) - 1 in places

    client.swallow = swallow
    return sent


async def stopping(rig: Rig) -> NatsTurns:
    return NatsTurns(await rig.client("edge"), ())


# --- writing ---------------------------------------------------------------------------------------------------


async def test_output_comes_back_in_order_and_whole(rig: Rig):
    outputs: list[Output] = [*map(token, range(500)), Usage(turn="T1", prompt_tokens=1), DONE]
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        assert answer.said == ()
        for output in outputs[:-2]:
            await answer.write(output)
        await answer.finish(*outputs[-2:])
    assert [output for batch in await rig.said("T1") for output in batch] == outputs


async def test_what_is_written_while_an_acknowledgement_is_pending_leaves_together(rig: Rig):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    async with hub.open("T1", "main") as answer:
        for number in range(10):
            await answer.write(token(number))
        await until(lambda: acks.held)
        assert await rig.tokens("T1") == ["0"]
        acks.open()
        acks.release()
        await answer.finish()
    assert [[output.text for output in batch if isinstance(output, Token)] for batch in await rig.said("T1")] == [
        ["0"],
        [str(number) for number in range(1, 10)],
    ]


async def test_one_batch_is_in_flight_at_a_time(rig: Rig):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    sent = lose(client)
    async with hub.open("T1", "main") as answer:
        await answer.write(token("a"))
        await answer.write(token("b"))
        await until(lambda: acks.held)
        await flushed(client)
        assert len(sent) == 1


async def test_finish_waits_until_all_is_stored(rig: Rig):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    async with hub.open("T1", "main") as answer:
        await answer.write(token("a"))
        finishing = asyncio.create_task(answer.finish(DONE))
        for stored in ([], ["a"]):  # the first batch is acknowledged, and then the second
            await until(lambda: acks.held)
            await flushed(client)
            assert not finishing.done(), stored
            acks.release()
        await finishing
    assert [output for batch in await rig.said("T1") for output in batch] == [token("a"), DONE]


async def test_what_is_written_together_is_stored_together(rig: Rig):
    hub = await rig.answers(await line(rig, "caller"))
    async with hub.open("T1", "main") as answer:
        await answer.write(token("a"), token("b"))
        await answer.write()
        await answer.finish(token("c"), DONE)
        await answer.finish()
    assert await rig.said("T1") == [[token("a"), token("b")], [token("c"), DONE]]


async def test_a_writer_waits_for_a_broker_that_is_slow(rig: Rig):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    written = 0

    async def write() -> None:
        nonlocal written
        for number in range(6000):
            await answer.write(token(number))
            written += 1

    async with hub.open("T1", "main") as answer:
        writing = asyncio.create_task(write())
        await until(lambda: written > 4096 and acks.held)
        await flushed(client)
        assert not writing.done()
        assert written == 4098
        acks.open()
        acks.release()
        await writing
        await answer.finish()
    assert await rig.tokens("T1") == [str(number) for number in range(6000)]


async def test_text_of_more_than_one_batch_is_split_between_lines(rig: Rig):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    texts = [letter * 200_000 for letter in "abcd"] + ["e" * 1_000_000, "f"]
    async with hub.open("T1", "main") as answer:
        await answer.write(token("first"))
        for text in texts:
            await answer.write(token(text))
        await until(lambda: acks.held)
        acks.open()
        acks.release()
        await answer.finish()
    assert await rig.tokens("T1") == ["first", *texts]
    assert [len(batch) for batch in await rig.said("T1")] == [1, 1, 1, 1, 1, 1, 1]


async def test_a_line_larger_than_the_broker_takes_is_refused_and_harms_nobody(rig: Rig):
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer, hub.open("T2", "main") as other:
        await say(answer, "before")
        with pytest.raises(TooLarge):
            await answer.write(token("x" * hub.client.max_payload))
        await say(answer, "after")
        await say(other, "unharmed")
        assert issubclass(TooLarge, Terminal)
    assert hub.client.is_connected
    assert hub.client.stats["reconnects"] == 0
    assert await rig.tokens("T1") == ["before", "after"]
    assert await rig.tokens("T2") == ["unharmed"]


async def test_the_largest_line_that_fits_is_stored(rig: Rig):
    hub = await rig.answers()
    overhead = len(token("").line())
    text = "x" * (hub.client.max_payload - 4096 - overhead)
    async with hub.open("T1", "main") as answer:
        await answer.finish(token(text))
        with pytest.raises(TooLarge):
            await answer.finish(token(text + "x"))
    assert await rig.tokens("T1") == [text]
    assert hub.client.stats["reconnects"] == 0


# --- owning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 256, 257, 600])
async def test_whoever_takes_over_reads_all_that_was_said(rig: Rig, count: int):
    hub, successor = await rig.answers(), await rig.answers()
    async with hub.open("T1", "main") as answer:
        await say(answer, *range(count))
    async with successor.open("T1", "main") as answer:
        assert answer.said == tuple(map(token, range(count)))
    assert len(await rig.said("T1")) == count


async def test_branches_have_owners_of_their_own(rig: Rig):
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer, hub.open("T1", "other") as other:
        await say(answer, "a")
        await say(other, "b")
        assert other.said == ()
    assert await rig.tokens("T1") == ["a"]


async def test_a_zombie_is_refused_and_its_text_never_shows(rig: Rig):
    hub, successor, edge = await rig.answers(), await rig.answers(), await rig.client("edge")
    seen: list[bytes] = []

    async def see(message: Msg) -> None:
        seen.append(message.data)

    await edge.subscribe("cf.live.T1.main", cb=see)
    await flushed(edge)
    async with hub.open("T1", "main") as zombie:
        await say(zombie, "one")
        async with successor.open("T1", "main") as answer:
            with pytest.raises(LeaseLost):
                await say(zombie, "zombie")
            with pytest.raises(LeaseLost):
                await zombie.write(token("zombie again"))
            await say(answer, "two")
    assert await rig.tokens("T1") == ["one", "two"]
    await until(lambda: len(seen) == 2)
    assert not any(b"zombie" in each for each in seen)


async def test_of_many_that_bid_at_once_one_writes_at_a_time(rig: Rig):
    hubs = [await rig.answers() for _ in range(6)]
    start = asyncio.Event()

    async def work(name: str, hub: answers.FencedAnswers) -> bool:
        await start.wait()
        try:
            async with hub.open("T1", "main") as answer:
                await say(answer, *[name] * 5)
        except LeaseLost:
            return False
        return True

    works = [asyncio.create_task(work(str(number), hub)) for number, hub in enumerate(hubs)]
    start.set()
    finished = await asyncio.gather(*works)
    texts = await rig.tokens("T1")
    owners = [owner for owner, _ in groupby(texts)]
    assert len(owners) == len(set(owners))  # whoever was overtaken never wrote again
    for number, done in enumerate(finished):
        assert texts.count(str(number)) == 5 if done else texts.count(str(number)) < 5
    assert finished[int(texts[-1])]


async def test_of_two_that_bid_at_once_the_second_takes_over(rig: Rig):
    hubs = [await rig.answers() for _ in range(2)]
    opened: list[FencedAnswer] = []
    both = asyncio.Event()

    async def bid(hub: answers.FencedAnswers) -> bool:
        async with hub.open("T1", "main") as answer:
            opened.append(answer)
            if len(opened) == 2:
                both.set()
            await both.wait()
            try:
                await say(answer, "mine")
            except LeaseLost:
                return False
            return True

    assert sorted(await asyncio.gather(*map(bid, hubs))) == [False, True]
    assert await rig.tokens("T1") == ["mine"]


async def test_whoever_is_overtaken_between_looking_and_bidding_lost_the_race(rig: Rig):
    first, third, client = await rig.answers(), await rig.answers(), await line(rig, "caller")
    second = await rig.answers(client)
    async with first.open("T1", "main"):
        pass

    async def answered(subject: str) -> None:
        if subject == "$JS.API.STREAM.MSG.GET.CF_OUT":
            async with third.open("T1", "main") as answer:
                await say(answer, "third")

    client.answered = answered
    with pytest.raises(LeaseLost):
        async with second.open("T1", "main"):
            pytest.fail("two owners")
    assert await rig.tokens("T1") == ["third"]


# --- losses ----------------------------------------------------------------------------------------------------


async def test_a_batch_whose_acknowledgement_got_lost_is_not_stored_twice(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    async with hub.open("T1", "main") as answer:
        finishing = asyncio.create_task(answer.finish(token("a"), token("b"), DONE))
        await until(lambda: acks.held)
        acks.open()
        await finishing
    assert [output for batch in await rig.said("T1") for output in batch] == [token("a"), token("b"), DONE]


async def test_a_batch_that_got_lost_is_published_again(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, sent = await rig.answers(client), lose(client, 1)
    async with hub.open("T1", "main") as answer:
        await say(answer, "a", "b", "c")
    assert await rig.tokens("T1") == ["a", "b", "c"]
    assert len(sent) == 4


async def test_a_lost_batch_that_equals_the_one_before_is_published_again(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub = await rig.answers(client)
    lose(client, 1)
    async with hub.open("T1", "main") as answer:
        await say(answer, "ha", "ha", "!")
    assert await rig.tokens("T1") == ["ha", "ha", "!"]


async def test_a_lost_batch_that_equals_what_the_owner_before_said_last_is_published_again(rig: Rig, hasty: None):
    async with (await rig.answers()).open("T1", "main") as answer:
        await say(answer, "ha")
    client = await line(rig, "caller")
    hub = await rig.answers(client)
    lose(client, 0)
    async with hub.open("T1", "main") as answer:
        await say(answer, "ha")
    assert await rig.tokens("T1") == ["ha", "ha"]


async def test_a_batch_that_was_only_late_is_not_stored_twice(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, sent = await rig.answers(client), lose(client, 0)
    async with hub.open("T1", "main") as answer:
        await say(answer, "a")
        assert len(sent) == 2
        client.deliver_late()
        await flushed(client)
        await say(answer, "b")  # the refusal of the late one is not taken for a refusal of ours
    assert await rig.tokens("T1") == ["a", "b"]


async def test_a_late_acknowledgement_is_not_taken_for_that_of_the_next_batch(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, acks, sent = await rig.answers(client), Acks(client), lose(client, 1)
    async with hub.open("T1", "main") as answer:
        await answer.write(token("a"))
        finishing = asyncio.create_task(answer.finish(token("b")))
        await until(lambda: len(sent) == 2)  # "a" was found in the stream, "b" is lost on its way
        acks.release()
        acks.open()
        await finishing
    assert await rig.tokens("T1") == ["a", "b"]


async def test_other_output_on_the_branch_does_not_hide_a_stored_batch(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, acks = await rig.answers(client), Acks(client)
    router = await rig.client("router")
    async with hub.open("T1", "main") as answer:
        await answer.write(token("a"))
        await until(lambda: acks.held)
        await router.jetstream().publish(DATA, token("unfenced").line())
        acks.open()
        await answer.finish()
    assert await rig.tokens("T1") == ["a", "unfenced"]


async def test_a_zombie_without_acknowledgements_learns_that_it_was_overtaken(rig: Rig, hasty: None):
    client, successor = await line(rig, "caller"), await rig.answers()
    hub = await rig.answers(client)
    lose(client, 0)
    async with hub.open("T1", "main") as zombie:
        finishing = asyncio.create_task(zombie.finish(token("zombie")))
        async with successor.open("T1", "main") as answer:
            await say(answer, "a")
            with pytest.raises(LeaseLost):
                await finishing
            await say(answer, "b")
    assert await rig.tokens("T1") == ["a", "b"]


async def test_a_renewed_lease_whose_answer_got_lost_is_still_ours(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub = await rig.answers(client)
    lose(client, 0)
    bids = 0

    async def answered(subject: str) -> None:
        nonlocal bids
        if subject == "cf.out.T1.lease.main":
            bids += 1
            if bids == 1:
                raise TimeoutError

    async with hub.open("T1", "main") as answer:
        client.answered = answered
        await say(answer, "a", "b")
    assert bids == 2
    assert await rig.tokens("T1") == ["a", "b"]


async def test_a_broker_that_dies_in_mid_answer_stores_all_once_and_in_order(rig: Rig, hasty: None):
    hub = await rig.answers()
    written = 0

    async def write() -> None:
        nonlocal written
        for number in range(400):
            await answer.write(token(number))
            written += 1
            await asyncio.sleep(0.002)
        await answer.finish(DONE)

    async with hub.open("T1", "main") as answer:
        writing = asyncio.create_task(write())
        for part in (100, 200):
            await until(lambda part=part: written > part)
            await rig.restart()
        await writing
    assert await rig.tokens("T1") == [str(number) for number in range(400)]
    assert (await rig.said("T1"))[-1][-1] == DONE


async def test_what_the_connection_cannot_keep_while_the_broker_is_away_is_stored_afterwards(rig: Rig, hasty: None):
    hub = await rig.answers()
    text = "x" * (3 * 1024 * 1024)  # more than nats-py holds back for a broker that is away
    async with hub.open("T1", "main") as answer:
        await asyncio.to_thread(rig.broker.kill)
        await until(lambda: not hub.client.is_connected)
        await answer.write(token(text))
        await answer.write(token("b"))
        await asyncio.to_thread(rig.broker.restart)
        await answer.finish()
    assert await rig.tokens("T1") == [text, "b"]


async def test_a_broker_that_stays_away_is_given_up(rig: Rig, impatient: None):
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        await say(answer, "a")
        await asyncio.to_thread(rig.broker.kill)
        with pytest.raises(BrokerUnavailable):
            await answer.finish(token("b"))
        with pytest.raises(BrokerUnavailable):
            await answer.write(token("c"))


@pytest.mark.parametrize("opened", [False, True])
async def test_without_the_output_stream_nothing_is_said(rig: Rig, impatient: None, opened: bool):
    hub = await rig.answers()
    if not opened:
        await rig.admin.delete_stream("CF_OUT")

    async def work() -> None:
        async with hub.open("T1", "main") as answer:
            if opened:
                await rig.admin.delete_stream("CF_OUT")
            await answer.finish(token("a"))

    with pytest.raises(BrokerUnavailable):
        await work()
    assert not hub._open
    assert not hub._expected


async def test_output_that_vanishes_while_it_is_read_is_not_waited_for_for_ever(rig: Rig, impatient: None):
    async with (await rig.answers()).open("T1", "main") as answer:
        await say(answer, "a")
    client = await line(rig, "caller")
    hub = await rig.answers(client)
    looks = 0

    async def answered(subject: str) -> None:
        nonlocal looks
        looks += subject == "$JS.API.STREAM.MSG.GET.CF_OUT"
        if looks == 2:  # the first was for the lease
            await rig.admin.purge_stream("CF_OUT", subject=DATA)

    client.answered = answered
    with pytest.raises(BrokerUnavailable):
        async with hub.open("T1", "main"):
            pytest.fail("it cannot know what was said")


async def test_nothing_of_an_answer_stays_behind(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub = await rig.answers(client)
    lose(client, 0)
    before = len(client._ears)
    async with hub.open("T1", "main") as answer:
        await say(answer, "a", "b")
    assert not hub._open
    assert not hub._expected
    assert len(client._ears) == before


async def test_an_answer_that_was_closed_is_not_looked_after_any_more(rig: Rig, hasty: None):
    client = await line(rig, "caller")
    hub, sent = await rig.answers(client), lose(client, 0)
    renewed, closed, looked = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answered(subject: str) -> None:
        if subject == "cf.out.T1.lease.main":
            renewed.set()
            await closed.wait()
        elif closed.is_set():
            looked.set()

    async with hub.open("T1", "main") as answer:
        client.answered = answered
        await answer.write(token("a"))
        await renewed.wait()
    closed.set()
    await looked.wait()
    await flushed(client)
    assert len(sent) == 1
    assert not hub._expected


# --- stopping --------------------------------------------------------------------------------------------------

Block = Callable[[FencedAnswer], Awaitable[None]]


async def endless(answer: FencedAnswer) -> None:
    await asyncio.Event().wait()


async def test_a_cancellation_leaves_the_block_at_once(rig: Rig):
    hub, turns = await rig.answers(), await stopping(rig)
    async with hub.open("T1", "main") as answer:
        assert not answer.cancelled
        asking = asyncio.create_task(turns.cancel("T1", "asked"))
        async with answer.until_cancelled():
            await endless(answer)
        await asking
        assert answer.cancelled
        await answer.finish(DONE)
    assert await rig.said("T1") == [[DONE]]


async def test_a_cancellation_that_was_stored_before_counts(rig: Rig):
    await (await stopping(rig)).cancel("T1", "asked")
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        assert answer.cancelled
        async with answer.until_cancelled():
            await endless(answer)


async def test_a_cancellation_that_comes_while_the_answer_is_opened_counts(rig: Rig):
    client, turns = await line(rig, "caller"), await stopping(rig)
    hub = await rig.answers(client)
    heard: list[bytes] = []

    def overhear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        ear(subject, headers, data)
        heard.append(subject)

    async def answered(subject: str) -> None:
        if subject == "$JS.API.STREAM.MSG.GET.CF_CTL":  # it has just found nothing
            await turns.cancel("T1", "asked")
            await until(lambda: heard == [b"cf.ctl.T1.cancel"])

    client.overhear, client.answered = overhear, answered
    async with hub.open("T1", "main") as answer:
        assert answer.cancelled


def looks(client: Line) -> list[str]:
    """Grows by the turn of every look for a cancellation that *client* takes."""
    taken: list[str] = []

    def watch(subject: str, body: bytes) -> bool:
        if subject == "$JS.API.STREAM.MSG.GET.CF_CTL":
            taken.append(json.loads(body)["last_by_subj"].split(".")[2])
        return False

    client.swallow = watch
    return taken


def new_turn() -> str:
    return turn_id(milliseconds=time.time_ns() // 1_000_000, entropy=os.urandom(10), tenant="acme")


async def test_who_has_listened_since_before_a_turn_came_does_not_look_whether_it_was_cancelled(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "_SKEW", 0)
    client, turns = await line(rig, "caller"), await stopping(rig)
    early, taken, hub = new_turn(), looks(client), await rig.answers(client)
    await asyncio.sleep(1)  # two clocks are read one behind the other, and between them a busy machine may do something else
    late, cancelled = new_turn(), new_turn()
    await turns.cancel(cancelled, "asked")
    await until(lambda: cancelled in hub._stopped)
    for turn, wanted in ((early, False), (late, False), (cancelled, True)):
        async with hub.open(turn, "main") as answer:
            assert answer.cancelled is wanted
    assert taken == [early]
    await client.force_reconnect()
    await until(lambda: client.returned > 0)
    async with hub.open(cancelled, "other"), hub.open(late, "other"):
        assert taken == [early, cancelled, late]


async def test_who_has_only_just_come_back_looks_whatever_nats_py_still_waits_for(rig: Rig, monkeypatch: pytest.MonkeyPatch, hasty: None):
    monkeypatch.setattr(answers, "_SKEW", 0)
    client = await line(rig, "caller")
    hub, edge = await rig.answers(client), (await rig.client("edge")).jetstream()
    await asyncio.sleep(0.01)
    turn, gone, held = new_turn(), asyncio.Event(), asyncio.Event()
    pong = client._process_pong

    async def late() -> None:  # nats-py calls back behind a round trip
        await held.wait()
        await pong()

    pongs: list[asyncio.Task[None]] = []

    async def hold() -> None:
        pongs.append(asyncio.create_task(late()))

    async def away() -> None:
        gone.set()

    monkeypatch.setattr(client, "_process_pong", hold)
    monkeypatch.setattr(client, "_disconnected_cb", away)
    await client.force_reconnect()
    await gone.wait()
    signal = CancelTurn(turn=turn, reason="asked")
    await edge.publish(signal.subject, signal.model_dump_json().encode())
    await until(lambda: client.stats["reconnects"] and client.is_connected)
    await asyncio.sleep(0.2)  # whoever looks for answers that are open has looked
    async with hub.open(turn, "main") as answer:
        assert answer.cancelled
    held.set()
    await asyncio.gather(*pongs)


async def test_in_a_cluster_it_is_looked_for_always(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "_SKEW", 0)
    client = await line(rig, "caller")
    taken, hub = looks(client), await rig.answers(client)
    await asyncio.sleep(0.01)
    client._server_info["cluster"] = "three"
    turn = new_turn()
    async with hub.open(turn, "main"):
        assert taken == [turn]


async def test_a_cancellation_that_was_heard_and_forgotten_is_looked_for(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "_SKEW", 0)
    monkeypatch.setattr(answers, "_REMEMBERED", 1)
    client, turns = await line(rig, "caller"), await stopping(rig)
    taken, hub = looks(client), await rig.answers(client)
    await asyncio.sleep(0.01)
    first, second = new_turn(), new_turn()
    for turn in (first, second):
        await turns.cancel(turn, "asked")
        await until(lambda turn=turn: turn in hub._stopped)
    for turn in (first, second):
        async with hub.open(turn, "main") as answer:
            assert answer.cancelled
    assert taken[0] == first
    assert len(hub._stopped) == 1


async def test_a_cancellation_that_was_not_heard_is_found_after_a_reconnect(rig: Rig, hasty: None):
    client, turns = await line(rig, "caller"), await stopping(rig)
    hub = await rig.answers(client)
    lost = asyncio.Event()

    def overhear(subject: bytes, headers: bytes, data: bytes, ear: Hear) -> None:
        if subject.startswith(b"cf.ctl."):
            lost.set()
        else:
            ear(subject, headers, data)

    client.overhear = overhear
    async with hub.open("T1", "main") as answer, hub.open("T2", "main") as other:
        await turns.cancel("T1", "asked")
        await lost.wait()
        assert not answer.cancelled
        await client.force_reconnect()
        async with answer.until_cancelled():
            await endless(answer)
        assert not other.cancelled


async def test_asking_twice_is_asking_once(rig: Rig):
    hub, turns = await rig.answers(), await stopping(rig)
    async with hub.open("T1", "main") as answer:
        asking = asyncio.create_task(turns.cancel("T1", "asked"))
        async with answer.until_cancelled():
            try:
                await endless(answer)
            finally:  # an engine that takes its time to stop
                answer.cancel()
                await say(answer, "last words")
        await asking
        await answer.finish(DONE)
    assert await rig.said("T1") == [[token("last words")], [DONE]]


async def test_the_cancellation_of_another_turn_does_nothing(rig: Rig):
    hub, turns = await rig.answers(), await stopping(rig)
    async with hub.open("T1", "main") as answer, hub.open("T2", "main") as other:
        await turns.cancel("T2", "asked")
        await until(lambda: other.cancelled)
        async with answer.until_cancelled():
            await say(answer, "a")
        assert not answer.cancelled
    assert await rig.tokens("T1") == ["a"]


async def test_every_branch_of_a_turn_is_cancelled(rig: Rig):
    hub, turns = await rig.answers(), await stopping(rig)
    async with hub.open("T1", "main") as answer, hub.open("T1", "other") as other:
        await turns.cancel("T1", "asked")
        await until(lambda: answer.cancelled and other.cancelled)


@pytest.mark.parametrize("error", [TimeoutError("of the engine"), LeaseLost("in the block")])
async def test_errors_of_the_block_pass(rig: Rig, error: Exception):
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        with pytest.raises(type(error), match=str(error)):
            async with answer.until_cancelled():
                raise error


async def test_a_block_that_ends_by_itself_is_not_disturbed_by_a_cancellation_after_it(rig: Rig):
    hub, turns = await rig.answers(), await stopping(rig)
    async with hub.open("T1", "main") as answer:
        async with answer.until_cancelled():
            pass
        await turns.cancel("T1", "asked")
        await until(lambda: answer.cancelled)
        await say(answer, "a")
    assert await rig.tokens("T1") == ["a"]


async def test_what_a_newer_version_said_is_passed_over(rig: Rig):
    hub = await rig.answers()
    async with hub.open("T1", "main") as answer:
        await answer.finish(token("a"))
    await hub.client.jetstream().publish("cf.out.T1.data.main", b'{"turn":"T1","event":"sung","notes":[1,2]}')
    async with hub.open("T1", "main") as answer:
        assert answer.said == (token("a"),)
    assert not await hub.ended("T1", "main")
    await hub.stop()
