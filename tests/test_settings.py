"""Settings: from the environment, frozen, and an error names the variable."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from capibara_flow.settings import Settings, SettingsError, load, read_fleet

GOOD = '[[experts]]\nname = "a"\nurls = ["http://h:1"]\n'


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("CAPIBARA_")]:
        monkeypatch.delenv(name)


def test_the_defaults_are_what_the_page_and_the_broker_expect() -> None:
    settings = load()
    assert (settings.edge.port, settings.nats.url) == (5001, "nats://127.0.0.1:4222")
    assert settings.auth.anonymous


def test_the_environment_sets_one_field_and_leaves_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_EDGE__PORT", "0")
    monkeypatch.setenv("CAPIBARA_EDGE__ORIGINS", '["https://a.example"]')
    monkeypatch.setenv("CAPIBARA_NATS__PASSWORDS__EDGE", "hush")
    monkeypatch.setenv("CAPIBARA_AUTH__KEYS", '[{"key": "sk-1", "principal": "ann", "tenant": "acme"}]')
    settings = load()
    assert (settings.edge.port, settings.edge.origins, settings.edge.turn_seconds) == (0, ("https://a.example",), 600)
    assert settings.nats.passwords["edge"].get_secret_value() == "hush"
    assert settings.auth.keys[0].principal == "ann"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CAPIBARA_EDGE__PORT", "http", "valid integer"),
        ("CAPIBARA_EDGE__PORT", "70000", "less than or equal to 65535"),
        ("CAPIBARA_WORKER__MAX_DELIVER", "0", "greater than or equal to 1"),
        ("CAPIBARA_WORKER__TENANT_WEIGHTS__ACME", "0", "greater than or equal to 0.01"),
        ("CAPIBARA_WORKER__TENANT_WEIGHTS", "[1]", "valid dictionary"),
        ("CAPIBARA_EDGE__COLOUR", "red", "not permitted"),
        ("CAPIBARA_AUTH__ANONYMOUS", "perhaps", "boolean"),
        ("CAPIBARA_EDGE__MAX_BUFFER_BYTES", "0", "greater than or equal to 1024"),
        ("CAPIBARA_LOG__LEVEL", "nonsense", "'warning'"),
        ("CAPIBARA_LOG__LEVEL", "10", "'debug'"),
        ("CAPIBARA_LOG__FORMAT", "xml", "'json' or 'console'"),
    ],
)
def test_an_error_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert f"{name}: " in str(caught.value)
    assert reason in str(caught.value)


def test_a_table_that_is_not_json_names_its_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_AUTH__KEYS", "sk-1,sk-2")
    with pytest.raises(SettingsError, match=r"CAPIBARA_AUTH.*JSON"):
        load()


@pytest.mark.parametrize("written", ["https://a.example, https://b.example", '["https://a.example", "https://b.example"]'])
def test_a_list_may_be_written_with_commas_or_as_json(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("CAPIBARA_EDGE__ORIGINS", written)
    assert load().edge.origins == ("https://a.example", "https://b.example")


def test_a_level_and_a_format_may_be_written_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_LOG__LEVEL", "WARNING")
    monkeypatch.setenv("CAPIBARA_LOG__FORMAT", "Console")
    assert (load().log.level, load().log.format) == ("warning", "console")


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIBARA_NATS__PASSWORDS__EDGE", "hush-hush")
    monkeypatch.setenv("CAPIBARA_AUTH__KEYS", '[{"key": "sk-hush", "principal": "ann", "tenant": "acme"}]')
    settings = load()
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hush" not in shown


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().edge.port = 1  # type: ignore[misc]


def test_a_fleet_is_read(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(GOOD, encoding="utf-8")
    assert read_fleet(file).experts[0].name == "a"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "experts: Field required"),
        ("experts = [\n", ":2: not TOML"),
        ("a = 1\nb = = 2\n", ":2: not TOML"),
        ("\udcff", ": not TOML"),
        (GOOD + 'colour = "red"', ":4: experts.0.colour: Extra inputs are not permitted"),
        (GOOD.replace("http:", "ftp:"), ":3: experts.0.urls: an address that does not begin with http"),
        (GOOD + GOOD, ":5: experts.1.name: the same name for several experts: a"),
        (GOOD + "concurrency = 2026-01-01", ":4: experts.0.concurrency"),
        (GOOD + '[policy]\ndefault = ["b"]', ":5: policy.default.simple.experts.0: names the unknown expert 'b'; known are: a"),
    ],
)
def test_a_fleet_that_cannot_be_used_names_file_line_key_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        read_fleet(file)
    assert str(caught.value).startswith(f"{file}:")
    assert reason in str(caught.value)


def test_a_fleet_with_several_mistakes_names_each_of_them_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(GOOD + 'concurrency = 0\ncolour = "red"\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        read_fleet(file)
    keys = [each.partition(": ")[2].partition(": ")[0] for each in str(caught.value).split("; ")]
    assert keys == ["experts.0.concurrency", "experts.0.colour"]


def test_a_fleet_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_fleet(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match="CAPIBARA_FLEET__FILE"):
        _ = load().experts
