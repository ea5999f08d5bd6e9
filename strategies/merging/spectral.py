"""Merges that treat matrices by their singular vectors and take the mean of everything else."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from torch import Tensor

from shiftproof.benchmark.merging.driver import mean
from shiftproof.strategies.merging.strategy import MergeConfig, MergeStrategy


@dataclass(frozen=True)
class SpectralConfig(MergeConfig):
    """What every spectral merge can be told."""

    scale: Annotated[float, Ge(0)] = 1.0  # lambda, of the whole merged delta
    exclude: tuple[str, ...] = ("text_projection",)  # a name that contains one of these is averaged, as in the released code
    conv: Literal["average", "matrix"] = "average"  # kernels of any rank: averaged (released), or merged as (out, rest)


C = TypeVar("C", bound=SpectralConfig)


class SpectralMerge(MergeStrategy[C]):
    """Matrices through `merge_matrices`, all other tensors as the mean of the experts.

    Matrices are summed where the rest is averaged; that is how the papers have it.
    """

    streams = True
    shares_rank = False  # each expert keeps 1/D of the singular vectors

    @abstractmethod
    def merge_matrices(self, deltas: Sequence[Tensor]) -> Tensor:
        """(m, n) the merged delta, without lambda.

        Args:
            deltas: D contiguous matrices of (m, n), float32 or float64.
        """

    def path(self, name: str, shape: Sequence[int]) -> Literal["spectral", "elementwise", "average"]:
        """Spectral for matrices, and for kernels if so told, whose name is not excluded."""
        is_matrix = len(shape) == 2 or (len(shape) > 2 and self.config.conv == "matrix")
        is_excluded = any(part in name for part in self.config.exclude)
        return "spectral" if is_matrix and not is_excluded and 0 not in shape else "average"

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        """Where 1/D of the rank is less than one singular vector."""
        spectral = [name for name, shape in shapes.items() if self.shares_rank and self.path(name, shape) == "spectral"]
        ranks = {name: min(shapes[name][0], math.prod(shapes[name][1:])) for name in spectral}
        small = [name for name in ranks if ranks[name] < experts]
        if not small:
            return ""
        first, more = small[0], f" and {len(small) - 1} more" if len(small) > 1 else ""
        excluded = ",".join([*self.config.exclude, *small])
        return (
            f"expected at most {ranks[first]} experts for {first!r} of shape {tuple(shapes[first])}{more}, got {experts}: "
            f"there is less than one singular vector for each; leave it to the mean with --set exclude={excluded}"
        )

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """(...) base plus lambda times the merged delta."""
        deltas = [expert - base for expert in experts]
        if self.path(name, base.shape) == "average":
            return base + self.config.scale * mean(deltas)
        merged = self.merge_matrices([delta.reshape(len(delta), -1) for delta in deltas])
        del deltas  # the largest tensors of a checkpoint decide what a merge takes
        return (self.config.scale * merged.reshape(base.shape)).add_(base)
