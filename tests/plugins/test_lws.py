"""LwS: the loss against the equations, and each of its parts on and off."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, DataExperience, InputError, Recipe
from shiftproof.plugins.lws import RELEASED, Lws, LwsConfig
from tests.planted import (
    SEEDS,
    SHORT,
    NormalizedPerceptron,
    Split,
    biased,
    resumed,
    surroundings,
    trained,
    two_biased,
    worst_group,
)
from tests.plugins.by_hand import LABELS, Array, WeightsByHand, batch_of, cross_entropies, logits_of, tiny_experience

VISITS = [([0, 2, 5, 6], 0), ([1, 3, 7, 9], 0), ([4, 8, 2, 0], 1), ([5, 6, 1, 2], 1), ([0, 2, 5, 9], 2)]  # rows, epoch
SMALL = LwsConfig(clusters=2, buffer_size=64, warm_up=2)


def started(config: LwsConfig, folder: Path) -> Lws:
    """The strategy at the first step of the tiny experience."""
    strategy = Lws(config, surroundings(folder, SHORT, inputs=4))
    strategy.experience = tiny_experience()
    strategy.before_experience(strategy.experience)
    return strategy


def perturb(strategy: Lws) -> None:
    with torch.no_grad():
        strategy.net.head(0).weight.mul_(1.5)
        strategy.heads.state_dict()["heads.0.bias"].add_(torch.tensor([0.5, -0.5, 1.0, 0.0]))


def own_logits(strategy: Lws, rows: list[int]) -> Array:
    """(B, 2) logits over the clusters of each sample's own label; the head has two columns a label."""
    logits = logits_of(strategy.heads.heads["0"], strategy.experience.train.x[rows])
    return np.stack([row[2 * LABELS[i] : 2 * LABELS[i] + 2] for i, row in zip(rows, logits, strict=True)])


def target_losses(strategy: Lws, rows: list[int]) -> Array:
    return cross_entropies(logits_of(strategy.net.head(0), strategy.experience.train.x[rows]), LABELS[rows])


def cluster_losses(strategy: Lws, rows: list[int]) -> Array:
    return cross_entropies(own_logits(strategy, rows), strategy.cluster[rows].numpy())


def after_two(config: LwsConfig, folder: Path, seed: int, recipe: Recipe = SHORT) -> Lws:
    """The strategy after two biased tasks with a head each."""
    tasks = [split.experience(task, task).without_groups() for task, split in enumerate(two_biased(seed))]
    strategy: Lws = trained(Lws, config, surroundings(folder, recipe, hidden=16, heads={0: 2, 1: 2}, seed=seed), tasks)
    return strategy


def conflicting_share(strategy: Lws) -> float:
    """Of the buffer; the attribute is the sign of coordinate 1."""
    memory = strategy.buffer.contents()
    return float((memory.y != (memory.x[:, 1] > 0)).float().mean())


# the loss


@pytest.mark.parametrize(("gamma", "coefficient"), [(1.0, None), (0.7, 0.2)])
def test_the_stream_loss_is_that_of_the_equations(gamma: float, coefficient: float | None, tmp_path: Path) -> None:
    """Eqs. 5.1 to 5.4 over ten samples, with weights of the sample's last visit."""
    strategy = started(LwsConfig(clusters=2, gamma=gamma, cluster_coefficient=coefficient), tmp_path)
    by_hand = WeightsByHand(gamma, momentum=0.3)
    for rows, epoch in VISITS:
        strategy.epoch = epoch
        target, cluster = target_losses(strategy, rows), cluster_losses(strategy, rows)
        of_cluster = gamma if coefficient is None else coefficient
        expected = np.mean(by_hand.stored[rows] * target) + of_cluster * np.mean(cluster)
        by_hand.record(rows, target, cluster)
        by_hand.store(rows, epoch)
        assert strategy.loss(batch_of(strategy.experience, rows)).item() == pytest.approx(expected, rel=1e-4)
        perturb(strategy)


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 0.5), ("sum", 1.0)])
def test_the_buffer_losses_are_those_of_the_equations(reduction: Literal["mean", "sum"], factor: float, tmp_path: Path) -> None:
    """Eqs. 5.5 to 5.7. The draws are larger than the buffer, so that each of them is all of it."""
    config = LwsConfig(
        clusters=2,
        bins=1,
        warm_up=1,
        weighted=False,
        target_coefficient=0.9,
        replay_cluster_coefficient=0.6,
        distillation=0.8,
        distillation_reduction=reduction,
    )
    strategy, everything = started(config, tmp_path), list(range(10))
    stored = own_logits(strategy, everything)
    strategy.before_epoch(1)
    assert len(strategy.buffer) == 10
    perturb(strategy)
    target, cluster = target_losses(strategy, everything).mean(), cluster_losses(strategy, everything).mean()
    squared = np.square(own_logits(strategy, everything) - stored).sum(axis=1).mean()  # of the norm
    expected = (target + cluster) + (0.9 * target + 0.6 * cluster) + 0.8 * factor * squared
    assert strategy.loss(batch_of(strategy.experience, everything)).item() == pytest.approx(expected, rel=1e-4)


def test_the_buffer_keeps_cluster_logits_of_insertion_and_target_losses_decide_who_enters(tmp_path: Path) -> None:
    strategy = started(LwsConfig(clusters=2, warm_up=1), tmp_path)
    perturb(strategy)
    strategy.before_epoch(1)
    memory = strategy.buffer.contents()
    rows = [int((strategy.experience.train.x == x).all(dim=1).nonzero()) for x in memory.x]
    assert memory.extras["logits"].numpy() == pytest.approx(own_logits(strategy, rows), rel=1e-4)
    assert memory.extras["cluster"].tolist() == strategy.cluster[rows].tolist()
    assert strategy.recorded.numpy() == pytest.approx(target_losses(strategy, list(range(10))), rel=1e-4)


# weights


@pytest.mark.parametrize("seed", SEEDS)
def test_adaptive_weights_raise_the_worst_group_of_the_stream(seed: int, tmp_path: Path) -> None:
    """No buffer takes part: the recipe ends before the warm-up does."""
    split, held_out, worst = biased(seed), biased(seed + 100, p_corr=0.5, count=800), {}
    for weighted in (True, False):
        config = replace(SMALL, weighted=weighted, warm_up=SHORT.epochs)
        strategy = trained(Lws, config, surroundings(tmp_path, SHORT, seed=seed), [split.experience().without_groups()])
        worst[weighted] = worst_group(strategy.model(), held_out)
    assert worst[True] > 0.85
    assert worst[False] < 0.65


def test_with_the_state_of_a_cluster_its_members_weigh_the_same(tmp_path: Path) -> None:
    strategy = started(LwsConfig(clusters=2, state="cluster"), tmp_path)
    for rows, epoch in VISITS:
        strategy.epoch = epoch
        strategy.loss(batch_of(strategy.experience, rows))
    weight = strategy.weights.of(torch.arange(10), 2)
    assert weight[[0, 1, 3, 4]].unique().numel() == 1
    assert weight.unique().numel() == 4


# the buffer


@pytest.mark.parametrize("seed", SEEDS)
def test_bins_of_the_loss_fill_the_buffer_with_conflicting_samples(seed: int, tmp_path: Path) -> None:
    """Weights off, since they take away the difference in loss that the bins go by; one bin is a random sample."""
    share = {bins: conflicting_share(after_two(replace(SMALL, bins=bins, weighted=False), tmp_path, seed)) for bins in (1, 4)}
    assert share[1] < 0.12
    assert share[4] > 0.45


@pytest.mark.parametrize("seed", SEEDS)
def test_replay_from_loss_bins_raises_the_worst_group_over_replay_from_one_bin(seed: int, tmp_path: Path) -> None:
    """Table 5.3, weights off."""
    worst = {}
    for bins in (1, 4):
        strategy = after_two(replace(SMALL, bins=bins, weighted=False), tmp_path, seed)
        held_out = two_biased(seed + 50, p_corr=0.5)
        worst[bins] = np.mean([worst_group(strategy.model(), split, task) for task, split in enumerate(held_out)])
    assert worst[4] > worst[1] + 0.05


@pytest.mark.parametrize("redistribute", [True, False])
def test_each_task_keeps_its_share_of_the_memory(redistribute: bool, tmp_path: Path) -> None:
    """Capacity // t for each of t tasks; without redistribution that is a bound, and so is a bin's part of it."""
    context = surroundings(tmp_path, replace(SHORT, epochs=3), hidden=16, heads={0: 2, 1: 2, 2: 2})
    strategy = Lws(replace(SMALL, buffer_size=60, redistribute=redistribute), context)
    for task in range(3):
        strategy.learn(biased(task).experience(task, task).without_groups())
        composition = strategy.buffer.composition()
        budget = 60 // (task + 1)
        assert (composition.sum(dim=1) <= budget).all()
        if redistribute:
            assert composition.sum(dim=1).tolist() == [budget] * (task + 1)
        else:
            assert composition[task].max() <= budget // 4
    assert strategy.buffer.contents().task.unique().tolist() == [0, 1, 2]


def test_losses_are_taken_once_when_the_warm_up_is_over(tmp_path: Path) -> None:
    """What a run of one epoch ends with is what a longer one with a warm-up of one epoch takes."""
    task, recorded = biased(0).experience().without_groups(), {}
    for epochs, warm_up in ((1, 5), (4, 1), (4, 2)):
        context = surroundings(tmp_path, replace(SHORT, epochs=epochs), hidden=16)
        recorded[epochs, warm_up] = trained(Lws, replace(SMALL, warm_up=warm_up), context, [task]).recorded
    assert torch.equal(recorded[1, 5], recorded[4, 1])
    assert not torch.equal(recorded[1, 5], recorded[4, 2])


def test_a_recipe_shorter_than_the_warm_up_takes_the_losses_at_its_end(tmp_path: Path) -> None:
    split = biased(0)
    context = surroundings(tmp_path, replace(SHORT, epochs=2), hidden=16)
    strategy = trained(Lws, replace(SMALL, warm_up=5), context, [split.experience().without_groups()])
    with torch.no_grad():
        losses = F.cross_entropy(strategy.net(split.x, 0), split.y, reduction="none")
    torch.testing.assert_close(strategy.recorded, losses)
    strategy.learn(biased(1).experience(1).without_groups())
    assert (strategy.buffer.composition().sum(dim=1) > 8).tolist() == [True, True]


def test_a_buffer_without_a_slot_for_each_bin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tasks x bins"):
        after_two(replace(SMALL, buffer_size=7), tmp_path, 0)


# distillation


@pytest.mark.parametrize("seed", SEEDS)
def test_distillation_keeps_the_cluster_logits_of_earlier_tasks(seed: int, tmp_path: Path) -> None:
    moved = {}
    for distillation in (1.0, 0.0):
        strategy = after_two(replace(SMALL, distillation=distillation), tmp_path, seed)
        memory = strategy.buffer.contents()
        first = memory.task == 0
        with torch.no_grad():
            logits, _ = strategy.heads.own(strategy.features(memory.x), memory.extras["address"], 2)
        moved[distillation] = float(F.mse_loss(logits[first], memory.extras["logits"][first]))
    assert moved[1.0] < 0.2 * moved[0.0]


@pytest.mark.parametrize(("trained_heads", "moves"), [("all", True), ("current", False)])
def test_cluster_heads_of_earlier_tasks_learn_on_unless_told_otherwise(
    trained_heads: Literal["all", "current"], moves: bool, tmp_path: Path
) -> None:
    first, second = two_biased(0)
    context = surroundings(tmp_path, SHORT, hidden=16, heads={0: 2, 1: 2})
    strategy = trained(Lws, replace(SMALL, trained_heads=trained_heads), context, [first.experience(0, 0).without_groups()])
    before = {name: tensor.clone() for name, tensor in strategy.heads.state_dict().items()}
    strategy.learn(second.experience(1, 1).without_groups())
    after = strategy.heads.state_dict()
    assert [not torch.equal(after[name], tensor) for name, tensor in before.items()] == [moves, moves]
    fresh = Lws(strategy.config, strategy.context)
    fresh.heads.add("1", 16, 4)
    assert not torch.equal(after["heads.1.weight"], fresh.heads.state_dict()["heads.1.weight"])


# the released code


def test_running_insertion_fills_the_first_bin_until_the_losses_are_taken(tmp_path: Path) -> None:
    """Before, every loss on record is 0; a bin takes a quarter of the memory in the first task."""
    config = replace(SMALL, mode="running", insert_from=1, warm_up=3)
    task, filled = biased(0).experience().without_groups(), {}
    for epochs in (1, 3, 5):
        strategy = trained(Lws, config, surroundings(tmp_path, replace(SHORT, epochs=epochs), hidden=16), [task])
        filled[epochs] = strategy.buffer.composition()[0].tolist() if len(strategy.buffer) else [0] * 4
    assert not started(config, tmp_path).recorded.any()
    assert filled[1] == [0, 0, 0, 0]
    assert filled[3] == [16, 0, 0, 0]
    assert filled[5][0] == 16
    assert sum(filled[5][1:]) > 16


def test_running_mode_writes_over_older_tasks_at_random(tmp_path: Path) -> None:
    """Not a bound as in the text: the first task keeps more than its share of the memory."""
    strategy = after_two(replace(SMALL, mode="running", insert_from=0, warm_up=1, weighted=False), tmp_path, 0)
    composition = strategy.buffer.composition().sum(dim=1)
    assert composition[0] > 32
    assert composition[1] > 8


@pytest.mark.parametrize(("freeze", "steps"), [(True, 2 * 13), (False, 4 * 13)])
def test_statistics_run_on_after_the_pass_unless_frozen_as_released(freeze: bool, steps: int, tmp_path: Path) -> None:
    """In two of four epochs of 13 steps the losses have been taken; each step passes the stream, and the buffer twice."""
    context = surroundings(tmp_path, replace(SHORT, epochs=4), backbone=partial(NormalizedPerceptron, 2, 8))
    strategy = trained(Lws, replace(SMALL, freeze_norm=freeze), context, [biased(0).experience().without_groups()])
    passes = strategy.net.state_dict()["backbone.layer.1.num_batches_tracked"].item()
    assert passes == steps + (0 if freeze else 2 * 2 * 13)


def test_the_pass_is_un_augmented_unless_released(tmp_path: Path) -> None:
    """On pictures that are moved about: the losses of a pass over what is stored are those of the network."""
    rng = np.random.default_rng(0)
    y = torch.arange(40) % 2
    x = torch.from_numpy(rng.standard_normal((40, 1, 8, 8)).astype(np.float32))
    task, same = DataExperience(0, "pictures", 0, ArrayData(x, y)), {}
    recipe = replace(SHORT, epochs=1, augment="shift")
    for augmented_pass in (False, True):
        strategy = Lws(replace(SMALL, augmented_pass=augmented_pass), surroundings(tmp_path, recipe, backbone=Flat))
        strategy.learn(task)
        with torch.no_grad():
            losses = F.cross_entropy(strategy.net(x, 0), y, reduction="none")
        same[augmented_pass] = torch.allclose(strategy.recorded, losses, atol=1e-5)
    assert same == {False: True, True: False}


class Flat(nn.Module):
    """The pixels of an 8 x 8 picture."""

    features = 64

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_the_released_preset_is_the_released_code() -> None:
    """Insertion at every step from epoch 2 on, losses on augmented inputs at epoch 5, statistics frozen after."""
    assert RELEASED.mode == "running"
    assert (RELEASED.insert_from, RELEASED.warm_up, RELEASED.bins, RELEASED.clusters) == (2, 5, 4, 8)
    assert RELEASED.augmented_pass
    assert RELEASED.freeze_norm
    assert (RELEASED.gamma, RELEASED.momentum, RELEASED.distillation_reduction) == (1.0, 0.3, "mean")


# resume

CONFIGS = {
    "population": SMALL,
    "released": replace(RELEASED, clusters=2, buffer_size=16, insert_from=1, warm_up=2, augmented_pass=False),
    "current-heads": replace(SMALL, trained_heads="current", state="cluster"),
}


@pytest.mark.parametrize("after", [5, 8, 11, 14, 20])
@pytest.mark.parametrize("name", CONFIGS)
def test_goes_on_bit_for_bit_after_a_kill(name: str, after: int, tmp_path: Path) -> None:
    """Before, while and after the buffer is filled, and in the second task: 3 steps an epoch, 4 epochs a task."""
    recipe = replace(SHORT, epochs=4)
    backbone = partial(NormalizedPerceptron, 2, 8)
    tasks = [biased(task, count=80).experience(task, task).without_groups() for task in (0, 1)]

    def make(**arguments: Any) -> Any:
        return surroundings(tmp_path, recipe, heads={0: 2, 1: 2}, backbone=backbone, **arguments)

    whole = trained(Lws, CONFIGS[name], make(), tasks)
    parts = resumed(Lws, CONFIGS[name], make, tasks, after)
    for ours, theirs in ((whole.net, parts.net), (whole.heads, parts.heads)):
        for key, tensor in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[key], tensor), key
    assert torch.equal(whole.buffer.contents().x, parts.buffer.contents().x)


def test_attributes_are_named_in_coordinate_one() -> None:
    """What `conflicting_share` reads."""
    split: Split = two_biased(0)[1]
    assert ((split.x[:, 1] > 0) == split.z.bool()).all()
