"""The loss barrier between two models: how far the line between them rises above that between their losses.

Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671; with the line between
the losses as in Entezari et al., ICLR 2022, arXiv:2110.06296.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shiftproof.benchmark.analysis.deltas import Progress, silent
from shiftproof.benchmark.analysis.measuring import Measured, measure
from shiftproof.benchmark.analysis.plane import Plane, device_of
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import EvalSet

POINTS, MOST = 11, 1001


@dataclass(frozen=True)
class Barrier:
    """Measured along a line.

    Attributes:
        experts: Names of its ends.
        points: 0 at the first, 1 at the second.
        line: Measured at each point.
    """

    experts: tuple[str, str]
    eval_sets: tuple[str, ...]
    points: tuple[float, ...]
    line: tuple[Measured, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean over eval sets at each point."""
        return tuple(one.loss for one in self.line)

    @property
    def heights(self) -> tuple[float, ...]:
        """The barrier on each eval set."""
        return tuple(map(barrier_height, zip(*(one.losses for one in self.line), strict=True)))

    @property
    def height(self) -> float:
        """The barrier of the mean over eval sets."""
        return barrier_height(self.losses)


def chord(losses: Sequence[float]) -> list[float]:
    """The line between the first and the last loss, at equally spaced points."""
    last = len(losses) - 1
    return [((last - place) * losses[0] + place * losses[-1]) / last for place in range(len(losses))]


def barrier_height(losses: Sequence[float]) -> float:
    """How far losses at equally spaced points rise above the line between the ends at most; 0 where they nowhere do.

    NaN if one of them is not finite.

    >>> barrier_height([1.0, 2.5, 2.0])
    1.0
    """
    if not all(map(math.isfinite, losses)):
        return math.nan
    inside = zip(losses[1:-1], chord(losses)[1:-1], strict=True)
    return max([0.0, *(loss - straight for loss, straight in inside)])


def check_points(points: int) -> None:
    """Raise InputError for fewer points than a line with an inside has, or for too many."""
    if not 3 <= points <= MOST:
        raise InputError(f"expected --points from 3 to {MOST}, got {points}")


def barrier(plane: Plane, evals: Sequence[EvalSet], points: int = POINTS, progress: Progress = silent) -> Barrier:
    """Measure models on the line between two experts.

    Args:
        evals: Those that `plane.answerable` leaves.
        points: How many, ends included.
        progress: Told of each point that is done.

    Raises:
        InputError: As `check_points`.
    """
    check_points(points)
    device = device_of(plane.first.base)
    places = tuple(place / (points - 1) for place in range(points))
    line = []
    for place in places:
        line.append(measure(plane.model_at(1 - place, place), evals, device))
        progress(f"{place:g}")
    return Barrier(plane.names, tuple(one.name for one in evals), places, tuple(line))
