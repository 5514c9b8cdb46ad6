"""Figures of retrieval."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.retrieval import interval, ndcg, percentile, recall


def test_recall_counts_groups():
    gold = [{"a", "a2"}, {"b"}]
    assert [recall(["x", "a2", "a", "b"], gold, k) for k in (1, 2, 3, 4)] == [0, 0.5, 0.5, 1]


def test_gain_is_1_in_the_best_order_and_less_in_any_other():
    gold = [{"a"}, {"b"}]
    assert ndcg(["b", "a", "x"], gold) == pytest.approx(1)
    assert ndcg(["a", "x", "b"], gold) == pytest.approx((1 + 0.5) / (1 + 1 / 1.584962500721156))
    assert ndcg(["x"], gold) == 0


@given(st.lists(st.sampled_from("abcdef"), unique=True), st.lists(st.frozensets(st.sampled_from("abcdef")), max_size=4))
def test_figures_are_shares(found, gold):
    assert 0 <= recall(found, gold, 5) <= 1
    assert 0 <= ndcg(found, gold) <= 1 + 1e-9


def test_the_interval_of_what_never_varies_is_a_point():
    assert interval([0.5, 0.5], [[0, 1], [1, 1]]) == (0.5, 0.5)
    assert interval([], []) == (0.0, 1.0)
    assert interval([0.0, 1.0], [[0, 0], [0, 1], [1, 1]]) == (0.0, 1.0)


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([], 0.5) == 0.0
