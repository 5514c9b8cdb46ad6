"""Retrieval in Spanish, English, between them and over two hops: a small library of our own, on the real stores and the light model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capibara_flow.cli import evaluate_retrieval as evaluation
from capibara_flow.cli.app import app
from capibara_flow.errors import CapibaraError
from capibara_flow.settings import SettingsError

OURS = json.loads((Path(__file__).parent / "bilingual.json").read_text(encoding="utf-8"))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl"
    corpus.write_text("\n".join(json.dumps(row) for row in OURS["passages"]), encoding="utf-8")
    queries.write_text("\n".join(json.dumps(row) for row in OURS["questions"]), encoding="utf-8")
    return corpus, queries


def test_what_answers_is_found_in_both_languages_and_over_two_hops(files):
    report = evaluation.evaluate(*files, "universal", collection="ours", ablation=True)
    assert report["recall@2"] >= 0.9
    assert report["recall@5"] == 1.0
    ablation = report["ablation"]
    assert set(ablation) == {"dense", "bm25", "fused", "with graph"}
    assert ablation["with graph"]["recall@2"] >= max(ablation[each]["recall@2"] for each in ("dense", "bm25", "fused"))
    again = evaluation.evaluate(*files, "universal", collection="ours")
    assert again["ndcg@10"] == report["ndcg@10"]


def test_the_command_prints_a_table_or_json(files):
    corpus, queries = map(str, files)
    told = CliRunner().invoke(app, ["eval", "retrieval", "--corpus", corpus, "--queries", queries, "--embedder", "universal", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["n"] == len(OURS["questions"])
    report = json.loads(told.stdout)
    shown = evaluation.table(report)
    assert [column.header for column in shown.columns][2:6] == ["R@1", "R@2", "R@5", "R@10"]
    assert shown.row_count == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x"}', "either gold or gold_titles"),
        ('{"question": "x", "gold": "nowhere"}', "the corpus has no 'nowhere'"),
        ('{"question": "", "gold": "faro"}', "question"),
        ("{", "queries.jsonl:1"),
        ("", "nothing in it"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(files, line, message):
    files[1].write_text(line)
    with pytest.raises(SettingsError, match=message):
        evaluation.evaluate(*files, "universal")


def test_a_broken_archive_and_double_ids_are_told(files):
    corpus, queries = files
    corpus.write_bytes(b"\x1f\x8bnot really")
    with pytest.raises(SettingsError, match="cannot be read"):
        evaluation.evaluate(corpus, queries, "universal")
    corpus.write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}')
    with pytest.raises(SettingsError, match="1 ids stand there twice"):
        evaluation.evaluate(corpus, queries, "universal")


def test_a_collection_cannot_lead_out_of_the_cache(files):
    for name in ("../x", "a/b", ".."):
        with pytest.raises((SettingsError, CapibaraError), match="letters, digits"):
            evaluation.evaluate(*files, "universal", collection=name)


def test_what_has_nothing_to_do_with_the_library_finds_nothing(files):
    asked = [*OURS["questions"], *({"question": each, "gold": []} for each in OURS["unrelated"])]
    files[1].write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    report = evaluation.evaluate(*files, "universal")
    assert report["n"] == len(OURS["questions"])
    shares = report["nothing_found"]
    assert shares["n"] == {"unanswerable": len(OURS["unrelated"]), "answerable": len(OURS["questions"])}
    assert shares["answerable"] == 0.0
    assert shares["unanswerable"] >= 0.6
    assert f"% of the {len(OURS['unrelated'])} that nothing answers" in evaluation.nothing_told(shares)


def test_the_floor_can_be_off_and_all_may_be_unanswerable(files):
    files[1].write_text("\n".join(json.dumps({"question": each, "gold": []}) for each in OURS["unrelated"]), encoding="utf-8")
    report = evaluation.evaluate(*files, "universal", floor=0.0)
    assert (report["n"], report["nothing_found"]["unanswerable"]) == (0, 0.0)
    assert evaluation.table(report).row_count == 1
