"""Puts a specification together, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Self

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.specification import Axis, PermutationSpec, Run, Shapes, specify

FIXED = ""  # stands for an axis that stays as it is

HeadCount = Callable[[str], int]
"""Attention heads of the block whose tensors begin with a name; 0 where nobody knows."""


class Draft:
    """A specification on its way. Permutations are named by strings, `FIXED` = none.

    Layers and vectors are looked up in the shapes; parts that are not there (a bias, say) are passed over.

    Args:
        shapes: Of all tensors.
        heads: Of a block, by the whole beginning of its names.
        prefix: What names begin with, those of tensors and those that `unit` gives.

    Attributes:
        output: The permutation of what the part below the prefix returns.
    """

    def __init__(self, shapes: Shapes, heads: HeadCount = lambda _: 0, prefix: str = "") -> None:
        self.shapes = shapes
        self.count_heads = heads
        self.prefix = prefix
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.heads: dict[str, int] = {}
        self.chains: list[tuple[str, ...]] = []
        self.output = FIXED

    def at(self, prefix: str) -> Self:
        """The same specification with another prefix, and an output of its own."""
        other = type(self)(self.shapes, self.count_heads, prefix)
        other.axes, other.heads, other.chains = self.axes, self.heads, self.chains
        return other

    def unit(self, name: str) -> str:
        """A permutation's name that no other part of the network has."""
        return self.prefix + name

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name below the prefix."""
        return self.prefix + name in self.shapes

    def shape(self, name: str) -> Sequence[int]:
        """Shape of a tensor below the prefix.

        Raises:
            InputError: If it is not there.
        """
        if not self.has(name):
            raise InputError(f"expected a tensor {self.prefix + name!r} beside its neighbours, got none; give a specification")
        return self.shapes[self.prefix + name]

    def numbered(self, start: str) -> list[str]:
        """Prefixes "start0.", "start1." and so on, as long as there are tensors below them."""
        pattern = re.compile(re.escape(self.prefix + start) + r"(\d+)\.")
        there = {int(found[1]) for name in self.shapes if (found := pattern.match(name))}
        count = next(number for number in range(len(there) + 1) if number not in there)
        return [f"{start}{number}." for number in range(count)]

    def tensor(self, name: str, *axes: str | Axis) -> None:
        """A tensor with an axis for each of its first dimensions; the others stay as they are."""
        if not self.has(name):
            return
        whole = [_axis(axis) for axis in axes]
        rest: list[Axis] = [()] * (len(self.shape(name)) - len(whole))
        self.axes[self.prefix + name] = (*whole, *rest)

    def layer(self, name: str, rows: str | Axis, columns: str | Axis) -> None:
        """Weight (rows, columns, ...) and bias (rows) of a linear map or a convolution."""
        self.tensor(f"{name}.weight", rows, columns)
        self.tensor(f"{name}.bias", rows)

    def norm(self, name: str, units: str | Axis) -> None:
        """A normalization with its running statistics, if it has some."""
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.tensor(f"{name}.{part}", units)
        self.tensor(f"{name}.num_batches_tracked")

    def flattened(self, units: str, length: int) -> Axis:
        """An axis that holds a whole map for each unit, as behind `nn.Flatten`; one element where there is no map.

        Args:
            length: Of the axis. Where the units do not divide it, `finish` says so.
        """
        return (Run(units, max(1, length // self._size(units))),) if units else ()

    def _size(self, units: str) -> int:
        for name, axes in self.axes.items():
            for dimension, axis in enumerate(axes):
                if axis == (Run(units),):
                    return self.shapes[name][dimension]
        raise AssertionError(f"{units} is read before anything writes it")

    def finish(self) -> PermutationSpec:
        """The specification. Tensors that nobody named are an error, see `specify`."""
        return specify(self.axes, self.shapes, self.heads, self.chains, self.output)


def _axis(axis: str | Axis) -> Axis:
    if isinstance(axis, str):
        return (Run(axis),) if axis else ()
    return axis
