"""Sample weights from the size and the difficulty of a sample's cluster: BPA, ClusterFix (Eq. 4.8) and LwS (Eq. 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError

_TENSORS = ("_cluster", "_inverse_frequency", "_recorded", "_sums", "_error", "_weight", "_cluster_weight")


def cluster_error(sums: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """A_c: mean target loss plus gamma times mean cluster loss of the members recorded so far; 0 where there are none.

    Args:
        sums: (C, 2), sum over members of the target loss and of the cluster loss.
        counts: (C, 2), over how many members.
        gamma: Weight of the cluster loss.

    Returns:
        (C,) of the dtype of `sums`.
    """
    means = sums / counts.clamp(min=1)
    return torch.add(means[:, 0], means[:, 1], alpha=gamma)


def raw_weights(inverse_frequency: Tensor, error: Tensor) -> Tensor:
    """(N / N_c) A_c / sum of A: Eq. 4.8 up to a factor that the division by the batch mean removes.

    Read as printed, w_c = A_c / N_c makes the loss tiny and dependent on the size of the data set.

    Args:
        inverse_frequency: (C,) float32, N / N_c over the whole training set.
        error: (C,), A_c of `cluster_error`.

    Returns:
        (C,) float32; `inverse_frequency` where no cluster has an error yet.
    """
    total = error.sum()
    return inverse_frequency * torch.where(total > 0, error / total, torch.ones_like(error)).float()


def over_batch_mean(weight: Tensor) -> Tensor:
    """(B,) weights divided by their mean; ones where all of them are 0."""
    mean = weight.mean()
    return torch.where(mean > 0, weight / mean, torch.ones_like(weight))


def exponential_blend(weight: Tensor) -> Tensor:
    """(B,) w exp(0.05 w) over its batch mean: what the default blend of the released BPA comes to, which uses no older weight."""
    return over_batch_mean(weight * torch.exp(0.05 * weight))


class ClusterWeights:
    """Weights of the target loss, refreshed from the latest loss that was recorded of each sample.

    In a step, read first and then record:
    ```
    weight = weights.of(batch.index, epoch)
    weights.update(batch.index, target_losses, cluster_losses, epoch)
    ```
    The defaults are ClusterFix and LwS as released; `ClusterWeights.bpa_released()` is BPA as released. BPA as its paper has it
    is `gamma=0, momentum=0.3`; without any momentum, `gamma=0, momentum=1, applied="current"`.

    Make it where the strategy is made, and `start` it with the clusters of each experience. State follows the batch's device.

    Args:
        gamma: Weight of the cluster loss in a cluster's error, at least 0. Chapter 4 gives no value; 0.5 is the "lambda" of 4.3.1.
        momentum: m in (0, 1]: new = (1 - m) old + m fresh from epoch 1 on, and fresh in epoch 0; 1 is off.
        state: What has momentum: the weight of each sample, after division by the mean of its batch (released LwS; stored without
            normalising again), or the weight of each cluster, before it (as the text words it).
        applied: For `state="sample"`: "stored" gives the weight computed after the sample's last visit, 1 before the first one
            (released LwS); "current" computes it from the losses recorded so far (BPA).
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
        sizes = cluster.bincount()
        self._cluster = cluster
        self._inverse_frequency = len(cluster) / sizes.clamp(min=1).float()  # (C,)
        self._recorded = cluster.new_full((len(cluster), 2), -1, dtype=torch.float32)  # latest target and cluster loss
        # Kept up to date by differences, so that a step costs O(B), not O(N); float64, so that they do not drift.
        self._sums = cluster.new_zeros((len(sizes), 4), dtype=torch.float64)  # of both losses, and their counts
        self._error = cluster.new_zeros(len(sizes), dtype=torch.float64)
        self._weight = cluster.new_ones(len(cluster), dtype=torch.float32)  # state="sample"
        self._cluster_weight = cluster.new_ones(len(sizes), dtype=torch.float32)  # state="cluster"
        self._steps = 0
        self._all_seen = False

    def of(self, index: Tensor, epoch: int) -> Tensor:
        """(B,) float32 weights to apply now.

        Args:
            index: (B,) int64, positions in the training set.
            epoch: Counted from 0 within the experience.
        """
        self._follow(index.device)
        if self.state == "cluster":
            weight = over_batch_mean(self._cluster_weight.index_select(0, self._cluster.index_select(0, index)))
        elif self.applied == "stored":
            weight = self._weight.index_select(0, index)
        else:
            weight = self._fresh(index, epoch)
        return exponential_blend(weight) if self.exponential else weight

    def update(self, index: Tensor, target_losses: Tensor, cluster_losses: Tensor | None, epoch: int) -> None:
        """Record the losses of a step.

        Args:
            index: (B,) int64. Where a sample occurs twice, one of its losses is recorded.
            target_losses: (B,) at least 0, not weighted; gradients are cut off.
            cluster_losses: (B,) likewise; None where there is no cluster head.
            epoch: As given to `of`.
        """
        self._follow(index.device)
        if self.state == "sample" and self.applied == "current" and self.momentum < 1:
            self._weight[index] = self._fresh(index, epoch)  # what `of` gave, which this step has applied
        pseudo = torch.zeros_like(target_losses) if cluster_losses is None else cluster_losses
        self._record(index, torch.stack((target_losses.detach(), pseudo.detach()), 1).float())
        self._steps += 1
        if self._steps % self.refresh_every == 0:
            self._refresh(epoch)
        if self.state == "sample" and self.applied == "stored":
            self._weight[index] = self._fresh(index, epoch)

    def end_epoch(self, epoch: int) -> None:
        """Compute the errors anew whatever `refresh_every` says, and count steps from 0; not needed where that is 1."""
        if self.refresh_every > 1:
            self._steps = 0
            self._refresh(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The recorded losses and what follows from them; not the knobs."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {**tensors, "steps": self._steps, "all_seen": self._all_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        for name in _TENSORS:
            setattr(self, name, state[name].clone())
        self._steps, self._all_seen = state["steps"], state["all_seen"]

    def _record(self, index: Tensor, losses: Tensor) -> None:
        before = self._recorded.index_select(0, index)  # (B, 2)
        self._recorded[index] = losses
        after = self._recorded.index_select(0, index)
        change = self._tally(after) - self._tally(before)  # (B, 4)
        self._sums.index_add_(0, self._cluster.index_select(0, index), change)

    def _tally(self, losses: Tensor) -> Tensor:
        counts = losses > self._unseen_up_to
        return torch.cat((losses * counts, counts), 1).double()

    def _refresh(self, epoch: int) -> None:
        self._error = cluster_error(self._sums[:, :2], self._sums[:, 2:], self.gamma)
        if self.state == "cluster":
            fresh = self._raw()
            old = self._cluster_weight
            blended = old.lerp(fresh, self.momentum) if epoch > 0 else fresh
            # A cluster nobody has been seen of keeps its weight: 0 would keep it from being learned.
            self._cluster_weight = torch.where(self._error > 0, blended, old)

    def _raw(self) -> Tensor:
        if self.sizes_until_seen and not self._all_seen:
            self._all_seen = bool((self._recorded[:, 0] >= 0).all())
            if not self._all_seen:
                return self._inverse_frequency
        return raw_weights(self._inverse_frequency, self._error)

    def _fresh(self, index: Tensor, epoch: int) -> Tensor:
        weight = over_batch_mean(self._raw().index_select(0, self._cluster.index_select(0, index)))
        if epoch == 0 or self.momentum == 1:
            return weight
        return self._weight.index_select(0, index).lerp(weight, self.momentum)

    def _follow(self, device: torch.device) -> None:
        if self._cluster.device != device:
            for name in _TENSORS:
                setattr(self, name, getattr(self, name).to(device))
