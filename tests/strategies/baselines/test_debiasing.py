"""George finds the groups, Learning from Failure finds the samples that the shortcut fails on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score, roc_auc_score
from torch.nn import functional as F

from shiftproof.benchmark import Batch, Recipe
from shiftproof.strategies.baselines.debiasing import George, GeorgeConfig, LearningFromFailure, LffConfig
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from tests.planted import SEEDS, SHORT, Split, accuracy, biased, surroundings, trained, worst_group

BRISK = Recipe(epochs=10, batch_size=32, lr=0.05, momentum=0.9, schedule="constant")
FEW = GeorgeConfig(largest_k=3, factor=1)  # no over-clustering


# george


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [FEW, GeorgeConfig()], ids=["factor-1", "factor-5"])
def test_clusters_recover_the_planted_groups(config: GeorgeConfig, seed: int, tmp_path: Path) -> None:
    split = biased(seed)
    experience = split.experience().without_groups()
    strategy = George(config, surroundings(tmp_path, SHORT, hidden=16, seed=seed))
    strategy.experience = experience
    strategy.before_experience(experience)
    assert homogeneity_score(2 * split.y + split.z, strategy.clusters) > 0.95


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "config", [FEW, GeorgeConfig(largest_k=3, factor=1, adjustment=0.0, uniform=False)], ids=["adjusted", "plain"]
)
def test_george_raises_the_worst_group_without_labels(config: GeorgeConfig, seed: int, tmp_path: Path) -> None:
    split, held_out = biased(seed), biased(seed + 100, p_corr=0.5, count=800)
    context = surroundings(tmp_path, SHORT, hidden=16, seed=seed)
    george = trained(George, config, context, [split.experience().without_groups()])
    plain = trained(FineTuning, FineTuningConfig(), context, [split.experience()])
    assert worst_group(george.model(), held_out) > 0.8
    assert worst_group(plain.model(), held_out) < 0.6


def test_uniform_draws_each_cluster_equally_often(tmp_path: Path) -> None:
    split = biased(0, count=2000)
    experience = split.experience().without_groups()
    strategy = George(FEW, surroundings(tmp_path, SHORT))
    strategy.experience = experience
    strategy.before_experience(experience)
    drawn = strategy.clusters[strategy.order(experience, torch.Generator().manual_seed(0))]
    shares = np.bincount(drawn.numpy()) / 2000
    assert np.bincount(strategy.clusters.numpy()).min() < 120
    assert shares == pytest.approx(np.full(len(shares), 1 / len(shares)), abs=0.04)


# lff


def learned(config: LffConfig, split: Split, folder: Path, seed: int) -> LearningFromFailure:
    context = surroundings(folder, BRISK, inputs=split.x.shape[1], hidden=16, seed=seed)
    strategy: LearningFromFailure = trained(LearningFromFailure, config, context, [split.experience().without_groups()])
    return strategy


def separation(strategy: LearningFromFailure, split: Split) -> float:
    """How well the weights tell conflicting from aligned samples, 0.5 is not at all."""
    return float(roc_auc_score(split.conflicting, strategy.difficulty.of(torch.arange(len(split.y)))))


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_separate_conflicting_samples_where_the_biased_model_is_amplified(seed: int, tmp_path: Path) -> None:
    """With q towards 0 the biased model learns nothing, and its losses tell nothing."""
    split = biased(seed, noise=6)
    assert separation(learned(LffConfig(), split, tmp_path, seed), split) > 0.85
    assert separation(learned(LffConfig(q=0.01), split, tmp_path, seed), split) < 0.5


def test_learning_from_failure_raises_the_worst_group_over_several_seeds(tmp_path: Path) -> None:
    gain = []
    for seed in range(3):
        split, held_out = biased(seed, noise=6), biased(seed + 100, p_corr=0.5, count=800, noise=6)
        plain = trained(
            FineTuning, FineTuningConfig(), surroundings(tmp_path, BRISK, inputs=8, hidden=16, seed=seed), [split.experience()]
        )
        failure = learned(LffConfig(), split, tmp_path, seed)
        gain.append(worst_group(failure.model(), held_out) - worst_group(plain.model(), held_out))
        assert accuracy(failure.model(), held_out) > 0.85
    assert np.mean(gain) > 0.03


def test_weights_are_running_means_over_the_largest_of_the_class(tmp_path: Path) -> None:
    """Two steps against Eq. 3 written out: means of both models' losses, each over the largest of its class."""
    split, alpha = biased(1, count=12), 0.7
    strategy = LearningFromFailure(LffConfig(alpha=alpha), surroundings(tmp_path, BRISK))
    strategy.before_experience(split.experience())
    index = torch.arange(12)
    batch = Batch(split.x, split.y, index, torch.zeros_like(index))
    means = np.zeros((2, 12))
    for step, scale in enumerate((1.0, 2.5)):
        with torch.no_grad():
            strategy.biased.head(0).weight.mul_(scale)
        losses = np.stack([_losses(strategy.biased, split), _losses(strategy.net, split)])
        means = losses if step == 0 else alpha * means + (1 - alpha) * losses
        value = strategy.loss(batch).item()
    largest = np.stack([means[:, split.y == label].max(axis=1) for label in (0, 1)], axis=1)[:, split.y]
    biased_mean, debiased_mean = means / largest
    weight = biased_mean / (biased_mean + debiased_mean + 1e-8)
    amplified = 0.7 * np.exp(-0.7 * losses[0]) * losses[0]
    assert strategy.difficulty.of(index).numpy() == pytest.approx(weight, rel=1e-4)
    assert value == pytest.approx(amplified.mean() + (weight * losses[1]).mean(), rel=1e-4)


def _losses(model: torch.nn.Module, split: Split) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with torch.no_grad():
        return F.cross_entropy(model(split.x, 0).double(), split.y, reduction="none").numpy()
