"""Turn ids: sortable, safe, and of one tenant only."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.turns import ANONYMOUS, BUCKETS, LENGTH, belongs, bucket, created, is_turn_id, own_buckets, turn_id
from topics.chat import CallExpert, RouteTurn

milliseconds = st.integers(min_value=0, max_value=2**50 - 1)
entropy = st.binary(min_size=10, max_size=10)
tenants = st.text(max_size=40)


@given(milliseconds, entropy, tenants)
def test_an_id_is_one_token_of_a_subject(at: int, chance: bytes, tenant: str) -> None:
    turn = turn_id(milliseconds=at, entropy=chance, tenant=tenant)
    assert is_turn_id(turn)
    assert re.fullmatch(r"[0-9A-Z]{32}", turn)
    assert len(turn) == LENGTH


made = st.tuples(milliseconds, entropy, tenants)


@given(made, made)
def test_ids_sort_by_time(one: tuple[int, bytes, str], other: tuple[int, bytes, str]) -> None:
    times_and_ids = sorted((at, turn_id(milliseconds=at, entropy=chance, tenant=tenant)) for at, chance, tenant in (one, other))
    ids = [turn for _, turn in times_and_ids]
    assert ids == sorted(ids)


@given(milliseconds, entropy, tenants)
def test_an_id_tells_when_it_was_made(at: int, chance: bytes, tenant: str) -> None:
    assert round(created(turn_id(milliseconds=at, entropy=chance, tenant=tenant)) * 1000) == at


@given(milliseconds, entropy, tenants, tenants)
def test_an_id_belongs_to_its_tenant_alone(at: int, chance: bytes, tenant: str, stranger: str) -> None:
    turn = turn_id(milliseconds=at, entropy=chance, tenant=tenant)
    assert belongs(turn, tenant)
    if stranger != tenant:
        assert not belongs(turn, stranger)


@given(milliseconds, st.sets(entropy, min_size=2, max_size=20))
def test_chance_makes_ids_of_one_moment_differ(at: int, chances: set[bytes]) -> None:
    assert len({turn_id(milliseconds=at, entropy=chance, tenant="t") for chance in chances}) == len(chances)


@given(st.text())
def test_any_text_may_be_asked_whether_it_is_an_id(text: str) -> None:
    if is_turn_id(text):
        assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{32}", text)
        assert created(text) >= 0


@pytest.mark.parametrize("text", ["", "*", ">", "A" * 31, "A" * 33, "a" * 32, "I" * 32, "A" * 31 + ".", "A" * 31 + "٣"])
def test_what_is_no_id(text: str) -> None:
    assert not is_turn_id(text)


@given(tenants)
def test_a_tenant_always_waits_in_the_same_lane(tenant: str) -> None:
    assert bucket(tenant) == bucket(tenant)
    assert 0 <= bucket(tenant) < BUCKETS <= _lanes_of_the_message()


def _lanes_of_the_message() -> int:
    return int(CallExpert.model_json_schema()["properties"]["bucket"]["exclusiveMaximum"])


def test_buckets_are_used_evenly_and_the_first_is_for_who_has_no_name() -> None:
    used = {bucket(f"tenant-{number}") for number in range(1000)}
    assert used == set(range(1, BUCKETS))
    assert bucket("") == bucket(ANONYMOUS) == 0


@given(st.sets(tenants, max_size=70))
def test_known_tenants_have_a_bucket_of_their_own_as_long_as_there_are_enough(names: set[str]) -> None:
    own = own_buckets(names)
    named = names - {"", ANONYMOUS}
    assert own.keys() == (named if len(named) < BUCKETS else set())
    assert len(set(own.values())) == len(own)
    assert all(0 < number < BUCKETS for number in own.values())


@given(milliseconds, entropy, tenants)
def test_an_id_round_trips_through_a_subject(at: int, chance: bytes, tenant: str) -> None:
    turn = turn_id(milliseconds=at, entropy=chance, tenant=tenant)
    command = RouteTurn.model_validate({"turn": turn, "request": {"messages": [{"role": "user", "content": "x"}]}})
    assert command.subject.split(".")[2] == turn
