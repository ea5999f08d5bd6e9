"""Fine-tuning forgets what contradicts; joint training does not have to."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftproof.benchmark import Fold
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from tests.planted import QUICK, SEEDS, accuracy, contradiction, surroundings, trained


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_learns_the_last_task_and_forgets_the_one_it_contradicts(seed: int, tmp_path: Path) -> None:
    first, second = contradiction(seed)
    context = surroundings(tmp_path, QUICK, hidden=32, seed=seed)
    strategy = trained(FineTuning, FineTuningConfig(), context, [first.experience(0), second.experience(1)])
    assert accuracy(strategy.model(), second) > 0.95
    assert accuracy(strategy.model(), first) < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_training_learns_both_of_two_contradicting_tasks(seed: int, tmp_path: Path) -> None:
    first, second = contradiction(seed)
    union = Fold("all", (first.experience(0), second.experience(1)), (first.evaluation(),)).joint()
    context = surroundings(tmp_path, QUICK, hidden=32, seed=seed)
    strategy = trained(FineTuning, FineTuningConfig(), context, [union])
    assert min(accuracy(strategy.model(), first), accuracy(strategy.model(), second)) > 0.95


def test_joint_training_answers_each_task_with_its_own_head(tmp_path: Path) -> None:
    first, second = contradiction(0, context=False)
    union = Fold("all", (first.experience(0, task=4), second.experience(1, task=7)), (first.evaluation(),)).joint()
    context = surroundings(tmp_path, QUICK, heads={4: 2, 7: 2})
    strategy = trained(FineTuning, FineTuningConfig(), context, [union])
    assert min(accuracy(strategy.model(), first, 4), accuracy(strategy.model(), second, 7)) > 0.95
