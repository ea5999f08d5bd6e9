"""Heads of several tasks as two tensors, for losses that nobody but the training loop differentiates.

Autograd and an optimizer spend microseconds on every tensor that they train, and a batch that replays eight tasks trains those
of eight heads. Side by side in one weight and one bias they cost what one head costs; the numbers stay the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from shiftproof.benchmark import Model
from shiftproof.benchmark.models import by_task

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def fuses_heads(loss: Loss) -> Loss:
    """Mark a strategy's `loss` that calls `logits` at most once and leaves gradients to the training loop.

    In a step whose batch mixes tasks, the parameters of heads then get no `grad` of their own. The mark holds for the class
    that defines `loss`, and for none derived from it, which may look at gradients.
    """
    setattr(loss, "fuses_heads", True)  # noqa: B010
    return loss


def may_fuse(kind: type[Any]) -> bool:
    """Whether a class itself defines a loss that is marked."""
    return getattr(vars(kind).get("loss"), "fuses_heads", False)


class FusedHeads:
    """Heads whose parameters are parts of one weight and one bias, in the same memory: a step of one is a step of the other.

    Attributes:
        tasks: Of the heads, in ascending order.
        weight: (H * C, D) leaf of autograd's.
        bias: (H * C,) likewise.
    """

    def __init__(self, model: Model, tasks: list[int]) -> None:
        heads = [model.head(task) for task in tasks]
        self.tasks = tasks
        self._weights = [cast(nn.Parameter, head.weight) for head in heads]
        self._biases = [head.bias for head in heads]
        self.weight = torch.cat([one.detach() for one in self._weights]).requires_grad_()
        self.bias = torch.cat([one.detach() for one in self._biases]).requires_grad_()
        self._norms = self.bias.detach().new_empty(len(heads), 2)
        self._places = _place(self._weights, self.weight.detach()) + _place(self._biases, self.bias.detach())

    @staticmethod
    def suits(model: Model, tasks: list[int]) -> bool:
        """Whether these heads are trained, as wide as each other, and not one head under two names."""
        heads = [model.head(task) for task in tasks]
        parameters = {parameter for head in heads for parameter in (head.weight, head.bias)}
        is_trained = all(parameter is not None and parameter.requires_grad for parameter in parameters)
        return is_trained and len(parameters) == 2 * len(heads) and len({head.out_features for head in heads}) == 1

    def __call__(self, features: Tensor, task: Tensor) -> Tensor:
        """(B, C) logits of (B, D) features by the head of each sample's task, (B,) int64, among which are all of `tasks`."""
        return by_task(nn.functional.linear(features, self.weight, self.bias), task, self.tasks)

    @property
    def is_intact(self) -> bool:
        """Whether every parameter still lies where it was put."""
        return self._places == [one.data_ptr() for one in (*self._weights, *self._biases)]

    def leaves(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Weight and bias with the parameters that are their parts, in order."""
        return [(self.weight, self._weights), (self.bias, self._biases)]

    def gradient_norms(self) -> Tensor:
        """(2 H,) of every head's weight and bias in turn."""
        for leaf, norms in zip((self.weight, self.bias), self._norms.T, strict=True):
            assert leaf.grad is not None
            torch.linalg.vector_norm(leaf.grad.view(len(norms), -1), dim=1, out=norms)
        return self._norms.view(-1)

    def drop_gradients(self) -> None:
        """Before the backward pass."""
        self.weight.grad = self.bias.grad = None

    def separate(self) -> None:
        """Give every head memory of its own again."""
        for parameter in (*self._weights, *self._biases):
            parameter.data = parameter.data.clone()


def _place(parameters: list[nn.Parameter], whole: Tensor) -> list[int]:
    """Have parameters be the parts of a tensor, and say where they lie."""
    for parameter, part in zip(parameters, whole.split(len(parameters[0])), strict=True):
        parameter.data = part
    return [parameter.data_ptr() for parameter in parameters]
