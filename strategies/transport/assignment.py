"""Linear assignment problems over units and heads."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from shiftproof.benchmark.transporting.specification import PermutationSpec, Slot


def assign(similarity: Tensor) -> Tensor:
    """(n,) int64, the column of each row in the assignment of greatest sum; ties fall as scipy's solver has them.

    Args:
        similarity: (n, n) floating, finite.
    """
    # Costs in double precision are what the solver works on: it would copy anything else, and once more to maximize.
    _, columns = linear_sum_assignment(similarity.to("cpu", torch.float64, copy=True).neg_().numpy())
    return torch.from_numpy(columns)


def picked(similarity: Tensor, columns: Tensor) -> Tensor:
    """(...) float64, what an assignment picks out of each row of (..., n) similarities."""
    return similarity.gather(-1, columns[..., None].to(similarity.device)).squeeze(-1).double()


def units(tensor: Tensor, slot: Slot) -> Tensor:
    """(n, rest) the elements that belong to each unit of a slot, in double precision where the tensor is, else in single."""
    stretch = tensor.narrow(slot.axis, slot.start, slot.size * slot.repeat).movedim(slot.axis, 0)
    return (stretch if stretch.dtype == torch.float64 else stretch.float()).reshape(slot.size, -1)


def moved(tensor: Tensor, slot: Slot, specification: PermutationSpec, permutations: dict[str, Tensor]) -> Tensor:
    """A tensor whose axes other than the slot's are permuted."""
    for axis, runs in enumerate(specification.axes[slot.tensor]):
        if axis != slot.axis and runs:
            tensor = tensor.index_select(axis, specification.index(runs, permutations).to(tensor.device))
    return tensor
