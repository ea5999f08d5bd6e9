"""ClusterFix: weights from target and pseudo-label errors, and pseudo-labels as a task of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shiftproof.plugins.clusterfix import ClusterFix, ClusterFixConfig, ClusterFixReplay, ClusterFixReplayConfig
from tests.planted import QUICK, SEEDS, SHORT, accuracy, biased, contradiction, surroundings, trained, worst_group
from tests.plugins.by_hand import CLUSTERS, LABELS, WeightsByHand, batch_of, cross_entropies, logits_of, tiny_experience

VISITS = [([0, 2, 5, 6], 0), ([1, 3, 7, 9], 0), ([4, 8, 2, 0], 1), ([5, 6, 1, 2], 1), ([0, 2, 5, 9], 2)]  # rows, epoch


def started(kind: Any, config: Any, folder: Path) -> Any:
    """The strategy at the first step of the tiny experience."""
    strategy = kind(config, surroundings(folder, SHORT, inputs=4))
    strategy.experience = tiny_experience()
    strategy.before_experience(strategy.experience)
    return strategy


def pseudo_losses(strategy: Any, rows: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Cross-entropy over the two clusters of each sample's own label; the head has two columns a label."""
    logits = logits_of(strategy.heads.heads["0"], strategy.experience.train.x[rows])
    own = np.stack([row[2 * LABELS[i] : 2 * LABELS[i] + 2] for i, row in zip(rows, logits, strict=True)])
    return cross_entropies(own, strategy.pseudo[rows].numpy())


def test_the_tiny_experience_is_clustered_as_planted(tmp_path: Path) -> None:
    strategy = started(ClusterFix, ClusterFixConfig(clusters=2), tmp_path)
    found = 2 * strategy.experience.train.y + strategy.pseudo
    assert len({(int(a), int(b)) for a, b in zip(found, CLUSTERS, strict=True)}) == 4


@pytest.mark.parametrize(("gamma", "momentum"), [(0.5, 0.3), (0.01, 0.3), (2.0, 1.0)])
def test_the_loss_is_that_of_the_equations(gamma: float, momentum: float, tmp_path: Path) -> None:
    """Eqs. 4.6 to 4.9, with weights of the sample's last visit."""
    strategy = started(ClusterFix, ClusterFixConfig(clusters=2, gamma=gamma, momentum=momentum), tmp_path)
    by_hand = WeightsByHand(gamma, momentum)
    for rows, epoch in VISITS:
        strategy.epoch, batch = epoch, batch_of(strategy.experience, rows)
        target = cross_entropies(logits_of(strategy.net.head(0), batch.x), batch.y.numpy())
        pseudo = pseudo_losses(strategy, rows)
        expected = np.mean(by_hand.stored[rows] * target) + gamma * np.mean(pseudo)
        by_hand.record(rows, target, pseudo)
        by_hand.store(rows, epoch)
        assert strategy.loss(batch).item() == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            strategy.net.head(0).weight.mul_(1.5)
            strategy.heads.heads["0"].bias.add_(torch.tensor([0.5, -0.5, 1.0, 0.0]))


@pytest.mark.parametrize("state", ["sample", "cluster"])
def test_momentum_of_either_state_slows_the_weights(state: Literal["sample", "cluster"], tmp_path: Path) -> None:
    """Where one cluster's error jumps, a tenth of the momentum follows a tenth as far."""
    index, moved = torch.arange(10), {}
    for momentum in (0.05, 0.5):
        config = ClusterFixConfig(clusters=2, momentum=momentum, state=state)
        strategy = started(ClusterFix, config, tmp_path)
        everything = batch_of(strategy.experience, list(range(10)))
        strategy.loss(everything)
        before = strategy.weights.of(index, 1)
        with torch.no_grad():
            strategy.net.head(0).bias.add_(torch.tensor([4.0, 0.0]))
        strategy.epoch = 1
        strategy.loss(everything)
        moved[momentum] = float((strategy.weights.of(index, 1) - before).norm())
    assert moved[0.5] == pytest.approx(10 * moved[0.05], rel=0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_minorities_weigh_more_and_the_worst_group_rises(seed: int, tmp_path: Path) -> None:
    split, held_out = biased(seed), biased(seed + 100, p_corr=0.5, count=800)
    worst = {}
    for weighted in (True, False):
        context = surroundings(tmp_path, SHORT, seed=seed)
        config = ClusterFixConfig(clusters=2, weighted=weighted)
        strategy = trained(ClusterFix, config, context, [split.experience().without_groups()])
        worst[weighted] = worst_group(strategy.model(), held_out)
        weight = strategy.weights.of(torch.arange(len(split.y)), SHORT.epochs)
        assert weight[split.conflicting].mean() > 5 * weight[~split.conflicting].mean()
    assert worst[True] > 0.85
    assert worst[False] < 0.65


@pytest.mark.parametrize("seed", SEEDS)
def test_gamma_teaches_the_pseudo_labels_and_without_it_their_heads_stay_as_they_were(seed: int, tmp_path: Path) -> None:
    split = biased(seed)
    losses, changed = {}, {}
    for gamma in (0.5, 0.0):
        strategy = ClusterFix(ClusterFixConfig(clusters=2, gamma=gamma), surroundings(tmp_path, SHORT, seed=seed))
        strategy.learn(split.experience().without_groups())
        with torch.no_grad():
            logits, _ = strategy.heads.own(strategy.features(split.x), strategy.address, 2)
        losses[gamma] = float(F.cross_entropy(logits, strategy.pseudo))
        fresh = ClusterFix(strategy.config, strategy.context)
        fresh.experience = split.experience().without_groups()
        fresh.before_experience(fresh.experience)
        initial, final = (one.heads.state_dict()["heads.0.weight"] for one in (fresh, strategy))
        changed[gamma] = not torch.equal(initial, final)
    assert changed == {0.5: True, 0.0: False}
    assert losses[0.5] < 0.2
    assert losses[0.5] < 0.5 * losses[0.0]


def test_a_cluster_that_is_hard_to_tell_weighs_more_the_larger_gamma_is(tmp_path: Path) -> None:
    weights = {}
    for gamma in (0.0, 0.5, 2.0):
        strategy = started(ClusterFix, ClusterFixConfig(clusters=2, gamma=gamma), tmp_path)
        column = int(strategy.address[2, 0] + strategy.pseudo[2])  # of the one sample in cluster 1
        with torch.no_grad():
            strategy.heads.heads["0"].bias[column] -= 20  # its pseudo-label becomes the last one to be chosen
        strategy.loss(batch_of(strategy.experience, list(range(10))))
        weights[gamma] = float(strategy.weights.of(torch.tensor([2]), 1))
    assert weights[0.0] < weights[0.5] < weights[2.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_only_with_replay_a_contradicted_task_is_remembered(seed: int, tmp_path: Path) -> None:
    first, second = contradiction(seed)
    context = surroundings(tmp_path, QUICK, hidden=32, seed=seed)
    tasks = [first.experience(0).without_groups(), second.experience(1).without_groups()]
    replay = trained(ClusterFixReplay, ClusterFixReplayConfig(buffer_size=40), context, tasks)
    assert accuracy(replay.model(), first) > 0.9
    assert accuracy(trained(ClusterFix, ClusterFixConfig(), context, tasks).model(), first) < 0.2


def test_replayed_samples_have_neither_weights_nor_pseudo_labels(tmp_path: Path) -> None:
    """Mean over stream (Eq. 4.9) and memory: with everything in the buffer, its part is the plain cross-entropy."""
    strategy = started(ClusterFixReplay, ClusterFixReplayConfig(clusters=2), tmp_path)
    everything = batch_of(strategy.experience, list(range(10)))
    strategy.loss(everything)
    strategy.after_step(everything)
    losses = F.cross_entropy(strategy.logits(everything), everything.y, reduction="none")
    weight = strategy.weights.of(everything.index, 0)
    stream = (weight * losses).mean().item() + 0.5 * pseudo_losses(strategy, list(range(10))).mean()
    assert strategy.loss(everything).item() == pytest.approx((stream + losses.mean().item()) / 2, rel=1e-4)
