"""Ranks with an honest range: what a handful of seeds can tell apart, and what it cannot.

A section of a board is a randomized-block layout: strategies are treatments, seeds are blocks. Paired t-tests with Holm's
correction say next to nothing at three seeds, as each has two degrees of freedom; the residual variance pooled over all rows
has (S - 1)(K - 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
RankRange = tuple[int, int]
Interval = tuple[float, float]

CONFIDENCE = 0.95
OWN_INTERVAL_SEEDS = 3  # with two seeds a t interval has one degree of freedom: 12.7 standard errors to each side


@lru_cache(maxsize=256)
def studentized_range_quantile(confidence: float, groups: int, degrees: int) -> float:
    """Quantile of the range of `groups` means over their standard error; cached, as the integral takes a fifth of a second."""
    return float(stats.studentized_range.ppf(confidence, groups, degrees))


def residual_variance(values: Values) -> tuple[float, int]:
    """Variance that is left when each strategy and each seed has its own mean: the two-way additive model without interaction.

    Args:
        values: (S, K) float64, a row a strategy, a column a seed, with S and K at least 2.

    Returns:
        The mean square of the residuals and its degrees of freedom, (S - 1)(K - 1).

    >>> residual_variance(np.array([[1.0, 2.0], [3.0, 6.0]]))
    (1.0, 1)
    """
    rows, columns = values.shape
    residuals = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    residuals[np.abs(residuals) <= _rounding(values)] = 0.0
    degrees = (rows - 1) * (columns - 1)
    return float(np.square(residuals).sum()) / degrees, degrees


def critical_difference(variance: float, degrees: int, groups: int, blocks: int, confidence: float = CONFIDENCE) -> float:
    """Tukey's honestly significant difference: two means further apart than this differ, simultaneously for all pairs.

    Args:
        variance: Residual mean square.
        degrees: Its degrees of freedom.
        groups: Means that are compared.
        blocks: Observations behind each mean.
        confidence: Probability that no pair is called different in error.
    """
    return studentized_range_quantile(confidence, groups, degrees) * math.sqrt(variance / blocks)


def competition_ranks(means: Sequence[float], higher_is_better: bool) -> list[int]:
    """1 + the number of rows that are better: ties share the best rank, and the ranks behind them are left out (1, 2, 2, 4).

    >>> competition_ranks([0.5, 0.9, 0.7, 0.7], higher_is_better=True)
    [4, 1, 2, 2]
    """
    sign = 1 if higher_is_better else -1
    # Equal means of different seeds can differ in the last bit.
    scores = [sign * float(f"{mean:.12g}") for mean in means]
    return [1 + sum(other > score for other in scores) for score in scores]


def rank_ranges(
    values: Values, higher_is_better: bool, confidence: float = CONFIDENCE
) -> tuple[list[int], list[RankRange] | None]:
    """Rank of each strategy by its mean over seeds, and the ranks that the seeds do not rule out.

    The range of a row is [1 + rows significantly better, S - rows significantly worse]; all true ranks lie in their ranges at
    once with probability `confidence` at least, under the additive model with normal residuals of one variance.

    Args:
        values: (S, K) float64, a row a strategy, a column a seed.
        higher_is_better: Direction of the metric.
        confidence: Of all ranges together.

    Returns:
        Competition ranks, and (low, high) a row; None instead of ranges where there is one seed.

    Raises:
        ValueError: If `values` is empty, not two-dimensional or not finite.

    >>> rank_ranges(np.array([[0.91, 0.90, 0.92], [0.52, 0.50, 0.51], [0.53, 0.50, 0.52]]), higher_is_better=True)
    ([1, 3, 2], [(1, 1), (2, 3), (2, 3)])
    """
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite values of shape (strategies, seeds), got shape {values.shape}; leave out what failed"
        )
    rows, columns = values.shape
    means = [math.fsum(row) / columns for row in values.tolist()]
    ranks = competition_ranks(means, higher_is_better)
    if columns == 1:
        return ranks, None
    if rows == 1:
        return ranks, [(1, 1)]
    variance, degrees = residual_variance(values)
    # Without residual variance any difference counts, but rounding is no difference.
    margin = critical_difference(variance, degrees, rows, columns, confidence) + _rounding(values)
    scores = np.array(means) if higher_is_better else -np.array(means)
    better = scores[:, None] > scores[None, :] + margin  # (S, S): row i is significantly better than row j
    low, high = 1 + better.sum(0), rows - better.sum(1)
    return ranks, [(int(first), int(last)) for first, last in zip(low, high, strict=True)]


def student_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's t interval of the mean from a row's own seeds; None below three seeds."""
    count = len(values)
    if count < OWN_INTERVAL_SEEDS:
        return None
    mean = math.fsum(values) / count
    error = statistics.stdev(values) / math.sqrt(count)
    return _interval(mean, error, count - 1, confidence)


def pooled_interval(values: Sequence[float], variance: float, degrees: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean with the residual variance of all rows; it leaves out what a seed does to all rows alike."""
    error = math.sqrt(variance / len(values))
    return _interval(math.fsum(values) / len(values), error, degrees, confidence)


def _interval(mean: float, error: float, degrees: int, confidence: float) -> Interval:
    half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
    return mean - half, mean + half


def _rounding(values: Values) -> float:
    """What a sum of such values may be off by."""
    return 1e-12 * float(np.abs(values).max())
