"""Curves over the task sequence, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shiftproof.benchmark.boards.curves import task_curves
from shiftproof.benchmark.records import RunRecord

MakeRecord = Callable[..., RunRecord]


def test_curves_average_over_the_tasks_seen_so_far_and_over_seeds(make_record: MakeRecord) -> None:
    first = [[[(80, 100), (60, 100)], [(1, 100), (1, 100)]], [[(50, 100), (30, 100)], [(90, 100), (70, 100)]]]
    second = [[[(100, 100), (60, 100)], [(1, 100), (1, 100)]], [[(50, 100), (30, 100)], [(90, 100), (90, 100)]]]
    curves = task_curves([make_record("er", seed, counts) for seed, counts in enumerate((first, second))])
    # After task 0: (70 + 80) / 2 and (60 + 60) / 2.
    # After both: ((40 + 80) / 2 + (40 + 90) / 2) / 2 and ((30 + 70) / 2 + (30 + 90) / 2) / 2.
    assert curves == pytest.approx(np.array([[0.75, 0.60], [0.625, 0.55]]))


def test_the_union_of_all_tasks_is_measured_on_all(make_record: MakeRecord) -> None:
    record = make_record("joint", 0, [[[(80, 100), (60, 100)], [(90, 100), (50, 100)]]], experiences=["joint"])
    assert task_curves([record]) == pytest.approx(np.array([[0.70, 0.55]]))
