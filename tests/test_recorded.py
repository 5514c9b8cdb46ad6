"""What earlier versions wrote is read by this one, and means the same.

During a rolling update, and in streams that outlive one, versions meet each other's messages. ``tests/recorded/VERSION`` has what each
version wrote, and is never changed. A release adds its own folder: ``python -m tests.recorded``, after the version was counted up. Who adds
a message class adds examples of it to ``tests/recorded/examples.py``, and records them in the same way.
"""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from tests.recorded.__main__ import HERE, record
from tests.recorded.examples import CLASSES, OUTPUTS, PLAIN, TURN, examples
from topics.chat import RouteTurn
from topics.output import Output, parse

BY_NAME = {each.__name__: each for each in CLASSES}
FILES = sorted(HERE.glob("*/*.jsonl"))


def lines(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().split(b"\n") if line]


def same(read: BaseModel, line: bytes) -> bool:
    """Whether *read* says what *line* says: what only this version has is at its default, and so is not set."""
    dumped, recorded = (json.dumps(json.loads(text), sort_keys=True) for text in (read.model_dump_json(exclude_unset=True), line))
    return dumped == recorded  # as text: 1 is not 1.0


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_was_recorded_is_read_and_keeps_its_meaning(file: Path):
    kind = BY_NAME[file.stem]
    for line in lines(file):
        read = kind.model_validate_json(line)
        assert same(read, line)
        if issubclass(kind, Output):
            assert parse(line) == read


def test_every_class_of_the_map_is_recorded():
    missing = {each.__name__ for each in CLASSES} - {file.stem for file in FILES}
    assert not missing, "add examples to tests/recorded/examples.py, then run: python -m tests.recorded"


def test_a_class_is_recorded_with_everything_that_it_may_leave_out():
    for kind in CLASSES:
        found = [json.loads(line) for name, line in examples() if name == kind.__name__]
        for name, about in kind.model_fields.items():
            assert any(name in each for each in found), f"no example of {kind.__name__} has {name}"
            if about.default is None:
                assert any(name not in each for each in found), f"every example of {kind.__name__} has {name}"


def test_every_output_event_has_an_example():
    assert {type(each) for each in OUTPUTS} == {kind for kind in CLASSES if issubclass(kind, Output)}


def test_what_is_recorded_is_never_written_over(tmp_path: Path):
    assert {file.stem for file in record(tmp_path)} == set(BY_NAME)
    (tmp_path / "Token.jsonl").write_bytes(b"{}\n")
    (tmp_path / "Done.jsonl").unlink()
    assert [file.stem for file in record(tmp_path)] == ["Done"]
    assert (tmp_path / "Token.jsonl").read_bytes() == b"{}\n"


def test_the_check_itself_notices_what_got_lost_or_changed():
    line = RouteTurn(turn=TURN, request=PLAIN).model_dump_json(exclude_none=True).encode()
    read = RouteTurn.read(line)
    assert same(read, line)
    assert not same(read.model_copy(update={"turn": "T"}), line)
    with pytest.raises(ValidationError):
        RouteTurn.read(line.replace(b'"turn"', b'"renamed"'))
