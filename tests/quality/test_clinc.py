"""The converter, on a toy of the same shape: the data itself is never kept here."""

import gzip
import json
from pathlib import Path

import pytest

from capibara_flow.cli.evaluate import read_questions
from capibara_flow.settings import read_routes
from tests.quality.clinc import convert


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "domains.json").write_text(json.dumps({"money": ["pay", "save"], "trips": ["fly"]}))
    for name, intents in {"train": ["pay", "save", "fly"] * 3, "val": ["fly", "save"], "oos_train": ["oos"], "oos_val": ["oos"]}.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f'{name} "{i}"', "intent": intent}) + "\n" for i, intent in enumerate(intents))
    return tmp_path


@pytest.mark.parametrize("none", [False, True])
def test_domains_become_routes_and_intents_their_topics(folder: Path, tmp_path: Path, none: bool) -> None:
    routes, questions = convert(folder, tmp_path / "out", 2, none=none)
    known = read_routes(routes)
    assert known.names == ("money", "trips", "default")
    assert [(each.text, each.group) for each in known.labelled if each.route == "trips"] == [
        ('train "2"', "trips/topics/fly"),
        ('train "5"', "trips/topics/fly"),
    ]
    assert len(known.none.examples) == none
    assert [each.route for each in read_questions(questions, known)] == ["trips", "money", "default"]
