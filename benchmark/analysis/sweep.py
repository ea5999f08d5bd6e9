"""Coefficients of two task vectors: what every pair of them reaches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shiftproof.benchmark.analysis.deltas import Progress, silent
from shiftproof.benchmark.analysis.measuring import Measured, measure
from shiftproof.benchmark.analysis.plane import Plane, device_of
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import EvalSet

MOST = 201  # values of a coefficient
Point = tuple[float, float]
MEAN, SUM = (0.5, 0.5), (1.0, 1.0)
DEFAULTS = {"mean": MEAN, "sum": SUM}
"""Coefficients that need no choice: weight averaging, and task arithmetic with lambda 1."""


@dataclass(frozen=True)
class Sweep:
    """A grid of coefficients.

    Attributes:
        experts: Names of the first and the second.
        values: Of either coefficient, ascending.
        grid: `grid[i][j]` = measured with `values[i]` of the first and `values[j]` of the second.
        corners: Base, either expert alone and the defaults by name, measured whether or not they lie on the grid.
    """

    experts: tuple[str, str]
    eval_sets: tuple[str, ...]
    values: tuple[float, ...]
    grid: tuple[tuple[Measured, ...], ...]
    corners: dict[str, tuple[Point, Measured]]

    def best(self, column: int | None = None) -> tuple[Point, Measured]:
        """The point of the grid with the highest accuracy, of equal ones that with the lowest loss.

        Args:
            column: Of one eval set; None for the mean over all.
        """
        places = itertools.product(self.values, self.values)
        points = zip(places, itertools.chain.from_iterable(self.grid), strict=True)

        def rank(point: tuple[Point, Measured]) -> tuple[bool, float, float]:
            accuracy, loss = at(point[1], column)
            return not math.isnan(accuracy), accuracy, -loss

        return max(points, key=rank)


def at(measured: Measured, column: int | None) -> tuple[float, float]:
    """Accuracy and loss on one eval set, or their means over all."""
    if column is None:
        return measured.accuracy, measured.loss
    return measured.accuracies[column], measured.losses[column]


def coefficients(low: float = 0.0, high: float = 2.0, step: float = 0.1) -> tuple[float, ...]:
    """Values from `low` to `high`, both included.

    Raises:
        InputError: If there are fewer than two of them, or too many.

    >>> coefficients(0, 1, 0.5)
    (0.0, 0.5, 1.0)
    """
    if not all(math.isfinite(value) for value in (low, high, step)):
        raise InputError(f"expected finite coefficients, got some from {low:g} to {high:g} by {step:g}")
    if step <= 0:
        raise InputError(f"expected --step above 0, got {step:g}")
    if high < low + step:
        raise InputError(f"expected --high of {low + step:g} or more, a --step above the lowest, got {high:g}")
    count = math.floor((high - low) / step + 1e-9) + 1
    if count > MOST:
        raise InputError(f"expected at most {MOST} values of a coefficient, got {count}; take a larger --step")
    return tuple(round(low + place * step, 10) for place in range(count))


def sweep(plane: Plane, evals: Sequence[EvalSet], values: Sequence[float], progress: Progress = silent) -> Sweep:
    """Measure every pair of coefficients.

    Args:
        evals: Those that `plane.answerable` leaves.
        progress: Told of each point that is done.
    """
    device = device_of(plane.first.base)

    def measured(l1: float, l2: float) -> Measured:
        one = measure(plane.model_at(l1, l2), evals, device)
        progress(f"{l1:g}, {l2:g}")
        return one

    marked = {"base": (0.0, 0.0), plane.names[0]: (1.0, 0.0), plane.names[1]: (0.0, 1.0), **DEFAULTS}
    points = dict.fromkeys((*itertools.product(values, values), *marked.values()))
    found = {point: measured(*point) for point in points}
    grid = tuple(tuple(found[l1, l2] for l2 in values) for l1 in values)
    corners = {name: (point, found[point]) for name, point in marked.items()}
    return Sweep(plane.names, tuple(one.name for one in evals), tuple(values), grid, corners)
