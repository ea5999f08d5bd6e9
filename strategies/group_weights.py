"""Weights that follow the loss: of groups (GroupDRO) and of samples (Learning from Failure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark.errors import InputError

_EPSILON = 1e-8  # in the denominator of the relative difficulty, as published


def group_means(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """(G,) mean loss of each group in the batch, 0 for a group without samples.

    Args:
        losses: (B,) floating point.
        groups: (B,) int64, values in [0, count).
        count: G.
    """
    members = F.one_hot(groups, count).to(losses.dtype)  # (B, G)
    return losses @ members / members.sum(0).clamp(min=1)


class GroupWeights:
    """GroupDRO's distribution q over groups, by exponentiated gradient (Sagawa et al., ICLR 2020, Algorithm 1).

    q_g is multiplied by exp(step * (loss_g + adjustment / sqrt(n_g))) and normalised; the loss to minimize is the sum of
    q_g loss_g. A group that is absent from the batch counts with loss 0, as released. The released code adds the adjustment in
    place, so that it enters the loss as well, where it is a number that depends on q and has no gradient; here it does so
    only where `adjust_loss` asks for it.

    Make it where the strategy is made, and `start` it with the group sizes of each experience.

    Args:
        step: Step size of q, above 0.
        adjustment: C of the adjustment for the size of a group; 0 is off.
        adjust_loss: Released behaviour: the loss is the sum of q_g (loss_g + C / sqrt(n_g)).
    """

    def __init__(self, *, step: float = 0.01, adjustment: float = 0.0, adjust_loss: bool = False) -> None:
        if step <= 0 or adjustment < 0:
            raise InputError(f"expected step > 0 and adjustment >= 0, got {step} and {adjustment}")
        self.step = step
        self.adjustment = adjustment
        self.adjust_loss = adjust_loss
        self.start(torch.ones(1, dtype=torch.int64))

    def start(self, sizes: Tensor) -> None:
        """Begin with a uniform q over the groups that have samples; the others get 0.

        Args:
            sizes: (G,) int64, samples of each group in the training set.

        Raises:
            InputError: If no group has samples.
        """
        if sizes.ndim != 1 or len(sizes) == 0 or int(sizes.min()) < 0 or int(sizes.max()) == 0:
            raise InputError(f"expected (G,) group sizes, one of them above 0, got {sizes.tolist()}")
        self._margin = self.adjustment / sizes.clamp(min=1).float().sqrt()  # (G,)
        # Logarithms, so that no loss is too large for the exponential.
        self._log_q = (sizes > 0).float().log().log_softmax(0)

    @property
    def q(self) -> Tensor:
        """(G,) float32, adds up to 1."""
        return self._log_q.exp()

    def loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Move q by the losses of a batch, then weight them with it.

        Args:
            losses: (B,) floating point, with gradient.
            groups: (B,) int64.

        Returns:
            Scalar; the gradient goes through the losses, not through q.
        """
        if self._log_q.device != losses.device:
            self._log_q, self._margin = self._log_q.to(losses.device), self._margin.to(losses.device)
        means = group_means(losses, groups, len(self._log_q))
        adjusted = means + self._margin
        self._log_q = (self._log_q + self.step * adjusted.detach().float()).log_softmax(0)
        return self.q @ (adjusted if self.adjust_loss else means).float()

    def state_dict(self) -> dict[str, Any]:
        """q and the adjustment of each group; not the knobs."""
        return {"log_q": self._log_q.clone(), "margin": self._margin.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._log_q, self._margin = state["log_q"].clone(), state["margin"].clone()


def generalized_cross_entropy(logits: Tensor, y: Tensor, q: float = 0.7) -> Tensor:
    """(1 - p_y^q) / q (Zhang & Sabuncu, NeurIPS 2018, Eq. 6): its gradient is p_y^q times that of the cross-entropy.

    Args:
        logits: (B, C) floating point.
        y: (B,) int64.
        q: In (0, 1]; towards 0 it becomes the cross-entropy, at 1 it is the mean absolute error up to a factor.

    Returns:
        (B,) losses.

    Raises:
        InputError: If q lies outside.
    """
    if not 0 < q <= 1:
        raise InputError(f"expected q in (0, 1], got {q}")
    return -torch.expm1(-q * F.cross_entropy(logits, y, reduction="none")) / q


def amplified_cross_entropy(logits: Tensor, y: Tensor, q: float = 0.7) -> Tensor:
    """q p_y^q times the cross-entropy, p_y held constant: what the released LfF trains its biased model with.

    Its gradient is q times that of `generalized_cross_entropy`; the value differs.

    Args:
        logits: (B, C) floating point.
        y: (B,) int64.
        q: In (0, 1].

    Returns:
        (B,) losses.

    Raises:
        InputError: If q lies outside.
    """
    if not 0 < q <= 1:
        raise InputError(f"expected q in (0, 1], got {q}")
    cross_entropy = F.cross_entropy(logits, y, reduction="none")
    return q * torch.exp(-q * cross_entropy.detach()) * cross_entropy


def relative_difficulty(biased: Tensor, debiased: Tensor) -> Tensor:
    """L_b / (L_b + L_d + 1e-8) (Nam et al., NeurIPS 2020, Eq. 3): near 1 where only the biased model fails.

    Args:
        biased: (B,) losses of the biased model, at least 0.
        debiased: (B,) losses of the debiased one.
    """
    return biased / (biased + debiased + _EPSILON)


class RelativeDifficulty:
    """LfF's sample weights from running means of both models' losses, each divided by the largest of its class.

    In a step, record first and then read:
    ```
    difficulty.update(batch.index, biased_losses, debiased_losses)
    weight = difficulty.of(batch.index)
    ```
    Make it where the strategy is made, and `start` it with the targets of each experience.

    Args:
        alpha: Of the running mean, in [0, 1): new = alpha old + (1 - alpha) loss.
        corrected: The first loss of a sample is taken as it is (released); otherwise the mean starts at 0.
    """

    def __init__(self, *, alpha: float = 0.7, corrected: bool = True) -> None:
        if not 0 <= alpha < 1:
            raise InputError(f"expected alpha in [0, 1), got {alpha}")
        self.alpha = alpha
        self.corrected = corrected
        self.start(torch.zeros(1, dtype=torch.int64))

    def start(self, y: Tensor) -> None:
        """Forget everything and begin with the targets of a training set.

        Args:
            y: (N,) int64, from 0.

        Raises:
            InputError: If there is no sample or a target is negative.
        """
        if y.ndim != 1 or len(y) == 0 or int(y.min()) < 0:
            raise InputError(f"expected (N,) targets from 0, N > 0, got shape {tuple(y.shape)}")
        self._y = y
        self._classes = int(y.max()) + 1
        self._means = y.new_zeros((2, len(y)), dtype=torch.float32)  # of the biased and of the debiased model
        self._touched = torch.zeros_like(y, dtype=torch.bool)

    def update(self, index: Tensor, biased: Tensor, debiased: Tensor) -> None:
        """Record the losses of a step.

        Args:
            index: (B,) int64, positions in the training set. Where a sample occurs twice, one of its losses counts.
            biased: (B,) losses at least 0 of the biased model; gradients are cut off.
            debiased: (B,) likewise of the debiased one.
        """
        self._follow(index.device)
        losses = torch.stack((biased.detach(), debiased.detach())).float()
        means = torch.lerp(losses, self._means.index_select(1, index), self.alpha)
        if self.corrected:
            means = torch.where(self._touched.index_select(0, index), means, losses)
        self._means.index_copy_(1, index, means)
        self._touched.index_fill_(0, index, True)

    def of(self, index: Tensor) -> Tensor:
        """(B,) float32 weights in [0, 1] of the samples at (B,) int64 `index`."""
        self._follow(index.device)
        largest = self._means.new_zeros((2, self._classes))
        largest = largest.scatter_reduce_(1, self._y.expand(2, -1), self._means, "amax")  # (2, C)
        scale = largest.index_select(1, self._y.index_select(0, index)).clamp(min=torch.finfo(torch.float32).tiny)
        biased, debiased = self._means.index_select(1, index) / scale
        return relative_difficulty(biased, debiased)

    def state_dict(self) -> dict[str, Any]:
        """The running means; not the knobs."""
        return {"y": self._y.clone(), "means": self._means.clone(), "touched": self._touched.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.start(state["y"].clone())
        self._means, self._touched = state["means"].clone(), state["touched"].clone()

    def _follow(self, device: torch.device) -> None:
        if self._y.device != device:
            self._y, self._means, self._touched = (t.to(device) for t in (self._y, self._means, self._touched))
