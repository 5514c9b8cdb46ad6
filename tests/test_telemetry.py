"""Logs hide secrets; metrics have closed label sets."""

import json

import prometheus_client
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow import telemetry
from capibara_flow.telemetry import redact


@pytest.mark.parametrize("key", ["password", "client_secret", "api_key", "apikey", "Authorization", "cookie", "access_token"])
def test_secrets_are_known_by_the_name_of_their_key(key: str) -> None:
    assert redact(None, "info", {"event": "x", key: "hush"})[key] == "***"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("the key sk-abcdefghijkl is wrong", "the key sk-abcdef*** is wrong"),
        ("nats://edge:hush@127.0.0.1:4222,nats://edge:hush@h", "nats://edge:***127.0.0.1:4222,nats://edge:***h"),
        ("Authorization: Bearer hush.hush", "Authorization: Bearer ***"),
        ("authorization: bearer hush.hush", "authorization: bearer ***"),
        ("nothing to hide: 12 tokens", "nothing to hide: 12 tokens"),
    ],
)
def test_secrets_are_known_by_their_form(value: str, shown: str) -> None:
    assert redact(None, "info", {"event": value, "detail": value}) == {"event": shown, "detail": shown}


@given(st.text("abcdefABCDEF0123456789_-", min_size=12, max_size=40), st.text(max_size=20))
def test_a_key_never_shows_whatever_stands_around_it(secret: str, around: str) -> None:
    shown = redact(None, "info", {"event": f"{around} sk-{secret} {around}"})["event"]
    assert secret not in shown.replace(around, "")


def test_counts_of_tokens_are_no_secret() -> None:
    assert redact(None, "info", {"event": "x", "tokens": 3, "completion_tokens": 5}) == {"event": "x", "tokens": 3, "completion_tokens": 5}


@pytest.mark.usefixtures("own_logging")
def test_a_line_of_the_log_is_json_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(level="info", style="json")
    error = ConnectionError("cannot reach nats://edge:hush@127.0.0.1")
    try:
        _raise(error)
    except ConnectionError:
        structlog.get_logger().exception("failed", password="hush", attempt=2, url="nats://edge:hush@h")
    structlog.get_logger().debug("not shown")
    written = capsys.readouterr().err
    assert "hush" not in written
    (line,) = written.splitlines()
    logged = json.loads(line)
    assert (logged["event"], logged["level"], logged["attempt"], logged["password"]) == ("failed", "error", 2, "***")
    assert "ConnectionError" in logged["exception"]


def _raise(error: Exception) -> None:
    raise error


def test_secrets_do_not_show_inside_lists_and_tables() -> None:
    logged = redact(None, "info", {"event": "x", "addresses": ["nats://edge:hush@h"], "headers": {"Authorization": "Bearer hush"}})
    assert "hush" not in str(logged)


@pytest.mark.usefixtures("own_logging")
def test_a_line_for_people_hides_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure(level="debug", style="console")
    structlog.get_logger().debug("started", api_key="sk-hush-hush-hush")
    written = capsys.readouterr().err
    assert "hush" not in written
    assert "started" in written


def test_every_outcome_of_a_turn_shows_before_it_happened() -> None:
    assert all(
        prometheus_client.REGISTRY.get_sample_value("capibara_turns_total", {"outcome": each}) is not None for each in telemetry.OUTCOMES
    )


def test_metrics_are_ours_by_name_and_never_labelled_by_turn() -> None:
    names = {family.name for family in prometheus_client.REGISTRY.collect() if family.name.startswith("capibara_")}
    assert {"capibara_turns", "capibara_tokens", "capibara_first_token_seconds", "capibara_http_responses"} <= names
    labels = {label for family in prometheus_client.REGISTRY.collect() for sample in family.samples for label in sample.labels}
    assert not labels & {"turn", "principal", "tenant", "path"}
