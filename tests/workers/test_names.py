"""The words of ``python -m workers``."""

import subprocess
import sys
from pathlib import Path

import pytest

from capibara_flow.settings import FleetSettings, KnowledgeSettings, LogSettings, Settings
from workers.__main__ import _meant


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("all",), ("router", "caller", "undertaker")),
        (("edge", "all"), ("router", "caller", "undertaker", "edge")),
        (("edge", "router"), ("router", "edge")),
        (("edge", "edge"), ("edge",)),
        (("caller", "router"), ("caller", "router")),
    ],
)
def test_the_edge_comes_last_and_only_when_it_is_named(tmp_path: Path, names: tuple[str, ...], meant: tuple[str, ...]):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[[experts]]\nname = "a"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    assert _meant(names, Settings(fleet=FleetSettings(file=fleet), knowledge=KnowledgeSettings())) == meant


def test_who_needs_a_place_is_among_all_only_where_there_is_one(tmp_path: Path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[[experts]]\nname = "a"\nurls = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    everybody = Settings(fleet=FleetSettings(file=fleet), knowledge=KnowledgeSettings(folder=tmp_path))
    assert _meant(("all",), everybody) == ("router", "retriever", "caller", "ingester", "undertaker", "accountant")
    named = Settings(fleet=FleetSettings(file=fleet), knowledge=KnowledgeSettings(postgres="postgresql://h/d"))
    assert _meant(("all",), named) == ("router", "caller", "undertaker", "accountant")
    silent = Settings(fleet=FleetSettings(file=fleet), knowledge=KnowledgeSettings(folder=tmp_path), log=LogSettings(enabled=False))
    assert "accountant" not in _meant(("all",), silent)


def test_an_unknown_name_is_told_who_there_is():
    done = subprocess.run([sys.executable, "-m", "workers", "all", "nope"], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "all, router" in done.stderr, "edge" in done.stderr) == (2, True, True)
