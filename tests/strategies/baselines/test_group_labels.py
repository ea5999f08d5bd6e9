"""What knowing the groups is worth: GroupDRO and group-balanced replay."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import Batch, InputError, Recipe
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.baselines.group_labels import (
    GroupBalancedReplay,
    GroupBalancedReplayConfig,
    GroupDro,
    GroupDroConfig,
)
from shiftproof.strategies.baselines.rehearsal import ExperienceReplay, ReplayConfig
from tests.planted import SEEDS, SHORT, NormalizedPerceptron, Split, biased, surroundings, trained, two_biased, worst_group

PATIENT = Recipe(epochs=15, batch_size=32, lr=0.1, momentum=0.0, schedule="constant")
GROUPS = 4


def one_hard_group(seed: int, count: int = 400) -> Split:
    """Four groups of one size. A straight line that suits three of them gives up the fourth, y = 1 and z = 1."""
    rng = np.random.default_rng(seed)
    y, z = np.arange(count) % 2, np.arange(count) // 2 % 2
    centres = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -0.8]])  # of group 2 y + z
    x = centres[2 * y + z] + 0.5 * rng.standard_normal((count, 2))
    return Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), torch.from_numpy(z))


def group_losses(model: nn.Module, split: Split) -> Tensor:
    """(4,) mean cross-entropy of each group."""
    with torch.no_grad():
        losses = F.cross_entropy(model(split.x, 0), split.y, reduction="none")
    groups = 2 * split.y + split.z
    return torch.stack([losses[groups == group].mean() for group in range(GROUPS)])


# gdro


@pytest.mark.parametrize("seed", SEEDS)
def test_group_dro_raises_the_worst_group_where_fine_tuning_takes_the_shortcut(seed: int, tmp_path: Path) -> None:
    split, worst = biased(seed), {}
    for kind, config in ((FineTuning, FineTuningConfig()), (GroupDro, GroupDroConfig())):
        strategy = trained(kind, config, surroundings(tmp_path, SHORT, seed=seed), [split.experience()])
        worst[kind] = worst_group(strategy.model(), split)
    assert worst[GroupDro] > 0.75
    assert worst[FineTuning] < 0.65


@pytest.mark.parametrize("seed", SEEDS)
def test_moving_q_lowers_the_loss_of_the_worst_group_beyond_equal_weights(seed: int, tmp_path: Path) -> None:
    """With a step of nearly 0 the groups keep equal weights; of groups of one size that is plain training."""
    split, worst = one_hard_group(seed), {}
    for step in (1e-9, 0.01):
        strategy = trained(
            GroupDro, GroupDroConfig(step=step), surroundings(tmp_path, PATIENT, seed=seed), [split.experience()]
        )
        worst[step] = float(group_losses(strategy.model(), split).max())
        moved = float((strategy.weights.q - 1 / GROUPS).abs().max())
        assert (moved > 0.05) == (step == 0.01)
    assert worst[0.01] < 0.9 * worst[1e-9]


def test_the_adjustment_favours_small_groups_and_enters_the_loss_only_where_asked(tmp_path: Path) -> None:
    split = biased(0)
    experience, index = split.experience(), torch.arange(200)
    batch = Batch(split.x[index], split.y[index], index, torch.zeros_like(index))
    values = {}
    for adjust_loss in (False, True):
        strategy = GroupDro(GroupDroConfig(step=1.0, adjustment=3.0, adjust_loss=adjust_loss), surroundings(tmp_path, SHORT))
        strategy.before_experience(experience)
        values[adjust_loss] = strategy.loss(batch).item()
    sizes = np.bincount((2 * split.y + split.z).numpy())
    q = strategy.weights.q.numpy()
    assert sizes.argmin() in (1, 2)
    assert q[[1, 2]].sum() > 2 * q[[0, 3]].sum()
    assert values[True] - values[False] == pytest.approx((q * 3 / np.sqrt(sizes)).sum(), rel=1e-5)


@pytest.mark.parametrize(("uniform", "share"), [(True, 0.25), (False, 0.025)])
def test_uniform_draws_each_group_equally_often(uniform: bool, share: float, tmp_path: Path) -> None:
    split = biased(0, count=2000)
    strategy = GroupDro(GroupDroConfig(uniform=uniform), surroundings(tmp_path, SHORT))
    experience = split.experience()
    strategy.before_experience(experience)
    order = strategy.order(experience, torch.Generator().manual_seed(0))
    assert len(order) == 2000
    counts = np.bincount((2 * split.y + split.z)[order].numpy(), minlength=GROUPS)
    # 2000 draws at one in four have a standard deviation of 0.01
    assert counts[1:3] / 2000 == pytest.approx([share, share], abs=0.04 if uniform else 1e-9)


# bgs


def buffered(kind: Any, config: Any, folder: Path, seed: int) -> Any:
    """The strategy after two biased tasks with a head each."""
    first, second = two_biased(seed)
    context = surroundings(folder, SHORT, hidden=16, heads={0: 2, 1: 2}, seed=seed)
    return trained(kind, config, context, [first.experience(0, 0), second.experience(1, 1)])


def cells(strategy: Any) -> list[int]:
    """Samples in the buffer of each (task, y, z); the attribute is the sign of coordinate 1."""
    memory = strategy.buffer.contents()
    return torch.bincount(4 * memory.task + 2 * memory.y + (memory.x[:, 1] > 0).long(), minlength=8).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_balanced_buffer_has_equal_cells_and_a_better_worst_group_than_a_reservoir(seed: int, tmp_path: Path) -> None:
    balanced = buffered(GroupBalancedReplay, GroupBalancedReplayConfig(buffer_size=80), tmp_path, seed)
    reservoir = buffered(ExperienceReplay, ReplayConfig(buffer_size=80), tmp_path, seed)
    assert cells(balanced) == [10] * 8
    assert sum(cells(reservoir)[cell] for cell in (1, 2, 5, 6)) <= 12
    for task, split in enumerate(two_biased(seed + 50, p_corr=0.5)):
        assert worst_group(balanced.model(), split, task) > 0.75
        assert worst_group(reservoir.model(), split, task) < 0.3


@pytest.mark.parametrize("epochs", [1, 3])
def test_each_sample_is_offered_to_the_balanced_buffer_once(epochs: int, tmp_path: Path) -> None:
    split = biased(0, count=40, p_corr=0.5)
    context = surroundings(tmp_path, replace(SHORT, epochs=epochs))
    strategy = trained(GroupBalancedReplay, GroupBalancedReplayConfig(buffer_size=400), context, [split.experience()])
    memory = strategy.buffer.contents()
    assert sorted(map(tuple, memory.x.tolist())) == sorted(map(tuple, split.x.tolist()))


@pytest.mark.parametrize("seed", SEEDS)
def test_retrained_heads_debias_a_network_that_took_the_shortcut(seed: int, tmp_path: Path) -> None:
    config = GroupBalancedReplayConfig(buffer_size=80, mode="last-layer")
    strategy = buffered(GroupBalancedReplay, config, tmp_path, seed)
    model = strategy.model()
    for task, split in enumerate(two_biased(seed + 50, p_corr=0.5)):
        assert worst_group(model, split, task) > 0.85
        assert worst_group(strategy.net, split, task) < 0.4
    for ours, theirs in zip(model.backbone.parameters(), strategy.net.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_retraining_the_heads_leaves_running_statistics_alone(tmp_path: Path) -> None:
    """The heads see the features that they will be given at evaluation."""
    context = surroundings(tmp_path, SHORT, backbone=partial(NormalizedPerceptron, 2, 8))
    config = GroupBalancedReplayConfig(buffer_size=80, mode="last-layer")
    strategy = trained(GroupBalancedReplay, config, context, [biased(0).experience()])
    before = {name: tensor.clone() for name, tensor in strategy.net.backbone.state_dict().items()}
    for name, tensor in strategy.model().backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_buffer_smaller_than_the_number_of_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one slot a cell"):
        buffered(GroupBalancedReplay, GroupBalancedReplayConfig(buffer_size=5), tmp_path, 0)
