"""BPA: weights of pseudo-groups by size and loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shiftproof.plugins.bpa import RELEASED, Bpa, BpaConfig, BpaReplay, BpaReplayConfig
from shiftproof.strategies import ClusterWeights
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from tests.planted import QUICK, SEEDS, SHORT, accuracy, biased, contradiction, resumed, surroundings, trained, worst_group
from tests.plugins.by_hand import WeightsByHand, batch_of, cross_entropies, logits_of, tiny_experience

VISITS = [([0, 2, 5, 6], 0), ([1, 3, 7, 9], 0), ([4, 8, 2, 0], 1), ([5, 6, 1, 2], 1), ([0, 2, 5, 9], 2)]  # rows, epoch


def started(kind: Any, config: Any, folder: Path) -> Any:
    """The strategy at the first step of the tiny experience."""
    strategy = kind(config, surroundings(folder, SHORT, inputs=4))
    strategy.experience = tiny_experience()
    strategy.before_experience(strategy.experience)
    return strategy


@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_the_loss_is_that_of_the_equations(momentum: float, tmp_path: Path) -> None:
    strategy = started(Bpa, BpaConfig(clusters=2, momentum=momentum, features="base"), tmp_path)
    by_hand = WeightsByHand(gamma=0.0, momentum=momentum)
    for rows, epoch in VISITS:
        strategy.epoch, batch = epoch, batch_of(strategy.experience, rows)
        losses = cross_entropies(logits_of(strategy.net.head(0), batch.x), batch.y.numpy())
        expected = np.mean(by_hand.stored[rows] * losses)
        by_hand.record(rows, losses)
        by_hand.store(rows, epoch)
        assert strategy.loss(batch).item() == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            strategy.net.head(0).weight.mul_(1.5)


def test_current_weights_follow_from_the_losses_recorded_before_the_step(tmp_path: Path) -> None:
    config = BpaConfig(clusters=2, momentum=1.0, applied="current", features="base")
    strategy, by_hand = started(Bpa, config, tmp_path), WeightsByHand(gamma=0.0, momentum=1.0)
    for rows, epoch in VISITS:
        strategy.epoch, batch = epoch, batch_of(strategy.experience, rows)
        losses = cross_entropies(logits_of(strategy.net.head(0), batch.x), batch.y.numpy())
        value = strategy.loss(batch).item()
        if by_hand.errors().any():  # before the first step only sizes are known
            assert value == pytest.approx(np.mean(by_hand.fresh(rows) * losses), rel=1e-4)
        by_hand.record(rows, losses)


def test_the_released_weights_are_sizes_alone_until_every_sample_was_seen_and_blend_exponentially(tmp_path: Path) -> None:
    strategy = started(Bpa, replace(RELEASED, clusters=2, features="base"), tmp_path)
    rows = [0, 2, 5, 6]
    batch = batch_of(strategy.experience, rows)
    losses = cross_entropies(logits_of(strategy.net.head(0), batch.x), batch.y.numpy())
    sizes = np.array([10 / 4, 10 / 1, 10 / 2, 10 / 3])
    weight = sizes / sizes.mean() * np.exp(0.05 * sizes / sizes.mean())
    assert strategy.loss(batch).item() == pytest.approx(np.mean(weight / weight.mean() * losses), rel=1e-4)


def test_the_released_preset_is_the_rule_of_the_released_code(tmp_path: Path) -> None:
    strategy, rule = started(Bpa, RELEASED, tmp_path), ClusterWeights.bpa_released()
    made = {name: value for name, value in vars(strategy.weights).items() if isinstance(value, bool | float | int | str)}
    assert made.items() >= {(name, getattr(rule, name)) for name in ("gamma", "momentum", "applied", "state", "refresh_every")}
    assert made.items() >= {(name, getattr(rule, name)) for name in ("sizes_until_seen", "exponential", "_unseen_up_to")}


def test_errors_are_computed_anew_between_epochs_and_every_refresh(tmp_path: Path) -> None:
    config = BpaConfig(clusters=2, momentum=1.0, applied="current", refresh_every=10, features="base")
    strategy = started(Bpa, config, tmp_path)
    index = torch.arange(10)
    before = strategy.weights.of(index, 0)
    strategy.loss(batch_of(strategy.experience, list(range(10))))
    assert torch.equal(strategy.weights.of(index, 0), before)
    strategy.before_epoch(1)
    assert not torch.equal(strategy.weights.of(index, 1), before)


def test_with_the_state_of_a_cluster_its_members_weigh_the_same(tmp_path: Path) -> None:
    index = torch.arange(10)
    spread = {}
    for state in ("sample", "cluster"):
        strategy = started(Bpa, BpaConfig(clusters=2, state=state, features="base"), tmp_path)
        for rows, epoch in VISITS:
            strategy.epoch = epoch
            strategy.loss(batch_of(strategy.experience, rows))
        weight = strategy.weights.of(index, 2)
        spread[state] = float(weight[[0, 1, 3, 4]].max() - weight[[0, 1, 3, 4]].min())
    assert spread["cluster"] == 0
    assert spread["sample"] > 0.01


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [BpaConfig(clusters=2), replace(RELEASED, clusters=2)], ids=["default", "released"])
def test_minorities_weigh_more_and_the_worst_group_rises(config: BpaConfig, seed: int, tmp_path: Path) -> None:
    split, held_out = biased(seed), biased(seed + 100, p_corr=0.5, count=800)
    context = surroundings(tmp_path, SHORT, hidden=16, seed=seed)
    strategy = trained(Bpa, config, context, [split.experience().without_groups()])
    weight = strategy.weights.of(torch.arange(len(split.y)), SHORT.epochs)
    assert weight[split.conflicting].mean() > 5 * weight[~split.conflicting].mean()
    plain = trained(FineTuning, FineTuningConfig(), context, [split.experience()])
    assert worst_group(strategy.model(), held_out) > 0.85
    assert worst_group(plain.model(), held_out) < 0.6


def test_clusters_of_the_trained_network_serve_where_those_of_the_base_do_not(tmp_path: Path) -> None:
    """Noise hides the groups from the base; plain training, which takes the shortcut, brings them out."""
    split, held_out, worst = biased(0, noise=2), biased(100, p_corr=0.5, count=800, noise=2), {}
    for features in ("erm", "base"):
        context = surroundings(tmp_path, SHORT, inputs=4, hidden=16)
        strategy = trained(Bpa, BpaConfig(clusters=2, features=features), context, [split.experience().without_groups()])
        worst[features] = worst_group(strategy.model(), held_out)
    assert worst["erm"] > worst["base"] + 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_only_with_replay_a_contradicted_task_is_remembered(seed: int, tmp_path: Path) -> None:
    first, second = contradiction(seed)
    context = surroundings(tmp_path, QUICK, hidden=32, seed=seed)
    tasks = [first.experience(0).without_groups(), second.experience(1).without_groups()]
    assert accuracy(trained(BpaReplay, BpaReplayConfig(buffer_size=40), context, tasks).model(), first) > 0.9
    assert accuracy(trained(Bpa, BpaConfig(), context, tasks).model(), first) < 0.2


def test_replayed_samples_are_not_weighted(tmp_path: Path) -> None:
    """Mean over stream, weighted, and memory: with everything in the buffer, its part is the plain cross-entropy."""
    strategy = started(BpaReplay, BpaReplayConfig(clusters=2, features="base"), tmp_path)
    everything = batch_of(strategy.experience, list(range(10)))
    strategy.loss(everything)
    strategy.after_step(everything)
    plain = F.cross_entropy(strategy.logits(everything), everything.y).item()
    weight = strategy.weights.of(everything.index, 0)
    stream = (weight * F.cross_entropy(strategy.logits(everything), everything.y, reduction="none")).mean().item()
    assert strategy.loss(everything).item() == pytest.approx((stream + plain) / 2, rel=1e-5)


@pytest.mark.parametrize("after", [4, 20, 30])
def test_the_released_preset_goes_on_bit_for_bit_after_a_kill(after: int, tmp_path: Path) -> None:
    def make(**arguments: Any) -> Any:
        return surroundings(tmp_path, SHORT, hidden=8, **arguments)

    tasks = [biased(seed, count=80).experience(seed).without_groups() for seed in (0, 1)]
    whole = trained(BpaReplay, BpaReplayConfig(**vars(RELEASED)), make(), tasks)
    parts = resumed(BpaReplay, BpaReplayConfig(**vars(RELEASED)), make, tasks, after)
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(parts.net.state_dict()[name], tensor), name
