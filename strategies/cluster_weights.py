"""Sample weights from the size and the difficulty of a sample's cluster: BPA, ClusterFix (Eq. 4.8) and LwS (Eq. 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies.storage import Array, as_array

_ARRAYS = ("_cluster", "_inverse_frequency", "_recorded", "_sums", "_error", "_weight", "_cluster_weight")


def cluster_error(sums: Array, counts: Array, gamma: float) -> Array:
    """A_c: mean target loss plus gamma times mean cluster loss of the members recorded so far; 0 where there are none.

    Args:
        sums: (C, 2) float64, sum over members of the target loss and of the cluster loss.
        counts: (C, 2) float64, over how many members.
        gamma: Weight of the cluster loss.

    Returns:
        (C,) float64.
    """
    # Sums that are kept by differences leave rounding noise where the last member has gone, hence the second factor.
    means = sums / np.maximum(counts, 1) * (counts > 0)
    return means[:, 0] + gamma * means[:, 1]


def raw_weights(inverse_frequency: Array, error: Array) -> Array:
    """(N / N_c) A_c / sum of A: Eq. 4.8 up to a factor that the division by the batch mean removes.

    Read as printed, w_c = A_c / N_c makes the loss tiny and dependent on the size of the data set.

    Args:
        inverse_frequency: (C,) float64, N / N_c over the whole training set.
        error: (C,) float64, A_c of `cluster_error`.

    Returns:
        (C,) float64; `inverse_frequency` where no cluster has an error yet.
    """
    total = error.sum()
    return inverse_frequency * (error / total) if total > 0 else inverse_frequency


def over_batch_mean(weight: Array) -> Array:
    """(B,) weights divided by their mean; ones where all of them are 0."""
    total = weight.sum()
    return weight * (len(weight) / total) if total > 0 else np.ones_like(weight)


def exponential_blend(weight: Array) -> Array:
    """(B,) w exp(0.05 w) over its batch mean: the default blend of the released BPA, which in effect uses no older weight."""
    return over_batch_mean(weight * np.exp(0.05 * weight))


class ClusterWeights:
    """Weights of the target loss, refreshed from the latest loss that was recorded of each sample.

    In a step, read first and then record:
    ```
    weight = weights.of(batch.index, epoch)
    weights.update(batch.index, target_losses, cluster_losses, epoch)
    ```
    The defaults are the rule of the released LwS, which serves ClusterFix, too. `ClusterWeights.bpa_released()` is BPA as
    released; `gamma=0, momentum=1, applied="current"` is Eq. 4.5 without any of the release's details.

    Make it where the strategy is made, and `start` it with the clusters of each experience.

    State is numpy arrays on the CPU, whatever the device of a batch: a step of a small model takes 2 ms, of which the thirty
    operations of an update would take a tenth in torch. On a GPU an update waits for the losses to be computed.

    Args:
        gamma: Weight of the cluster loss in a cluster's error, at least 0. Chapter 4 gives none; 0.5 is the "lambda" of 4.3.1.
        momentum: m in (0, 1]: new = (1 - m) old + m fresh from epoch 1 on, and fresh in epoch 0; 1 is off.
        state: What has momentum: the weight of each sample, after division by the mean of its batch (released LwS; stored
            without normalising again), or the weight of each cluster, before it (as the text words it).
        applied: For `state="sample"`: "stored" gives the weight computed after the sample's last visit, 1 before the first
            one (released LwS); "current" computes it from the losses recorded so far (BPA).
        zero_is_unseen: A recorded loss of exactly 0 does not count as a member (released LwS).
        refresh_every: Steps between two computations of the clusters' errors (BPA: 10, and at `end_epoch`).
        sizes_until_seen: Use N / N_c alone until every sample has been recorded once (BPA).
        exponential: Apply `exponential_blend` to what `of` gives (the default of the released BPA).
    """

    def __init__(
        self,
        *,
        gamma: float = 0.5,
        momentum: float = 0.3,
        state: Literal["sample", "cluster"] = "sample",
        applied: Literal["stored", "current"] = "stored",
        zero_is_unseen: bool = True,
        refresh_every: int = 1,
        sizes_until_seen: bool = False,
        exponential: bool = False,
    ) -> None:
        if gamma < 0 or not 0 < momentum <= 1 or refresh_every < 1:
            got = f"{gamma}, {momentum} and {refresh_every}"
            raise InputError(f"expected gamma >= 0, momentum in (0, 1] and refresh_every >= 1, got {got}")
        if state not in ("sample", "cluster") or applied not in ("stored", "current"):
            raise InputError(f"expected state sample|cluster and applied stored|current, got {state!r} and {applied!r}")
        self.gamma = gamma
        self.momentum = momentum
        self.state = state
        self.applied = applied
        self.refresh_every = refresh_every
        self.sizes_until_seen = sizes_until_seen
        self.exponential = exponential
        self._unseen_up_to = 0.0 if zero_is_unseen else -0.5  # losses are not negative; -1 is "never recorded"
        self.start(torch.zeros(1, dtype=torch.int64))

    @classmethod
    def bpa_released(cls) -> ClusterWeights:
        """BPA as its released code runs: no momentum in effect, errors every 10 steps, the exponential blend."""
        return cls(
            gamma=0.0,
            momentum=1.0,
            applied="current",
            zero_is_unseen=False,
            refresh_every=10,
            sizes_until_seen=True,
            exponential=True,
        )

    def start(self, cluster: Tensor) -> None:
        """Forget everything and begin with the clusters of a training set.

        Args:
            cluster: (N,) int64, ids over the whole training set of an experience, from 0, unique over classes.

        Raises:
            InputError: If there is no sample or an id is negative.
        """
        if cluster.ndim != 1 or len(cluster) == 0 or int(cluster.min()) < 0:
            raise InputError(f"expected (N,) cluster ids from 0, N > 0, got shape {tuple(cluster.shape)}")
        self._cluster = as_array(cluster)
        sizes = np.bincount(self._cluster)
        self._inverse_frequency = len(cluster) / np.maximum(sizes, 1)  # (C,) float64
        self._recorded = np.full((len(cluster), 2), -1.0)  # latest target and cluster loss
        # Kept up to date by differences, so that a step costs O(B), not O(N); float64, so that they do not drift.
        self._sums = np.zeros((len(sizes), 4))  # of both losses, and their counts
        self._error = np.zeros(len(sizes))
        self._weight = np.ones(len(cluster))  # state="sample"
        self._cluster_weight = self._inverse_frequency if self.sizes_until_seen else np.ones(len(sizes))  # state="cluster"
        self._place = np.zeros_like(self._cluster)  # scratch
        self._steps = 0
        self._unseen = len(cluster)  # samples without a record

    def of(self, index: Tensor, epoch: int) -> Tensor:
        """(B,) float32 weights to apply now.

        Args:
            index: (B,) int64, positions in the training set.
            epoch: Counted from 0 within the experience.
        """
        rows = as_array(index)
        if self.state == "cluster":
            weight = over_batch_mean(self._cluster_weight[self._cluster[rows]])
        elif self.applied == "stored":
            weight = self._weight[rows]
        else:
            weight = self._fresh(rows, epoch)
        if self.exponential:
            weight = exponential_blend(weight)
        return torch.from_numpy(weight.astype(np.float32)).to(index.device)

    def update(self, index: Tensor, target_losses: Tensor, cluster_losses: Tensor | None, epoch: int) -> None:
        """Record the losses of a step.

        Args:
            index: (B,) int64. Where a sample occurs twice, one of its losses is recorded.
            target_losses: (B,) float32, at least 0, not weighted; gradients are cut off.
            cluster_losses: (B,) likewise; None where there is no cluster head.
            epoch: As given to `of`.
        """
        rows = as_array(index)
        losses = np.zeros((len(rows), 2))
        losses[:, 0] = as_array(target_losses)
        if cluster_losses is not None:
            losses[:, 1] = as_array(cluster_losses)
        if self.state == "sample" and self.applied == "current" and self.momentum < 1:
            self._weight[rows] = self._fresh(rows, epoch)  # what `of` gave: this step has applied it
        self._record(rows, losses)
        self._steps += 1
        if self._steps % self.refresh_every == 0:
            self._refresh(epoch)
        if self.state == "sample" and self.applied == "stored":
            self._weight[rows] = self._fresh(rows, epoch)

    def end_epoch(self, epoch: int) -> None:
        """Compute the errors anew whatever `refresh_every` says, and count steps from 0; not needed where that is 1."""
        if self.refresh_every > 1:
            self._steps = 0
            self._refresh(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The recorded losses and what follows from them; not the knobs."""
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        return {**tensors, "steps": self._steps, "unseen": self._unseen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        for name in _ARRAYS:
            setattr(self, name, as_array(state[name]).copy())
        self._place = np.zeros_like(self._cluster)
        self._steps, self._unseen = state["steps"], state["unseen"]

    def _record(self, rows: Array, losses: Array) -> None:
        before = self._recorded[rows]  # (B, 2)
        self._recorded[rows] = losses
        # Where a sample occurs twice in the batch, the later occurrence stays in the record, and it alone may count.
        place = np.arange(len(rows))
        self._place[rows] = place
        counts = self._place[rows] == place
        self._unseen -= int(np.count_nonzero(counts & (before[:, 0] < 0)))
        change = (self._tally(losses) - self._tally(before)) * counts[:, None]  # (B, 4)
        np.add.at(self._sums, self._cluster[rows], change)

    def _tally(self, losses: Array) -> Array:
        counts = losses > self._unseen_up_to
        return np.concatenate((losses * counts, counts), axis=1)

    def _refresh(self, epoch: int) -> None:
        self._error = cluster_error(self._sums[:, :2], self._sums[:, 2:], self.gamma)
        if self.state == "cluster":
            fresh = self._raw()
            blended = self._blend(self._cluster_weight, fresh, epoch)
            # A cluster nobody has been seen of keeps its weight: 0 would keep it from being learned.
            self._cluster_weight = np.where(fresh > 0, blended, self._cluster_weight)

    def _raw(self) -> Array:
        sizes_only = self.sizes_until_seen and self._unseen > 0
        return self._inverse_frequency if sizes_only else raw_weights(self._inverse_frequency, self._error)

    def _fresh(self, rows: Array, epoch: int) -> Array:
        return self._blend(self._weight[rows], over_batch_mean(self._raw()[self._cluster[rows]]), epoch)

    def _blend(self, old: Array, fresh: Array, epoch: int) -> Array:
        return fresh if epoch == 0 or self.momentum == 1 else (1 - self.momentum) * old + self.momentum * fresh
