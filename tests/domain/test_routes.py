"""Routes files: what is read of them, and that a bad one is refused with the line that is wrong."""

import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.routes import DEFAULT, MOST_EXAMPLES, Labelled, parse_routes

GOOD = """\
# Two routes.
[cues]
code = '\\bpython\\b'

[[routes]]
name = "programming"
description = "code"
examples = ["a loop", 'another']
[routes.levels]
simple = ["print # not a comment"]
[routes.topics]
pasted = [
    "x = [1, 2]",  # a comment, with commas
    \"\"\"if a:
    b\"\"\",
]

[[routes]]
name = "math"
examples = ["2 + 2"]

[none]
examples = ["call mom"]
"""


def test_a_file_tells_routes_groups_and_levels() -> None:
    routes = parse_routes(GOOD, "r.toml")
    assert routes.names == ("programming", "math", DEFAULT)
    assert routes.cues == {"code": r"\bpython\b"}
    assert routes.labelled == (
        Labelled(text="a loop", route="programming", group="programming/examples"),
        Labelled(text="another", route="programming", group="programming/examples"),
        Labelled(text="print # not a comment", route="programming", group="programming/levels/simple", level="simple"),
        Labelled(text="x = [1, 2]", route="programming", group="programming/topics/pasted"),
        Labelled(text="if a:\n    b", route="programming", group="programming/topics/pasted"),
        Labelled(text="2 + 2", route="math", group="math/examples"),
        Labelled(text="call mom", route=DEFAULT, group=DEFAULT),
    )


def test_the_packaged_routes_are_the_seven_and_teach_complexity() -> None:
    routes = parse_routes((files("capibara_flow") / "routes" / "bb.toml").read_text(encoding="utf-8"), "bb.toml")
    assert set(routes.names) == {
        "programming",
        "analysis",
        "math",
        "quick_facts",
        "conversation",
        "creative_writing",
        "translation",
        "default",
    }
    assert routes.tells_complexity
    assert not parse_routes(GOOD, "r.toml").tells_complexity


def test_an_example_told_twice_of_one_route_counts_once() -> None:
    routes = parse_routes('[[routes]]\nname = "a"\nexamples = ["x", "X", " x "]\n', "r.toml")
    assert [each.text for each in routes.labelled] == ["x"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "math"', "name = math", "19: not TOML: Invalid value"),
        ('["call mom"]', '["call mom"', "23: not TOML: Unclosed array"),
        (
            'name = "math"',
            'name = "default"',
            "19: routes.1.name: 'default' is the route of what belongs to none: give such examples under [none]",
        ),
        ('name = "math"', 'name = "programming"', "19: routes.1.name: a second route called 'programming'"),
        ('name = "math"', 'name = "ma th"', "19: routes.1.name: String should match pattern"),
        ('name = "math"\n', "", "18: routes.1.name: Field required"),
        ('description = "code"', "descripton = 7", "7: routes.0.descripton: Extra inputs are not permitted"),
        ('description = "code"', "description = 7", "7: routes.0.description: Input should be a valid string"),
        ('["2 + 2"]', '["2 + 2", "  "]', "20: routes.1.examples.1: String should have at least 1 character"),
        ('["2 + 2"]', "[]", "18: routes.1: a route needs examples"),
        ('["2 + 2"]', '["another"]', "20: routes.1.examples.0: the same example for programming and math"),
        ('"x = [1, 2]"', "12", "13: routes.0.topics.pasted.0: Input should be a valid string"),
        ('    b"""', '    b""", 3', "15: routes.0.topics.pasted.2: Input should be a valid string"),
        ("simple", "hard", "10: routes.0.levels.hard: Extra inputs are not permitted"),
        ("python\\b'", "(python'", "3: cues.code: code is not a regular expression: missing ), unterminated subpattern"),
        ("[none]", "[nothing]", "22: nothing: Extra inputs are not permitted"),
        ('examples = ["call mom"]', 'examples = "call mom"', "23: none.examples: Input should be a valid "),
    ],
)
def test_a_bad_file_is_refused_with_line_key_and_reason(old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=re.escape(f"r.toml:{told}")):
        parse_routes(GOOD.replace(old, new, 1), "r.toml")


def test_lists_in_lists_do_not_shift_the_lines() -> None:
    with pytest.raises(ValueError, match="examples") as caught:
        parse_routes('[[routes]]\nname = "a"\nexamples = [\n  ["b", "c", { d = "e", f = "g" }],\n  "h",\n  3,\n]\n', "r.toml")
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["r.toml:4", "routes.0.examples.0"],
        ["r.toml:6", "routes.0.examples.2"],
    ]


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="examples") as caught:
        parse_routes(GOOD.replace("description =", "about =").replace('["2 + 2"]', "[2]"), "r.toml")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["r.toml:7", "r.toml:20"]


def test_an_empty_file_and_one_that_is_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^r.toml:1: routes: Field required$"):
        parse_routes("", "r.toml")
    many = ",".join(f'"{number}"' for number in range(MOST_EXAMPLES + 1))
    with pytest.raises(ValueError, match=f"{MOST_EXAMPLES + 1} examples are too many"):
        parse_routes(f'[[routes]]\nname = "a"\nexamples = [{many}]', "r.toml")


@given(st.data())
def test_whatever_is_cut_out_of_a_file_it_is_read_or_refused_with_a_line_of_it(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOOD)))
    text = GOOD[:start] + data.draw(st.text("[]{}=,.'\"#\n\\ aé0", max_size=6)) + GOOD[data.draw(st.integers(start, len(GOOD))) :]
    try:
        parse_routes(text, "r.toml")
    except ValueError as error:
        for line in str(error).splitlines():
            found = re.match(r"r\.toml:(\d+): ", line)
            assert found
            assert 1 <= int(found[1]) <= text.count("\n") + 1
