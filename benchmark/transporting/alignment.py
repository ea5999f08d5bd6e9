"""A found alignment of two models, kept in a file so that it serves any number of fine-tunings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.specification import PermutationSpec

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what names of running statistics end on


@dataclass(frozen=True, eq=False)
class Search:
    """What the search for an alignment took.

    Attributes:
        objective: Inner product of the aligned models over the tensors that were matched, before and after each sweep.
        converged: The last sweep improved nothing.
        visits: Assignment problems that were solved; a permutation whose neighbours have not changed is passed over.
        seconds: By what was done: "singular values", "products", "assignments".
    """

    objective: tuple[float, ...] = ()
    converged: bool = True
    visits: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def sweeps(self) -> int:
        """How often all permutations were gone through."""
        return max(0, len(self.objective) - 1)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Permutations that bring the units of one model to where those of another are.

    Attributes:
        specification: What the permutations act on.
        permutations: Unit i of the aligned model is unit p[i] of the source.
    """

    specification: PermutationSpec
    permutations: Mapping[str, Tensor]
    search: Search = Search()

    def apply(self, state: StateDict) -> StateDict:
        """pi(state), for the source or for a task vector of it."""
        return self.specification.apply(state, self.permutations)


def task_vector(source: StateDict, tuned: StateDict) -> StateDict:
    """tau = theta_A_ft - theta_A (thesis eq. 8.7), in single precision or in double where the weights are.

    Only of parameters that both have in one shape: running statistics, counters and new heads have none.
    """
    return {
        name: _wide(tensor) - _wide(source[name])
        for name, tensor in tuned.items()
        if name in source
        and source[name].shape == tensor.shape
        and tensor.is_floating_point()
        and not name.endswith(STATISTICS)
    }


def added(target: StateDict, vector: StateDict, alpha: float = 1.0) -> StateDict:
    """theta_B + alpha * vector, in the target's dtypes; tensors without a part in the vector are the same objects."""
    return {
        name: (_wide(tensor) + alpha * vector[name]).to(tensor.dtype) if name in vector else tensor
        for name, tensor in target.items()
    }


def inner_product(one: Tensor, other: Tensor) -> float:
    """Of two tensors of one shape, summed in double precision without a copy in it."""
    return float((_wide(one) * _wide(other)).sum(dtype=torch.float64))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
