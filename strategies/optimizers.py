"""The recipe's optimizer, its learning rate, and the step with clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from shiftproof.benchmark import Recipe
from shiftproof.strategies.fused_heads import FusedHeads


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


def clip_and_step(optimizer: torch.optim.Optimizer, clip_norm: float, fused: FusedHeads | None = None) -> None:
    """Step along gradients scaled down to a joint norm of at most `clip_norm`, unless that is 0.

    Args:
        fused: Heads among the parameters that may have their gradients in one; for `FlatSGD` alone.
    """
    if isinstance(optimizer, FlatSGD):
        optimizer.clip_and_step(clip_norm, fused)
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

    _moved: tuple[Tensor, ...] = ()  # those whose momentum lies end to end
    _momentum: Tensor
    _parts: tuple[Tensor, ...]  # of it, in the shapes of what is moved

    @torch.no_grad()
    def clip_and_step(self, clip_norm: float, fused: FusedHeads | None = None) -> None:
        """What `torch.nn.utils.clip_grad_norm_` and `step` do together, but that `grad` is left unclipped.

        Args:
            clip_norm: 0 = off.
            fused: Heads among the parameters. Where it has gradients, its tensors are moved, and so are the parameters in them.

        Raises:
            RuntimeError: If a parameter has a gradient of its own and one in a fused tensor.
        """
        (group,) = self.param_groups
        own = [parameter for parameter in group["params"] if parameter.grad is not None]
        leaves = fused.leaves() if fused is not None and fused.weight.grad is not None else []
        if any(parameter.grad is not None for _, parameters in leaves for parameter in parameters):
            raise RuntimeError(
                "expected a loss that fuses heads to call logits once, got gradients of single heads beside theirs"
            )
        moved = (*own, *(leaf for leaf, _ in leaves))
        if not moved:
            return
        gradients = [one.grad for one in moved]
        step = _flatten_dense_tensors(gradients)
        if clip_norm:
            # The norm of the parameters' norms: over the one vector it would be summed, and rounded, in another order.
            norms = [torch.stack(torch._foreach_norm(gradients[: len(own)]))] if own else []
            if fused is not None and leaves:
                norms.append(fused.gradient_norms())
            norm = torch.linalg.vector_norm(torch.cat(norms))
            step *= (clip_norm / (norm + 1e-6)).clamp_(max=1.0)
        if group["weight_decay"]:
            step.add_(_flatten_dense_tensors(moved), alpha=group["weight_decay"])
        if group["momentum"]:
            if len(moved) != len(self._moved) or any(one is not other for one, other in zip(moved, self._moved, strict=True)):
                self._lay_out(moved, [*own, *(parameter for _, parameters in leaves for parameter in parameters)])
            self._momentum.mul_(group["momentum"]).add_(step)
            steps = self._parts
        else:
            steps = _unflatten_dense_tensors(step, moved)
        torch._foreach_add_(moved, steps, alpha=-group["lr"])

    def _lay_out(self, moved: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> None:
        """Have the momentum of these parameters, which make up `moved`, lie end to end; that of others stays where it is."""
        found = [self.state[one].get("momentum_buffer") for one in parameters]
        own = [torch.zeros_like(one) if buffer is None else buffer for one, buffer in zip(parameters, found, strict=True)]
        self._momentum = _flatten_dense_tensors(own)
        self._parts = tuple(_unflatten_dense_tensors(self._momentum, moved))
        self._moved = moved
        for parameter, part in zip(parameters, _unflatten_dense_tensors(self._momentum, parameters), strict=True):
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
