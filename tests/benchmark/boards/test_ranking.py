"""Oracles: printed tables of the studentized range, scipy's Tukey HSD, least squares with dummy variables, simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from shiftproof.benchmark.boards.ranking import (
    Values,
    competition_ranks,
    critical_difference,
    pooled_interval,
    rank_ranges,
    residual_variance,
    student_interval,
    studentized_range_quantile,
)

STRATEGIES, SEEDS = 18, 3


@pytest.mark.parametrize(
    ("groups", "degrees", "quantile"),
    # Upper 5 % points as printed in statistics textbooks.
    [(2, 10, 3.15), (3, 10, 3.88), (5, 20, 4.23), (10, 20, 5.01), (20, 120, 5.13), (4, 5, 5.22)],
)
def test_quantiles_of_the_studentized_range_agree_with_printed_tables(groups: int, degrees: int, quantile: float) -> None:
    assert studentized_range_quantile(0.95, groups, degrees) == pytest.approx(quantile, abs=0.006)


def test_the_critical_difference_is_the_half_width_of_scipys_tukey_intervals() -> None:
    samples = np.random.Generator(np.random.PCG64(0)).normal(size=(4, 6))
    within = float(samples.var(1, ddof=1).mean())
    low = stats.tukey_hsd(*samples).confidence_interval(0.95).low
    expected = samples[0].mean() - samples[1].mean() - low[0, 1]
    assert critical_difference(within, 4 * 5, groups=4, blocks=6) == pytest.approx(expected, rel=1e-6)


def test_the_residual_variance_is_that_of_least_squares_with_dummies_for_strategies_and_seeds() -> None:
    values = np.random.Generator(np.random.PCG64(1)).normal(size=(5, 4))
    cells = list(itertools.product(range(5), range(4)))
    design = np.array([[row == i for i in range(5)] + [column == j for j in range(4)] for row, column in cells], dtype=float)
    fitted = design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
    variance, degrees = residual_variance(values)
    assert degrees == len(cells) - np.linalg.matrix_rank(design)
    assert variance == pytest.approx(np.square(values.ravel() - fitted).sum() / degrees)


def test_the_residual_variance_of_an_additive_table_is_exactly_zero() -> None:
    values = np.add.outer(np.linspace(0.1, 0.9, 7), [0.0, 0.01, 0.07])
    assert residual_variance(values) == (0.0, 12)


def _true_ranks(means: Values) -> Values:
    ranks: Values = 1.0 + (means[:, None] < means[None, :]).sum(1)
    return ranks


@pytest.mark.parametrize(
    "means",
    [
        np.linspace(0.15, 0.75, STRATEGIES),
        # Two crowds, as where one group of methods takes the shortcut and the other does not.
        np.concatenate([np.linspace(0.15, 0.35, 9), np.linspace(0.55, 0.75, 9)]),
    ],
    ids=["even", "two crowds"],
)
def test_all_true_ranks_lie_in_their_ranges_in_95_percent_of_draws_and_ranges_are_narrow(means: Values) -> None:
    draws, rng = 1000, np.random.Generator(np.random.PCG64(0))
    covered, widths = 0, []
    for _ in range(draws):
        seeds = rng.normal(0, 0.03, SEEDS)
        values = means[:, None] + seeds[None, :] + rng.normal(0, 0.04, (STRATEGIES, SEEDS))
        _, ranges = rank_ranges(values, higher_is_better=True)
        assert ranges is not None
        low, high = np.array(ranges).T
        covered += bool(((low <= _true_ranks(means)) & (_true_ranks(means) <= high)).all())
        widths.append(float((high - low + 1).mean()))
    print(f"all true ranks covered in {covered / draws:.1%} of draws, mean range {np.mean(widths):.1f} of {STRATEGIES} ranks")
    assert covered / draws >= 0.95
    assert np.mean(widths) <= STRATEGIES / 2


def test_equal_strategies_are_told_apart_in_5_percent_of_draws() -> None:
    # The only case in which Tukey's error rate is exact and not a bound.
    draws, rng = 2000, np.random.Generator(np.random.PCG64(3))
    apart = sum(rank_ranges(rng.normal(size=(6, 3)), True)[1] != [(1, 6)] * 6 for _ in range(draws))
    assert apart / draws == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / draws))


def test_what_a_seed_does_to_all_strategies_alike_does_not_widen_ranges() -> None:
    values = np.random.Generator(np.random.PCG64(4)).normal(np.arange(6)[:, None], 1.0, (6, 3))
    assert rank_ranges(values + 100 * np.arange(3), True) == rank_ranges(values, True)


def test_without_residual_variance_every_difference_counts_and_ties_stay_ties() -> None:
    values = np.array([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.5, 0.6, 0.7]])
    assert rank_ranges(values, True) == ([3, 1, 1], [(3, 3), (1, 2), (1, 2)])


def test_identical_values_share_the_first_rank() -> None:
    assert rank_ranges(np.full((3, 3), 0.7), True) == ([1, 1, 1], [(1, 3)] * 3)


def test_one_seed_gives_ranks_without_ranges() -> None:
    assert rank_ranges(np.array([[0.2], [0.9]]), True) == ([2, 1], None)


def test_a_single_strategy_is_first() -> None:
    assert rank_ranges(np.array([[0.2, 0.3]]), True) == ([1], [(1, 1)])


def test_direction_turns_the_ranking_around() -> None:
    values = np.array([[0.1, 0.1, 0.11], [0.5, 0.51, 0.5], [0.9, 0.91, 0.92]])
    assert rank_ranges(values, True)[0] == [3, 2, 1]
    assert rank_ranges(values, False) == rank_ranges(-values, True)


def test_ties_share_the_best_rank_and_leave_out_the_next() -> None:
    assert competition_ranks([0.3, 0.1 + 0.2, 0.9, 0.1], higher_is_better=True) == [2, 2, 1, 4]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.integers(2, 4), st.integers(0, 2**16), st.booleans())
def test_the_rank_lies_in_its_range_and_ranges_within_the_table(rows: int, columns: int, seed: int, higher: bool) -> None:
    values = np.random.Generator(np.random.PCG64(seed)).integers(0, 5, (rows, columns)) / 4.0
    ranks, ranges = rank_ranges(values, higher)
    assert ranges is not None
    assert all(1 <= low <= rank <= high <= rows for rank, (low, high) in zip(ranks, ranges, strict=True))


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3), np.array([[0.1, math.nan]])])
def test_values_that_cannot_be_ranked_are_refused(values: Values) -> None:
    with pytest.raises(ValueError, match="expected finite values of shape"):
        rank_ranges(values, True)


def test_a_rows_own_interval_is_scipys_t_interval() -> None:
    values = [0.61, 0.66, 0.58, 0.63]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert student_interval(values) == pytest.approx(expected)


def test_two_seeds_give_no_interval_of_their_own() -> None:
    assert student_interval([0.5, 0.6]) is None


def test_the_pooled_interval_uses_the_variance_it_is_given() -> None:
    low, high = pooled_interval([0.5, 0.6, 0.7], variance=0.0012, degrees=34)
    # t quantile 2.032 from a printed table, standard error sqrt(0.0012 / 3) = 0.02
    assert (low, high) == pytest.approx((0.6 - 0.04064, 0.6 + 0.04064), abs=1e-5)
