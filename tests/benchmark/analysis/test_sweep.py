"""Sweeps over coefficients. Oracles: networks whose answers are known everywhere on the grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from shiftproof.benchmark import EvalSet, ExpertExperience
from shiftproof.benchmark.analysis.measuring import Measured
from shiftproof.benchmark.analysis.plane import Plane
from shiftproof.benchmark.analysis.sweep import Sweep, coefficients, sweep
from shiftproof.benchmark.errors import InputError

Product = Callable[[str, float, float], ExpertExperience]


def test_the_usual_coefficients_are_0_to_2_by_a_tenth() -> None:
    values = coefficients()
    assert len(values) == 21
    assert values[:4] == (0.0, 0.1, 0.2, 0.3)  # no 0.30000000000000004
    assert values[-1] == 2.0
    assert coefficients(-1, 1, 0.75) == (-1.0, -0.25, 0.5)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0, 2, 0), "expected --step above 0, got 0"),
        ((0, 2, -1), "expected --step above 0, got -1"),
        ((2, 0, 0.1), r"expected --high of 2\.1 or more, a --step above the lowest, got 0"),
        ((0, 0, 0.1), r"expected --high of 0\.1 or more, a --step above the lowest, got 0"),
        ((0, math.inf, 1), "expected finite coefficients, got some from 0 to inf by 1"),
        ((0, 2, math.nan), "expected finite coefficients, got some from 0 to 2 by nan"),
    ],
)
def test_bounds_that_make_no_grid_are_refused(bounds: tuple[float, float, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        coefficients(*bounds)


def test_a_grid_that_would_never_end_is_refused() -> None:
    with pytest.raises(InputError, match="expected at most 201 values of a coefficient, got 2001; take a larger --step"):
        coefficients(0, 2, 0.001)


def test_every_point_has_the_loss_of_the_network_that_it_is(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    """a = (1, 0) and b = (0, 1) upon zero: at (l1, l2) the logits are l1 l2 x and its negative."""
    told: list[str] = []
    plane = Plane(product_expert("a", 1.0, 0.0), product_expert("b", 0.0, 1.0))
    values = (-1.0, 0.0, 0.5, 2.0)
    found = sweep(plane, evals[:1], values, told.append)
    for i, l1 in enumerate(values):
        for j, l2 in enumerate(values):
            assert found.grid[i][j].loss == pytest.approx(math.log1p(math.exp(-2 * l1 * l2)), rel=1e-6)
    assert found.best() == ((2.0, 2.0), found.grid[3][3])
    assert found.corners["sum"][1].loss == pytest.approx(math.log1p(math.exp(-2)))  # not on the grid
    assert found.corners["mean"] == ((0.5, 0.5), found.grid[2][2])
    assert list(found.corners) == ["base", "a", "b", "mean", "sum"]
    assert len(told) == 16 + 3  # (1, 0), (0, 1) and (1, 1) are not on the grid


def test_the_first_coefficient_is_that_of_the_first_expert(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    plane = Plane(product_expert("a", 1.0, 1.0), product_expert("b", -1.0, 1.0))
    found = sweep(plane, evals[:1], (0.0, 1.0))
    assert found.experts == ("a", "b")
    assert (found.grid[1][0].accuracy, found.grid[0][1].accuracy) == (1.0, 0.0)


def test_the_best_is_the_most_accurate_then_that_of_least_loss_and_never_nan() -> None:
    nan, good, better = Measured((math.nan,), (math.nan,)), Measured((0.9,), (0.5,)), Measured((0.9,), (0.4,))
    found = Sweep(("a", "b"), ("e",), (0.0, 1.0), ((nan, good), (better, Measured((0.8,), (0.1,)))), {})
    assert found.best() == ((1.0, 0.0), better)


def test_each_eval_set_has_a_best_of_its_own() -> None:
    first, second = Measured((0.9, 0.1), (0.1, 0.9)), Measured((0.2, 0.6), (0.1, 0.9))
    found = Sweep(("a", "b"), ("e", "f"), (0.0, 1.0), ((first, second), (second, second)), {})
    assert [found.best(column)[0] for column in (None, 0, 1)] == [(0.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
