"""How accuracy goes on over a sequence of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shiftproof.benchmark.boards.verification import scores_of
from shiftproof.benchmark.metrics import CellScores, average_accuracy, worst_group_accuracy
from shiftproof.benchmark.records import RunRecord


def task_curves(records: Sequence[RunRecord]) -> NDArray[np.float64]:
    """Average and worst-group accuracy over the tasks seen so far, after each of T experiences, mean over records.

    Args:
        records: Finished ones of a row, one a seed.

    Returns:
        (T, 2) float64. What learned the union of all tasks has one value, over all of them.
    """
    curves = np.array([_curve(scores_of(record)) for record in records])  # (K, T, 2)
    mean: NDArray[np.float64] = curves.mean(0)
    return mean


def _curve(scores: CellScores) -> list[tuple[float, float]]:
    curve = []
    for row in range(len(scores.experiences)):
        seen = [column for column, name in enumerate(scores.eval_sets) if name in scores.experiences[: row + 1]]
        # An experience that is no task of its own, as the union of all, is measured on all.
        columns = seen or list(range(len(scores.eval_sets)))
        groups = tuple(scores.groups[row][column] for column in columns)
        now = CellScores(scores.experiences, scores.eval_sets, scores.ordered, (groups,), ())
        curve.append((average_accuracy(now), worst_group_accuracy(now)))
    return curve
