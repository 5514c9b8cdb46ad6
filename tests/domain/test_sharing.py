"""Who is served next, and how long who comes last will wait: properties over any weights and any demand."""

import itertools
import math
import random
from collections import Counter, deque

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capibara_flow.domain.sharing import Hands, Share, Shares, begins, jain, place, remaining

weights = st.dictionaries(st.integers(0, 63), st.floats(0.1, 10), min_size=1, max_size=8)
positive = st.floats(0.01, 100)


@given(weights=weights, turns=st.integers(1, 400))
def test_whoever_always_waits_gets_his_share_over_any_window(weights: dict[int, float], turns: int) -> None:
    shares, served, windows = Shares(), Counter[int](), [Counter[int]()]
    for _ in range(turns):
        chosen = shares.next(weights)
        shares.begin(chosen, weights[chosen], more=True)
        served[chosen] += 1
        windows.append(served.copy())
    for begin in range(0, turns, 7):
        window = served - windows[begin]
        shared = {bucket: window[bucket] / weight for bucket, weight in weights.items()}
        for one, other in itertools.permutations(weights, 2):
            assert shared[one] - shared[other] <= 1 / weights[one] + 1 / weights[other] + 1e-6


@given(weights=weights, seed=st.integers(), turns=st.integers(1, 300))
@example(weights={0: 1.0, 1: 4.0}, seed=68_249_666_952_736, turns=106)  # when a heavy one was let be late by four turns of his
def test_nobody_starves_whoever_comes_and_goes(weights: dict[int, float], seed: int, turns: int) -> None:
    chance, shares, since = random.Random(seed), Shares(), dict.fromkeys(weights, 0)
    patient = next(iter(weights))
    bound = sum(math.ceil(weight / weights[patient]) + 1 for weight in weights.values())
    for number in range(turns):
        waiting = {patient} | {bucket for bucket in weights if chance.random() < 0.6}
        chosen = shares.next(waiting)
        shares.begin(chosen, weights[chosen], more=chance.random() < 0.5)
        since[chosen] = number
        assert number - since[patient] <= bound


@given(busy=st.integers(1, 200))
def test_who_had_nothing_to_ask_for_saves_nothing_up(busy: int) -> None:
    shares = Shares()
    for _ in range(busy):
        shares.begin(1, more=True)
    served = Counter[int]()
    for _ in range(10):
        chosen = shares.next({1, 2})
        shares.begin(chosen, more=True)
        served[chosen] += 1
    assert abs(served[1] - served[2]) <= 1


def test_a_turn_that_is_still_on_its_way_is_made_up_for_but_no_more_than_that() -> None:
    shares = Shares()
    shares.begin(1, more=True)
    for _ in range(50):  # somebody else has served the rest of it, say
        shares.begin(2, more=True)
    served = Counter[int]()
    for _ in range(10):
        chosen = shares.next({1, 2})
        shares.begin(chosen, more=True)
        served[chosen] += 1
    assert 5 <= served[1] <= 6


def simulated(mine: int, ahead: int, waiting: dict[int, int], hands: int, seconds: float) -> float:
    """When the turn begins, by playing it through: calls of equal length, hands at work at evenly spread ages."""
    shares = Shares()
    queues = {bucket: deque(range(count)) for bucket, count in waiting.items()}
    queues[mine] = deque([*range(ahead), -1])
    free = sorted(seconds * (number + 1) / (hands + 1) for number in range(hands))
    while True:
        now = free.pop(0)
        chosen = shares.next([bucket for bucket, queue in queues.items() if queue])
        if queues[chosen].popleft() == -1:
            return now
        shares.begin(chosen, more=bool(queues[chosen]))
        free = sorted([*free, now + seconds])


@given(
    ahead=st.integers(0, 60),
    others=st.dictionaries(st.integers(1, 20), st.integers(0, 60), max_size=8),
    hands=st.integers(1, 8),
    seconds=st.floats(0.1, 20),
)
def test_an_estimate_is_what_playing_it_through_gives(ahead: int, others: dict[int, int], hands: int, seconds: float) -> None:
    left = [seconds * (number + 1) / (hands + 1) for number in range(hands)]
    shares = {bucket: Share(waiting) for bucket, waiting in others.items()}
    found = place(0, ahead, shares, Hands(hands, seconds, left))
    real = simulated(0, ahead, others, hands, seconds)
    turns = sum(bool(waiting) for waiting in others.values()) / 2 + 2  # where tags are equal, half of them come first, or none, or all
    assert abs(found.seconds - real) <= (turns / hands + 1) * seconds
    assert found.position >= 1


@given(ahead=st.integers(0, 50), capacity=st.integers(1, 64), seconds=positive)
def test_who_has_more_before_him_begins_later(ahead: int, capacity: int, seconds: float) -> None:
    hands = Hands(capacity, seconds, [seconds / 2] * capacity)
    assert 0 <= begins(ahead, hands) <= begins(ahead + 1, hands) + 1e-9
    assert begins(ahead + capacity, hands) == pytest.approx(begins(ahead, hands) + seconds)


@given(left=st.lists(st.floats(0, 50), max_size=9), capacity=st.integers(1, 8), seconds=st.floats(0, 50), before=st.floats(0, 100))
def test_an_estimate_is_always_a_time(left: list[float], capacity: int, seconds: float, before: float) -> None:
    found = begins(before, Hands(capacity, seconds, left))
    assert math.isfinite(found)
    assert found >= 0


def test_what_others_send_meanwhile_counts() -> None:
    hands = Hands(1, 1.0, [0.5])
    quiet = place(0, 20, {1: Share(0)}, hands)
    busy = place(0, 20, {1: Share(0, rate=0.5)}, hands)
    assert quiet.position == busy.position == 21
    assert busy.seconds == pytest.approx(2 * quiet.seconds, rel=0.1)


def test_weights_decide_over_the_place() -> None:
    hands = Hands(1, 1.0)
    shares = {0: Share(10, weight=4), 1: Share(100)}
    assert place(0, 8, shares, hands).position < place(0, 8, {1: Share(100)}, hands).position


@given(age=positive, durations=st.lists(positive, max_size=20))
def test_what_is_left_of_a_call(age: float, durations: list[float]) -> None:
    assert remaining(age, durations) > 0
    assert remaining(1.0, [2.0, 4.0, 0.5]) == 2.0


@given(served=st.lists(st.floats(0, 1000), min_size=1, max_size=20))
def test_jains_index_lies_between_one_and_one_of_all(served: list[float]) -> None:
    assert 1 / len(served) - 1e-9 <= jain(served) <= 1 + 1e-9
    assert jain([3.0, 3.0]) == 1
    assert jain([5.0, 0.0]) == 0.5
