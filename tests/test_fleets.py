"""The fleets that come along: what the product promises of them, and that every question finds somebody."""

from pathlib import Path
from typing import get_args

import pytest

from capibara_flow.domain.fleet import Choice, Fleet
from capibara_flow.domain.routing import candidates
from capibara_flow.engines import weights
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.templates import template
from capibara_flow.errors import BadRequest, CannotStart
from capibara_flow.settings import read_fleet
from topics.chat import ChatRequest, Complexity

FOLDER = Path(__file__).parents[1] / "deploy" / "fleets"
FILES = sorted(FOLDER.glob("*.toml"))
REFERENCE = [FOLDER / f"{name}.toml" for name in ("local", "bb", "bounty", "ollama", "axion")]
ROUTES = ("programming", "analysis", "math", "quick_facts", "conversation", "creative_writing", "translation")
PICTURE = ChatRequest.model_validate(
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]}
)

by_name = pytest.mark.parametrize("file", REFERENCE, ids=lambda file: file.stem)


def choices(fleet: Fleet) -> list[tuple[str, str, Choice]]:
    """Who answers what, for every route and complexity."""
    levels: tuple[Complexity, ...] = get_args(Complexity)
    rows = {route: fleet.policy.get(route, fleet.policy["default"]) for route in (*ROUTES, "default")}
    return [(route, level, row.at(level)) for route, row in rows.items() for level in levels]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_loads_and_its_engines_can_be_built(file: Path) -> None:
    fleet = read_fleet(file)
    for expert in fleet.experts:
        template(expert.template)
        for url in expert.urls:
            assert build_engine(expert, url).abilities.images == ("image" in expert.modalities and expert.dialect != "llama_completion")


def test_all_reference_fleets_are_there() -> None:
    assert set(REFERENCE) <= set(FILES)


@by_name
def test_every_route_finds_active_experts_at_every_complexity(file: Path) -> None:
    fleet = read_fleet(file)
    assert set(fleet.policy) <= {*ROUTES, "default"}
    for route, level, choice in choices(fleet):
        assert all(fleet.find(name) for name in choice.experts), (route, level)
        assert len(choice.experts) >= 2, f"{route}, {level}: nobody takes over"
        assert choice.vote == (level == "very_complex") or (file.stem == "local" and not choice.vote), (route, level)


@by_name
def test_every_expert_says_what_it_is_and_is_asked_for_something(file: Path) -> None:
    fleet = read_fleet(file)
    chosen = {name for _, _, choice in choices(fleet) for name in choice.experts}
    for expert in fleet.experts:
        assert expert.name in chosen
        assert expert.hardware
        assert expert.context_length
        assert expert.languages
        assert 0.6 <= expert.consensus_weight <= 0.9
        assert expert.sampling.temperature is not None


@by_name
def test_a_picture_finds_who_sees_it_where_there_is_somebody(file: Path) -> None:
    fleet = read_fleet(file)
    seeing = [expert.name for expert in fleet.active if "image" in expert.modalities]
    if seeing:
        assert [expert.name for expert in candidates(PICTURE, fleet)] == seeing
    else:
        with pytest.raises(BadRequest, match="no expert of this fleet takes images"):
            candidates(PICTURE, fleet)


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("bb", {"gpt-oss-20b": 8080, "phi-mini": 8081, "mixtral": 8082}),
        ("bounty", {"gpt-oss-20b": 8000, "phi4-mini": 8001, "qwen2.5-coder-1.5b": 8002, "mixtral": 8003}),
        ("ollama", dict.fromkeys(("phi3:mini", "llama2", "gpt-oss-20b", "gemma:7b"), 11434)),
    ],
)
def test_engines_are_where_they_always_were(name: str, addresses: dict[str, int]) -> None:
    fleet = read_fleet(FOLDER / f"{name}.toml")
    assert {each.name: int(each.urls[0].removesuffix("/v1").rpartition(":")[2]) for each in fleet.experts} == addresses


def test_bb_asks_the_experts_it_is_known_for() -> None:
    fleet = read_fleet(FOLDER / "bb.toml")
    own = {route: choice.experts[0] for route, level, choice in choices(fleet) if level == "moderate"}
    large = dict.fromkeys(("programming", "analysis", "math", "default"), "gpt-oss-20b")
    assert own == large | dict.fromkeys(("quick_facts", "conversation"), "phi-mini") | dict.fromkeys(
        ("creative_writing", "translation"), "mixtral"
    )
    assert fleet.find("phi") is fleet.find("phi-mini")
    drawn = [
        (each.sampling.temperature, each.sampling.top_p, each.sampling.repeat_penalty, each.sampling.max_tokens) for each in fleet.experts
    ]
    assert set(drawn) == {(0.7, 0.9, 1.2, 200)}


def test_ollama_is_a_ladder() -> None:
    row = read_fleet(FOLDER / "ollama.toml").policy["default"]
    assert [row.simple.experts[0], row.moderate.experts[0], row.complex.experts[0]] == ["phi3:mini", "llama2", "gpt-oss-20b"]
    assert set(row.very_complex.experts) == {"phi3:mini", "llama2", "gpt-oss-20b", "gemma:7b"}


def test_axion_loads_its_experts_when_they_are_needed() -> None:
    fleet = read_fleet(FOLDER / "axion.toml")
    known = {"phi4_fast": 5, "mistral_balanced": 4, "qwen_coder": 3, "gemma3_multimodal": 2, "aya_expanse_multilingual": 2}
    assert {each.name: each.priority for each in fleet.experts} == known
    assert all(each.launch and each.launch.engine == "vllm" and not each.urls for each in fleet.experts)
    assert all(each.launch and 20 <= (each.launch.load_seconds or 0) <= 60 for each in fleet.experts)
    needs = [each.launch.memory_mib or 0 for each in fleet.experts if each.launch]
    assert sum(needs) > 125 * 1000  # not all at a time
    assert sum(sorted(needs)[-3:]) < 125 * 1000  # any three of them
    aya, gemma = fleet.find("aya_expanse_multilingual"), fleet.find("gemma3_multimodal")
    assert aya
    assert gemma
    assert (len(aya.languages), gemma.context_length) == (23, 24 * 1024)
    assert [each.name for each in fleet.experts if "image" in each.modalities] == [gemma.name]


def test_the_local_fleet_is_two_experts_of_the_weights_that_come_along(tmp_path: Path) -> None:
    fleet = read_fleet(FOLDER / "local.toml")
    assert len(fleet.active) == 2
    try:
        found = {weights.located(expert.weights or "", tmp_path) for expert in fleet.experts}
    except CannotStart:
        pytest.skip("no local model is installed")
    assert found == {str(weights.packaged())}


def test_weights_are_looked_for_beside_the_fleet(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert weights.located("a.gguf", tmp_path) == str(tmp_path / "a.gguf")
    assert weights.located(str(tmp_path / "a.gguf"), Path("elsewhere")) == str(tmp_path / "a.gguf")
    assert weights.located("org/model", tmp_path) == "org/model"
