"""Fleets as data without secrets, and their digest."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.configuration import REDACTED, digest, is_secret, redacted, told
from capibara_flow.domain.fleet import Fleet

FLEET = {
    "experts": [
        {"name": "a", "urls": ["http://h:1/v1?token=abc&x=1"], "api_key": "sk-secret", "timeouts": {"first_token_seconds": 7}},
        {
            "name": "b",
            "launch": {"engine": "vllm", "args": {"hf-token": "hf_secret", "max-num-seqs": 4, "tokenizer": "slow"}},
            "weights": "w",
            "sampling": {"max_tokens": 9},
        },
    ]
}


def fleet(**fields: object) -> Fleet:
    return Fleet.model_validate_json(json.dumps(FLEET | fields))


def test_secrets_are_left_out_and_nothing_else_is():
    data = json.dumps(told(fleet()))
    assert not [word for word in ("sk-secret", "hf_secret", "abc") if word in data]
    first, second = told(fleet())["experts"]
    assert first["urls"] == [f"http://h:1/v1?token={REDACTED}&x=1"]
    assert (first["api_key"], first["timeouts"]) == (REDACTED, {"first_token_seconds": 7})
    assert second["launch"]["args"] == {"hf-token": REDACTED, "max-num-seqs": 4, "tokenizer": "slow"}
    assert second["sampling"] == {"max_tokens": 9}


def test_what_is_told_is_a_fleet_again_with_the_same_digest():
    again = Fleet.model_validate_json(json.dumps(told(fleet())))
    assert digest(again, None) == digest(fleet(), None)
    assert told(again) == told(fleet())
    assert len(digest(fleet(), None)) == 12


def test_a_digest_tells_configurations_apart_but_no_keys():
    other = json.loads(json.dumps(FLEET))
    other["experts"][0]["api_key"] = "another"
    assert digest(Fleet.model_validate(other), None) == digest(fleet(), None)
    assert digest(fleet(default="b"), None) != digest(fleet(), None)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("nats://ana:secret@h:4222", "nats://h:4222"),
        ("http://h/path?q=a@b", "http://h/path?q=a@b"),
        ("http://ana@h", "http://h"),
        ("http://[::1/v1", REDACTED),
        ("not an address", "not an address"),
    ],
)
def test_users_in_addresses_are_left_out(address: str, shown: str):
    assert redacted({"url": address}) == {"url": shown}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each)))
def test_no_value_is_too_odd_and_twice_is_once(value: object):
    assert redacted(redacted(value)) == redacted(value)


@given(st.sampled_from(["api_key", "API-Key", "Authorization", "x-auth-token", "password", "secret", "Cookie", "hf_token"]))
def test_secrets_are_known_by_their_names(name: str):
    assert is_secret(name)
