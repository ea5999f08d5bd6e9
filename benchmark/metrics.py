"""Metrics: pure functions of the integer counts of one cell. Defined once, named in every record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.hookspecs import hookimpl

Counts = tuple[tuple[int, int], ...]
"""(correct, total) of each group or class."""


@dataclass(frozen=True)
class CellScores:
    """The counts of one cell.

    Attributes:
        experiences: Names in the order of learning, one a row.
        eval_sets: Names, one a column.
        ordered: True where the order of experiences means something, so that forgetting is defined.
        groups: `groups[i][j]` = counts a group of eval set j after experience i.
        classes: The same a class.
    """

    experiences: tuple[str, ...]
    eval_sets: tuple[str, ...]
    ordered: bool
    groups: tuple[tuple[Counts, ...], ...]
    classes: tuple[tuple[Counts, ...], ...]

    @classmethod
    def from_results(cls, results: Mapping[str, Any], ordered: bool) -> CellScores:
        """From the `results` block of a record."""

        def rows(block: Any) -> tuple[tuple[Counts, ...], ...]:
            return tuple(tuple(tuple((int(c), int(n)) for c, n in cells) for cells in row) for row in block)

        names = tuple(eval_set["name"] for eval_set in results["eval_sets"])
        return cls(tuple(results["experiences"]), names, ordered, rows(results["counts"]), rows(results["class_counts"]))


def _accuracies(counts: Counts) -> list[float]:
    return [correct / total for correct, total in counts if total]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)  # exact, so that neither order nor version of Python shows in the last digit


def average_accuracy(scores: CellScores) -> float:
    """Mean over eval sets of the mean over groups, after the last experience (thesis Eq. 5.8)."""
    return _mean(_mean(_accuracies(counts)) for counts in scores.groups[-1])


def worst_group_accuracy(scores: CellScores) -> float:
    """Mean over eval sets of the minimum over groups, after the last experience (thesis Eq. 5.9)."""
    return _mean(min(_accuracies(counts)) for counts in scores.groups[-1])


def group_gap(scores: CellScores) -> float:
    """Mean over eval sets of best minus worst group accuracy, after the last experience."""
    return _mean(max(_accuracies(counts)) - min(_accuracies(counts)) for counts in scores.groups[-1])


def balanced_accuracy(scores: CellScores) -> float:
    """Mean over eval sets of the mean recall over classes, after the last experience."""
    return _mean(_mean(_accuracies(counts)) for counts in scores.classes[-1])


def _learned(scores: CellScores) -> list[tuple[int, int]]:
    """(row, column) pairs of experiences with an eval set of their own, but for the last experience."""
    columns = {name: column for column, name in enumerate(scores.eval_sets)}
    return [(row, columns[name]) for row, name in enumerate(scores.experiences[:-1]) if name in columns]


def forgetting(scores: CellScores) -> float | None:
    """Mean over earlier experiences of best group-mean accuracy since it was learned minus the final one.

    Chaudhry et al., ECCV 2018, arXiv:1801.10112.
    """
    pairs = _learned(scores)
    if not scores.ordered or not pairs:
        return None

    def drop(row: int, column: int) -> float:
        history = [_mean(_accuracies(scores.groups[i][column])) for i in range(row, len(scores.experiences))]
        return max(history[:-1]) - history[-1]

    return _mean(drop(row, column) for row, column in pairs)


def backward_transfer(scores: CellScores) -> float | None:
    """Mean over earlier experiences of final minus just-learned group-mean accuracy (Lopez-Paz & Ranzato, arXiv:1706.08840)."""
    pairs = _learned(scores)
    if not scores.ordered or not pairs:
        return None
    return _mean(
        _mean(_accuracies(scores.groups[-1][column])) - _mean(_accuracies(scores.groups[row][column])) for row, column in pairs
    )


@hookimpl
def shiftproof_metrics() -> list[MetricSpec]:
    """The built-in metrics."""

    def spec(compute: Any, name: str, higher: bool, over_folds: Any = "mean", primary: bool = False) -> MetricSpec:
        return MetricSpec(name, compute, higher, " ".join(compute.__doc__.split()), over_folds, primary)

    return [
        spec(average_accuracy, "average", True, primary=True),
        spec(worst_group_accuracy, "worst", True, "worst", primary=True),
        spec(group_gap, "gap", False),
        spec(balanced_accuracy, "balanced", True),
        spec(forgetting, "forgetting", False, primary=True),
        spec(backward_transfer, "backward-transfer", True),
    ]
