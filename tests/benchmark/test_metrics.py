"""Metrics from counts, against hand-computed values and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score

from shiftproof.benchmark.metrics import (
    CellScores,
    Counts,
    average_accuracy,
    backward_transfer,
    balanced_accuracy,
    forgetting,
    group_gap,
    shiftproof_metrics,
    worst_group_accuracy,
)

# Three tasks, two groups of ten; rows are experiences, columns eval sets.
MATRIX: list[list[Counts]] = [
    [((9, 10), (5, 10)), ((5, 10), (5, 10)), ((4, 10), (6, 10))],
    [((10, 10), (6, 10)), ((8, 10), (6, 10)), ((5, 10), (5, 10))],
    [((6, 10), (2, 10)), ((9, 10), (7, 10)), ((10, 10), (8, 10))],
]


def scores(matrix: list[list[Counts]] = MATRIX, ordered: bool = True, names: tuple[str, ...] = ("a", "b", "c")) -> CellScores:
    rows = tuple(tuple(row) for row in matrix)
    return CellScores(names[-len(rows) :], names, ordered, rows, rows)


def test_average_is_the_mean_over_sets_of_the_mean_over_groups() -> None:
    assert average_accuracy(scores()) == pytest.approx((0.4 + 0.8 + 0.9) / 3)


def test_worst_is_the_mean_over_sets_of_the_minimum_over_groups() -> None:
    assert worst_group_accuracy(scores()) == pytest.approx((0.2 + 0.7 + 0.8) / 3)


def test_gap_is_the_mean_over_sets_of_best_minus_worst() -> None:
    assert group_gap(scores()) == pytest.approx((0.4 + 0.2 + 0.2) / 3)


def test_forgetting_takes_the_best_since_the_task_was_learned() -> None:
    # Task a: 0.7, then 0.8, finally 0.4; task b: 0.7, finally 0.8, which is forgetting of -0.1.
    assert forgetting(scores()) == pytest.approx(((0.8 - 0.4) + (0.7 - 0.8)) / 2)


def test_backward_transfer_compares_with_the_accuracy_when_just_learned() -> None:
    assert backward_transfer(scores()) == pytest.approx(((0.4 - 0.7) + (0.8 - 0.7)) / 2)


def test_groups_of_another_size_count_as_much_and_empty_ones_not_at_all() -> None:
    one = CellScores(("a",), ("a",), True, ((((1, 1), (50, 100), (0, 0)),),), ((((51, 101),),),))
    assert average_accuracy(one) == 0.75
    assert worst_group_accuracy(one) == 0.5
    assert group_gap(one) == 0.5


@pytest.mark.parametrize("compute", [forgetting, backward_transfer])
def test_what_needs_an_order_is_none_where_there_is_none(compute: Callable[[CellScores], float | None]) -> None:
    assert compute(scores(ordered=False)) is None
    assert compute(scores(MATRIX[-1:])) is None  # measured once
    assert compute(CellScores(("joint",), ("a", "b", "c"), True, (tuple(MATRIX[-1]),), (tuple(MATRIX[-1]),))) is None


def test_balanced_accuracy_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target, guess = rng.choice(4, 300, p=[0.6, 0.2, 0.15, 0.05]), rng.integers(0, 4, 300)
    classes = tuple((int(((guess == c) & (target == c)).sum()), int((target == c).sum())) for c in range(4))
    one = CellScores(("a",), ("a",), True, ((((1, 1),),),), (((*classes, (0, 0)),),))
    assert balanced_accuracy(one) == pytest.approx(balanced_accuracy_score(target, guess))


pairs = st.integers(1, 50).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
matrices = st.integers(2, 3).flatmap(
    lambda groups: st.lists(
        st.lists(st.lists(pairs, min_size=groups, max_size=groups), min_size=3, max_size=3), min_size=3, max_size=3
    )
)


@settings(max_examples=25, deadline=None, database=None)
@given(matrices)
def test_no_metric_depends_on_the_order_of_groups_or_of_eval_sets_to_the_last_bit(matrix: list[list[Counts]]) -> None:
    def values(order: tuple[int, ...], backwards: bool) -> list[float | None]:
        rows = tuple(tuple(tuple(row[j][:: -1 if backwards else 1]) for j in order) for row in matrix)
        one = CellScores(("a", "b", "c"), tuple("abc"[j] for j in order), True, rows, rows)
        return [spec.compute(one) for spec in shiftproof_metrics()]

    wanted = values((0, 1, 2), backwards=False)
    assert all(values(order, backwards) == wanted for order in permutations(range(3)) for backwards in (False, True))


@settings(max_examples=25, deadline=None, database=None)
@given(matrices)
def test_metrics_stay_in_their_range(matrix: list[list[Counts]]) -> None:
    one = scores(matrix)
    worst, average, gap = worst_group_accuracy(one), average_accuracy(one), group_gap(one)
    assert 0 <= worst <= average + 1e-12
    assert average <= worst + gap + 1e-12
    assert all(-1 <= value <= 1 for value in (forgetting(one), backward_transfer(one)) if value is not None)
    assert math.isclose(balanced_accuracy(one), average, rel_tol=1e-12, abs_tol=1e-12)  # here, classes are the groups


def test_a_results_block_gives_the_same_scores_as_the_counts_it_holds() -> None:
    block = [[[list(pair) for pair in cell] for cell in row] for row in MATRIX]
    results = {
        "experiences": ["a", "b", "c"],
        "eval_sets": [{"name": name, "groups": ["g0", "g1"]} for name in "abc"],
        "counts": block,
        "class_counts": block,
    }
    assert CellScores.from_results(results, ordered=True) == scores()
    assert CellScores.from_results(results, ordered=False) == replace(scores(), ordered=False)


def test_definitions_are_one_line_and_say_where_they_come_from() -> None:
    definitions = {spec.name: spec.definition for spec in shiftproof_metrics()}
    assert all("\n" not in text and "  " not in text for text in definitions.values())
    assert "Eq. 5.8" in definitions["average"]
    assert "Eq. 5.9" in definitions["worst"]
    assert "arXiv:1801.10112" in definitions["forgetting"]
