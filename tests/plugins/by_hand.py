"""The equations of BPA, ClusterFix and LwS, sample by sample, as oracles for what the strategies compute in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import nn

from shiftproof.benchmark import ArrayData, Batch, DataExperience

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# Ten samples, two planted clusters in each class: 4 + 1 of label 0, 2 + 3 of label 1.
CLUSTERS: Ints = np.array([0, 0, 1, 0, 0, 2, 3, 3, 2, 3])
LABELS: Ints = CLUSTERS // 2


def tiny_experience() -> DataExperience:
    """Ten samples whose directions give the clusters away."""
    rng = np.random.default_rng(0)
    x = 3 * np.eye(4)[CLUSTERS] + 0.2 * rng.standard_normal((10, 4))
    return DataExperience(0, "tiny", 0, ArrayData(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(LABELS)))


def batch_of(experience: DataExperience, rows: Sequence[int]) -> Batch:
    """The batch with these positions of the training set."""
    index = torch.tensor(rows)
    return Batch(experience.train.x[index], experience.train.y[index], index, experience.tasks(index))


def logits_of(head: nn.Module, x: torch.Tensor) -> Array:
    """(N, C) logits of a linear head on the inputs."""
    weight, bias = (parameter.detach().numpy().astype(np.float64) for parameter in head.parameters())
    return np.asarray(x.numpy().astype(np.float64) @ weight.T + bias)


def cross_entropies(logits: Array, y: Ints) -> Array:
    """(N,) losses."""
    return np.asarray(logsumexp(logits, axis=1) - logits[np.arange(len(y)), y])


@dataclass
class WeightsByHand:
    """w_c of Eqs. 4.5, 4.8 and 5.3 over the ten samples: N / N_c times A_c over the sum of all A, over the batch mean.

    A_c is the mean target loss plus gamma times the mean cluster loss of the members recorded so far, 0 without any. From
    epoch 1 on, new = (1 - m) old + m fresh, for each sample.
    """

    gamma: float
    momentum: float
    target: Array = field(default_factory=lambda: np.full(10, np.nan))
    cluster: Array = field(default_factory=lambda: np.full(10, np.nan))
    stored: Array = field(default_factory=lambda: np.ones(10))

    def record(self, rows: Sequence[int], target: Array, cluster: Array | None = None) -> None:
        """The latest losses of these samples."""
        self.target[list(rows)] = target
        self.cluster[list(rows)] = 0 if cluster is None else cluster

    def errors(self) -> Array:
        """(4,) A_c."""
        errors = np.zeros(4)
        for c in range(4):
            members = [i for i in range(10) if CLUSTERS[i] == c and not np.isnan(self.target[i])]
            if members:
                errors[c] = np.mean(self.target[members]) + self.gamma * np.mean(self.cluster[members])
        return errors

    def fresh(self, rows: Sequence[int]) -> Array:
        """(B,) weights from the errors as they stand."""
        share = self.errors() / self.errors().sum()
        raw = np.array([10 / np.sum(CLUSTERS[i] == CLUSTERS) * share[CLUSTERS[i]] for i in rows])
        return np.asarray(raw / raw.mean())

    def store(self, rows: Sequence[int], epoch: int) -> None:
        """Keep the weights for the samples' next visit."""
        old, fresh = self.stored[list(rows)], self.fresh(rows)
        self.stored[list(rows)] = fresh if epoch == 0 else (1 - self.momentum) * old + self.momentum * fresh
