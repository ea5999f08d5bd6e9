"""What experts changed, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.sources import TensorSource

Progress = Callable[[str], None]


def silent(name: str) -> None:
    """Tells nobody that a step is done."""


@dataclass(frozen=True, eq=False)
class Deltas:
    """Task vectors whose matrices are read one at a time.

    Attributes:
        base: Before fine-tuning.
        experts: After it, with the names and shapes of the base.
        labels: What people call the experts.
        is_shared: Which tensors all experts have in common; private heads cannot be compared.
    """

    base: TensorSource
    experts: Sequence[TensorSource]
    labels: tuple[str, ...]
    is_shared: Callable[[str], bool] = lambda name: True

    def matrices(self, part: str = "") -> list[str]:
        """Names of the floating-point matrices that contain `part`, in the order of the base.

        Raises:
            InputError: For fewer than two experts, or if no matrix is left.
        """
        if len(self.experts) < 2:
            raise InputError(f"expected two experts or more, got {len(self.experts)}; add another")
        every = [name for name in self.base.names() if self._is_matrix(name)]
        chosen = [name for name in every if part in name]
        if not every:
            raise InputError(f"expected matrices in {self.base.label}, got no tensor with two dimensions: nothing to analyse")
        if not chosen:
            some = ", ".join(every[:3]) + (" ..." if len(every) > 3 else "")
            raise InputError(f"expected --layers as a part of the name of a matrix, got {part!r}; there are {some}")
        return chosen

    def read(self, name: str) -> list[Tensor]:
        """(m, n) float64, what each expert changed in a matrix.

        Raises:
            InputError: If a value is NaN or infinite, or a shape is not the base's.
        """
        base = _finite(self.base, name)
        found = []
        for expert in self.experts:
            tensor = _finite(expert, name)
            if tensor.shape != base.shape:
                raise InputError(f"{expert.label}: expected {tuple(base.shape)} for {name!r}, got {tuple(tensor.shape)}")
            found.append(tensor - base)
        return found

    def tolerance(self, name: str) -> float:
        """Singular values at or below this part of the largest are rounding of what is stored."""
        return 1e-12 if self.base.dtype(name) == torch.float64 else 1e-6

    def refuse_unchanged(self, changed: Sequence[bool]) -> None:
        """Raise InputError for the first expert that equals the base in everything that was looked at."""
        for label, is_changed in zip(self.labels, changed, strict=True):
            if not is_changed:
                raise InputError(
                    f"{label}: expected an expert that differs from the base in the chosen matrices, got the same weights; "
                    "leave it out or choose other --layers"
                )

    def _is_matrix(self, name: str) -> bool:
        shape = self.base.shape(name)
        return len(shape) == 2 and 0 not in shape and self.base.dtype(name).is_floating_point and self.is_shared(name)


def _finite(source: TensorSource, name: str) -> Tensor:
    tensor = source.read(name).detach().cpu().double()
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{source.label}: expected finite values in {name!r}, got NaN or infinity")
    return tensor


def labels_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """What to call checkpoints: their names, the folders they lie in where those are the same, or else the whole paths.

    >>> labels_of([Path("runs/clipart/model.safetensors"), Path("runs/sketch/model.safetensors")])
    ('clipart', 'sketch')
    """
    for labels in ([path.stem.partition(".")[0] for path in paths], [path.parent.name for path in paths]):
        if len(set(labels)) == len(labels) and all(labels):
            return tuple(labels)
    return tuple(map(str, paths))
