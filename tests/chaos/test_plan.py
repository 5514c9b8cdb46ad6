"""What is asked follows from the seed alone."""

import itertools

import pytest

from tests.chaos.__main__ import arguments
from tests.chaos.faults import FAULTS, USUAL
from tests.chaos.plan import NARROW, PREFILLER, REPEATER, Ask, Occasion, Pattern


def asks(seed: int, fault: str, turns: int = 12) -> list[Ask]:
    pattern = Pattern(seed=seed)
    return FAULTS[fault].asking(Occasion(pattern, pattern.chance(fault, 0), turns, itertools.count(1), moment=1.0))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_seed_asks_the_same(fault: str) -> None:
    assert asks(3, fault) == asks(3, fault)
    assert asks(3, fault) != asks(4, fault)
    assert len({ask.question for ask in asks(3, fault)}) == 12


def test_all_kinds_of_experts_and_clients_take_part() -> None:
    found = [ask for fault in FAULTS for ask in asks(1, fault)]
    assert {ask.expert for ask in found} == {PREFILLER, REPEATER, NARROW}
    assert {ask.deed for ask in found} == {"stay", "cancel", "leave"}


def test_whoever_is_left_alone_would_speak_much_longer() -> None:
    pattern = Pattern()
    assert all(ask.upto * pattern.pace > pattern.abandon + 5 for ask in asks(1, "abandon") if ask.deed == "leave")


@pytest.mark.parametrize(("turns", "rounds"), [(5, [5]), (24, [24]), (25, [13, 12]), (0, [0])])
def test_many_turns_go_in_rounds(turns: int, rounds: list[int]) -> None:
    assert Pattern(at_once=24).rounds(turns) == rounds


def test_the_environment_speaks_where_the_command_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TURNS", "SEED", "FAULTS"):
        monkeypatch.delenv(f"CHAOS_{name}", raising=False)
    assert (arguments([]).turns, arguments([]).faults) == (60, USUAL)
    monkeypatch.setenv("CHAOS_TURNS", "1000")
    monkeypatch.setenv("CHAOS_SEED", "7")
    monkeypatch.setenv("CHAOS_FAULTS", "calm, cancel")
    assert (arguments([]).turns, arguments([]).seed, arguments([]).faults) == (1000, 7, ("calm", "cancel"))
    assert arguments(["--seed", "8"]).seed == 8


def test_an_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--faults", "kill-moon"])
    assert "kill-caller" in capsys.readouterr().err
