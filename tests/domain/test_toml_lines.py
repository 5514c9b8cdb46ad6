"""Which line of a TOML text a value stands on."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.toml_lines import line_of, lines_of

FLEET = """\
# a fleet
default = "big" # [not] = "a table"

[[experts]]
name = "big"
urls = [
    "http://127.0.0.1:1", # one
    "http://127.0.0.1:2",
]
sampling = { temperature = 0.7, stop = ["a", '''
]'''], top_p = 1 }
timeouts.connect_seconds = 5

[[experts]]
name = 'it''s'
[experts.launch]
engine = "vllm"
args."max-model-len" = 4096
args.'seed one' = 7

[policy]
math = ["big"]

[policy.default]
simple = { consensus = ["big", "small"] }
""".replace("'it''s'", '"it\'s"')


@pytest.mark.parametrize(
    ("loc", "line"),
    [
        (("default",), 2),
        (("experts",), 4),
        (("experts", 0), 4),
        (("experts", 0, "name"), 5),
        (("experts", 0, "urls"), 6),
        (("experts", 0, "urls", 1), 8),
        (("experts", 0, "sampling", "temperature"), 10),
        (("experts", 0, "sampling", "top_p"), 11),
        (("experts", 0, "timeouts", "connect_seconds"), 12),
        (("experts", 1, "name"), 15),
        (("experts", 1, "launch"), 16),
        (("experts", 1, "launch", "args", "max-model-len"), 18),
        (("experts", 1, "launch", "args", "seed one"), 19),
        (("policy", "math", 0), 22),
        (("policy", "default", "simple", "consensus", 1), 25),
    ],
)
def test_a_value_is_found(loc: tuple[str | int, ...], line: int) -> None:
    assert line_of(FLEET, loc) == line


@pytest.mark.parametrize(
    ("loc", "line"),
    [
        (("experts", 1, "urls"), 14),  # missing: the table that it is missing from
        (("policy", "math", "simple", "experts", 0), 22),  # a value that stands for a larger one
        (("experts", 1, "launch", "args", "max-model-len", "int"), 18),  # which member of a union it was not
        (("rules",), None),
        ((), None),
    ],
)
def test_what_is_not_there_is_looked_for_around_it(loc: tuple[str | int, ...], line: int | None) -> None:
    assert line_of(FLEET, loc) == line


KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=5)
SCALARS = st.one_of(st.integers(-9, 99), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


def toml(value: Any, spread: bool) -> str:
    """*value* in TOML, lists over several lines or on one."""
    match value:
        case dict():
            return "{" + ", ".join(f"{quoted(key)} = {toml(each, spread)}" for key, each in value.items()) + "}"
        case list():
            between = ",\n  # ] }\n" if spread else ", "
            return "[" + between.join(toml(each, spread) for each in value) + "]"
        case str():
            return f"'''\n{value}'''" if spread and "'" not in value and value.isprintable() else quoted(value)
        case bool():
            return str(value).lower()
    return repr(value)


def quoted(text: str) -> str:
    """A basic string."""
    return '"' + "".join(f"\\U{ord(each):08x}" if each in '"\\' or not each.isprintable() else each for each in text) + '"'


def paths(value: Any, above: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Where values stand within *value*."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return {(*above, key) for key, _ in inner} | {path for key, each in inner for path in paths(each, (*above, key))}


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3), st.booleans())
def test_every_value_of_any_text_has_its_line(top: dict[str, Any], tables: list[dict[str, Any]], spread: bool) -> None:
    top.pop("tables", None)
    text = "".join(f"{quoted(key)} = {toml(value, spread)} # {key}\n" for key, value in top.items())
    for table in tables:
        text += "\n[[tables]]\n" + "".join(f"{quoted(key)}={toml(value, spread)}\n" for key, value in table.items())
    parsed = tomllib.loads(text)

    lines = lines_of(text)

    assert set(lines) == paths(parsed)
    rows = text.split("\n")
    for path, line in lines.items():
        if len(path) == 1 and path != ("tables",):
            assert rows[line - 1].startswith(quoted(str(path[0])))
        if len(path) == 2 and path[0] == "tables":
            assert rows[line - 1] == "[[tables]]"
