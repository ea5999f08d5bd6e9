"""A found alignment of two models, kept in a file so that it serves any number of fine-tunings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


def transported(alignment: Alignment, source: StateDict, tuned: StateDict, target: StateDict, alpha: float = 1.0) -> StateDict:
    """theta_B + alpha * pi(theta_A_ft - theta_A) (thesis eq. 8.8).

    Tensors that the source lacks or has in another shape, a new head say, come over permuted as they are. Running statistics
    and integers stay the target's: they are no parameters.

    Args:
        source: theta_A.
        tuned: theta_A after fine-tuning.
        target: theta_B.

    Returns:
        Tensors under the names of `tuned`, in the target's dtypes; the inputs are not altered.
    """
    return {name: _carry(alignment, name, source.get(name), tensor, target.get(name), alpha) for name, tensor in tuned.items()}


def _carry(
    alignment: Alignment, name: str, source: Tensor | None, tuned: Tensor, target: Tensor | None, alpha: float
) -> Tensor:
    if source is None or target is None or source.shape != tuned.shape:
        return alignment.specification.apply_to(name, tuned, alignment.permutations)
    if not tuned.is_floating_point() or name.endswith(STATISTICS):
        return target
    wide = tuned.double() if tuned.dtype.itemsize == 8 else tuned.float()
    delta = wide - source.to(wide.dtype)
    moved = alignment.specification.apply_to(name, delta, alignment.permutations)
    return (target.to(wide.dtype) + alpha * moved).to(target.dtype)


def changed(source: StateDict, tuned: StateDict) -> Sequence[str]:
    """Names of the tensors that fine-tuning has changed."""
    return [name for name, tensor in tuned.items() if name not in source or not tensor.equal(source[name])]
