"""The recipe's optimizer, its learning rate, and the step with clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from shiftproof.benchmark import Recipe


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    # All tensors in one call, with the same results; PyTorch does so by itself on GPUs only.
    foreach = True if all(parameter.device.type == "cpu" for parameter in parameters) else None
    if recipe.optimizer == "sgd":
        is_one_kind = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        sgd = FlatSGD if is_one_kind else torch.optim.SGD
        return sgd(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, foreach=foreach)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, foreach=foreach)


def clip_and_step(optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Step along gradients scaled down to a joint norm of at most `clip_norm`, unless that is 0."""
    if isinstance(optimizer, FlatSGD):
        optimizer.clip_and_step(clip_norm)
        return
    if clip_norm:
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(every, clip_norm, foreach=optimizer.defaults["foreach"])
    optimizer.step()


class FlatSGD(torch.optim.SGD):
    """PyTorch's, whose `clip_and_step` treats all gradients as one vector: the same bits in less than half the time.

    The step of a small network is calls for the most part, and PyTorch makes several for every tensor. Parameters are of one
    group, dtype and device.
    """

    _moved: tuple[nn.Parameter, ...] = ()  # those whose momentum lies end to end
    _momentum: Tensor
    _parts: tuple[Tensor, ...]  # of it, in the shapes of the parameters

    @torch.no_grad()
    def clip_and_step(self, clip_norm: float) -> None:
        """What `torch.nn.utils.clip_grad_norm_` and `step` do together, but that `grad` is left unclipped.

        Args:
            clip_norm: 0 = off.
        """
        (group,) = self.param_groups
        moved = tuple(parameter for parameter in group["params"] if parameter.grad is not None)
        if not moved:
            return
        gradients = [parameter.grad for parameter in moved]
        step = _flatten_dense_tensors(gradients)
        if clip_norm:  # the norm of the tensors' norms: over the one vector it would be summed, and rounded, in another order
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            step *= (clip_norm / (norm + 1e-6)).clamp_(max=1.0)
        if group["weight_decay"]:
            step.add_(_flatten_dense_tensors(moved), alpha=group["weight_decay"])
        if group["momentum"]:
            self._lay_out(moved)
            self._momentum.mul_(group["momentum"]).add_(step)
            steps = self._parts
        else:
            steps = _unflatten_dense_tensors(step, moved)
        torch._foreach_add_(moved, steps, alpha=-group["lr"])

    def _lay_out(self, moved: tuple[nn.Parameter, ...]) -> None:
        """Have the momentum of these lie end to end; that of others stays where it is."""
        if len(moved) == len(self._moved) and all(one is other for one, other in zip(moved, self._moved, strict=True)):
            return
        found = [self.state[one].get("momentum_buffer") for one in moved]
        own = [torch.zeros_like(one) if buffer is None else buffer for one, buffer in zip(moved, found, strict=True)]
        self._momentum = _flatten_dense_tensors(own)
        self._parts = tuple(_unflatten_dense_tensors(self._momentum, moved))
        self._moved = moved
        for parameter, part in zip(moved, self._parts, strict=True):
            self.state[parameter]["momentum_buffer"] = part

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies, and those that load a checkpoint, lay their momentum out anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._moved = ()


def learning_rate(recipe: Recipe, done: int, total: int) -> float:
    """The learning rate of step `done` of `total`: linear warm-up, then constant or half a cosine (Loshchilov & Hutter, 2017).

    >>> learning_rate(Recipe(lr=0.1, schedule="cosine"), 50, 100)
    0.05
    """
    if done < recipe.warmup_steps:
        return recipe.lr * (done + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (done - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    return recipe.lr * (1 + math.cos(math.pi * progress)) / 2
