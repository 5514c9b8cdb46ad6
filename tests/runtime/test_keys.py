"""What an ``Idempotency-Key`` stands for: one turn, whoever comes, until nothing can be known of it any more."""

import asyncio
import time

import pytest

from capibara_flow.domain.turns import created, turn_id
from capibara_flow.errors import BrokerUnavailable, KeyReused, QueueFull
from capibara_flow.ports import Identity
from capibara_flow.runtime.keys import Keys
from capibara_flow.runtime.output import Stored, last_message
from capibara_flow.runtime.turns import NatsTurns
from tests.runtime.rig import QUESTION, Line, Rig, line
from tests.waiting import until
from topics.chat import RouteTurn
from topics.output import Token
from topics.streams import KEYS

ANA = Identity(principal="ana", tenant="acme")


def a_turn(number: int, age_seconds: float = 0) -> str:
    return turn_id(milliseconds=int((time.time() - age_seconds) * 1000), entropy=number.to_bytes(10, "big"), tenant="acme")


#: How long each turn may take, in seconds: longer than all tests together, which begin long after these turns were made.
MOST = 10_000
NEW, OTHER, OLD, OLDER = a_turn(1), a_turn(2), a_turn(3, MOST + 100), a_turn(4, MOST + 200)


async def owner(keys: Keys | NatsTurns, key: str, digest: str, turn: str) -> str:
    """Who has *key*, once *turn*, which may take ``MOST`` seconds, has come with it."""
    found, _ = await keys.claim(key, digest, turn, created(turn) + MOST)
    return found


@pytest.fixture
async def client(rig: Rig) -> Line:
    return await line(rig, "edge")


@pytest.fixture
def keys(client: Line) -> Keys:
    return Keys(client)


async def last(client: Line) -> Stored | None:
    return await last_message(client, "$KV.CF_KEYS.k.*", KEYS)


async def test_a_key_stands_for_the_first_turn_that_came_with_it(rig: Rig, keys: Keys):
    elsewhere = Keys(await rig.client("edge"))
    assert await owner(keys, "k", "same", NEW) == NEW
    assert await owner(elsewhere, "k", "same", OTHER) == NEW
    assert await owner(keys, "k", "same", a_turn(5)) == NEW
    assert await owner(elsewhere, "k2", "same", OTHER) == OTHER


async def test_another_request_under_the_key_is_refused(rig: Rig, keys: Keys):
    await owner(keys, "k", "same", NEW)
    with pytest.raises(KeyReused):
        await owner(keys, "k", "another", OTHER)
    assert await owner(keys, "k", "same", OTHER) == NEW


async def test_of_many_who_come_at_once_one_is_let_in(rig: Rig):
    doors = [Keys(await rig.client("edge")) for _ in range(4)]
    found = await asyncio.gather(
        *(owner(door, "k", "same", a_turn(10 * place + number)) for number in range(8) for place, door in enumerate(doors))
    )
    assert len(set(found)) == 1
    assert await rig.waiting(KEYS) == 1


async def test_whose_acknowledgement_got_lost_has_his_key(rig: Rig, client: Line, keys: Keys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("capibara_flow.runtime.keys._TIMEOUT", 0.2)
    lost = 0

    async def lose(subject: str) -> None:
        nonlocal lost
        if subject.startswith("$KV.CF_KEYS.") and not lost:
            lost += 1
            raise TimeoutError

    client.answered = lose
    with pytest.raises(BrokerUnavailable):
        await owner(keys, "k", "same", NEW)
    assert await owner(keys, "k", "same", NEW) == NEW
    assert await rig.waiting(KEYS) == 1


async def test_a_key_that_aged_out_may_be_used_again(rig: Rig, client: Line, keys: Keys):
    await owner(keys, "k", "same", NEW)
    info = await rig.admin.stream_info(KEYS)
    info.config.max_age, info.config.duplicate_window = 1, 1
    await rig.admin.update_stream(info.config)

    async def marked() -> bool:
        found = await last(client)
        return found is not None and b"Nats-Marker-Reason" in found.headers

    await until(marked)
    assert await owner(keys, "k", "another", OTHER) == OTHER


async def test_a_key_whose_turn_was_erased_may_be_used_again(rig: Rig, keys: Keys):
    await owner(keys, "k", "same", NEW)
    await rig.admin.purge_stream(KEYS, subject=f"$KV.CF_KEYS.*.{NEW}")
    assert await owner(keys, "k", "another", OTHER) == OTHER


async def test_a_turn_that_never_began_and_cannot_any_more_holds_no_key(rig: Rig, client: Line, keys: Keys):
    assert await owner(keys, "k", "same", OLDER) == OLDER
    assert await owner(keys, "k", "same", OLD) == OLD
    assert await owner(keys, "k", "same", NEW) == NEW
    assert await owner(keys, "k", "same", OTHER) == NEW

    async def alone() -> bool:
        return await rig.waiting(KEYS) == 1

    await until(alone)  # what is left of the others goes without a trace, else a marker would stand behind the key one day
    found = await last(client)
    assert found is not None
    assert found.subject.endswith(NEW)


async def test_an_old_turn_that_has_said_something_keeps_its_key(rig: Rig, keys: Keys):
    await owner(keys, "k", "same", OLD)
    async with (await rig.answers()).open(OLD, "main") as answer:
        await answer.finish(Token(turn=OLD, text="a"))
    assert await owner(keys, "k", "same", NEW) == OLD


async def test_without_its_bucket_no_key_is_kept(rig: Rig, keys: Keys):
    await rig.admin.delete_stream(KEYS)
    with pytest.raises(BrokerUnavailable):
        await owner(keys, "k", "same", NEW)


async def test_a_turn_that_was_refused_is_opened_under_its_key_later_and_once(rig: Rig, client: Line):
    here, there = NatsTurns(client, ()), NatsTurns(await rig.client("edge"), ())
    info = await rig.admin.stream_info("CF_WORK_ROUTER")
    info.config.max_msgs = 1
    await rig.admin.update_stream(info.config)
    await rig.ask("T0")
    assert await owner(here, "k", "same", NEW) == NEW
    with pytest.raises(QueueFull):
        await here.open(RouteTurn(turn=NEW, request=QUESTION), ANA, time.time() + 60)
    await rig.admin.purge_stream("CF_WORK_ROUTER")
    info.config.max_msgs = 10
    await rig.admin.update_stream(info.config)
    assert await owner(there, "k", "same", OTHER) == NEW
    assert not await there.exists(NEW)
    for turns in (there, here, there):
        await (await turns.open(RouteTurn(turn=NEW, request=QUESTION), ANA, time.time() + 60)).aclose()
    assert await rig.waiting() == 1


async def test_what_the_broker_refuses_for_other_reasons_is_told(rig: Rig, keys: Keys):
    info = await rig.admin.stream_info(KEYS)
    info.config.max_msg_size = 10
    await rig.admin.update_stream(info.config)
    with pytest.raises(BrokerUnavailable):
        await owner(keys, "k", "same", NEW)


async def test_whoever_comes_later_has_the_deadline_of_the_first(keys: Keys):
    until = time.time() + 5
    assert await keys.claim("k", "same", NEW, until) == (NEW, until)
    assert await keys.claim("k", "same", OTHER, until + 100) == (NEW, until)


async def test_a_turn_that_never_began_within_its_own_time_stands_aside(keys: Keys):
    await keys.claim("k", "same", NEW, time.time() - 1)
    assert await owner(keys, "k", "same", OTHER) == OTHER
