"""The fleet refuses what cannot work, and says why."""

from typing import Any

import pytest
from pydantic import ValidationError

from capibara_flow.domain.fleet import Fleet


def fleet(*experts: dict[str, Any], **more: Any) -> Fleet:
    return Fleet.model_validate({"experts": [{"urls": ["http://h:1"], **each} for each in experts], **more})


@pytest.mark.parametrize(
    ("experts", "more", "words"),
    [
        ([], {}, "at least 1 item"),
        ([{"name": "a"}, {"name": "a"}], {}, "the same name for several experts: a"),
        ([{"name": "a"}, {"name": "b", "aliases": ["a"]}], {}, "the same name for several experts: a"),
        ([{"name": "a", "aliases": ["x"]}, {"name": "b", "aliases": ["x"]}], {}, "the same name for several experts: x"),
        ([{"name": "a.b"}, {"name": "a:b"}], {}, "names that differ only in punctuation: a_b"),
        ([{"name": "a"}], {"default": "b"}, "default\n  names the unknown expert 'b'; known are: a"),
        ([{"name": "a"}], {"rules": [{"route": "r", "expert": "b", "patterns": ["x"]}]}, "rules.0.expert\n  names the unknown expert 'b'"),
        ([{"name": "a", "active": False}], {}, "no expert is active"),
        ([{"name": "Auto"}], {}, "reserved for the router's own choice: 'Auto'"),
        ([{"name": "a", "aliases": ["capibara"]}], {}, "reserved for the router's own choice: 'capibara'"),
        ([{"name": "a", "urls": ["ftp://h"]}], {}, "an address that does not begin with http:// or https://"),
        ([{"name": "a", "urls": []}], {}, "urls"),
        ([{"name": "a", "dialect": "smoke"}], {}, "dialect"),
        ([{"name": "a", "concurrency": 0}], {}, "concurrency"),
        ([{"name": "a", "colour": "red"}], {}, "colour"),
        ([{"name": "a", "timeouts": {"between_tokens_seconds": 0}}], {}, "between_tokens_seconds"),
        ([{"name": "a"}], {"rules": [{"route": "r", "expert": "a", "patterns": ["("]}]}, "'(' is not a regular expression: missing )"),
        ([{"name": "a"}], {"rules": [{"route": "r", "expert": "a", "patterns": []}]}, "patterns"),
    ],
)
def test_a_refusal_names_its_reason(experts: list[dict[str, Any]], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        fleet(*experts, **more)
    assert words in str(caught.value)


def test_experts_are_found_by_name_and_alias_while_they_are_active() -> None:
    both = fleet({"name": "a", "aliases": ["x"]}, {"name": "b", "aliases": ["y"], "active": False})
    assert both.find("x") is both.find("a") is both.experts[0]
    assert both.find("b") is both.find("y") is both.find("z") is None
    assert [each.name for each in both.active] == ["a"]


def test_the_default_answers_unless_it_is_out_of_service() -> None:
    assert fleet({"name": "a"}, {"name": "b"}, default="b").fallback.name == "b"
    assert fleet({"name": "a"}, {"name": "b"}).fallback.name == "a"
    assert fleet({"name": "a"}, {"name": "b", "active": False}, default="b").fallback.name == "a"


def test_an_alias_may_be_the_default_and_repeat_its_own_name() -> None:
    assert fleet({"name": "a"}, {"name": "b", "aliases": ["b", "quick"]}, default="quick").fallback.name == "b"


def test_addresses_lose_their_last_slash() -> None:
    assert fleet({"name": "a", "urls": ["http://h:1/", "https://h/v1//"]}).experts[0].urls == ("http://h:1", "https://h/v1")
