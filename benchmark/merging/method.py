"""What a merge method is: pure functions over one named tensor at a time, the same in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

Path = Literal["spectral", "elementwise", "average"]
"""How a method treats a tensor: by its singular vectors, element by element, or as the plain mean of the experts."""


@runtime_checkable
class MergeMethod(Protocol):
    """A merge, one named tensor at a time. No call may depend on which tensors came before it.

    Methods with statistics over all tensors look at them in `rounds` passes before the first is merged: `scan` a tensor, then
    `combine` what the scans of one pass found into the facts that the next pass and `merge` are given.

    Attributes:
        rounds: Passes over all tensors before the merge, as a rule; 0 where every tensor stands alone.
    """

    rounds: int

    def path(self, name: str, shape: Sequence[int]) -> Path:
        """How a tensor of that name and shape is merged."""
        ...

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        """Why so many checkpoints cannot be merged in tensors of these names, and what to do; empty if they can."""
        ...

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Any:
        """What one tensor contributes to the statistics of this pass.

        Args:
            base: (...) float32 or float64, before fine-tuning.
            experts: D tensors of its shape and dtype, after it.
            facts: What `combine` made of the pass before; None in the first.
        """
        ...

    def combine(self, partials: Mapping[str, Any], facts: Any) -> Any:
        """The facts out of what `scan` found, by name of the tensor, and out of the facts of the pass before.

        The order of `partials` is that of the sorted names, whoever scanned first.
        """
        ...

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """(...) the merged tensor, base included, in the dtype of its arguments, which stay as they are."""
        ...
