"""Puts a specification together, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from shiftproof.benchmark.transporting.specification import Axis, PermutationSpec, Run, Shapes, specify

FIXED = ""  # stands for an axis that stays as it is


class Draft:
    """A specification on its way. Permutations are named by strings, `FIXED` = none.

    Layers and vectors are looked up in the shapes; parts that are not there (a bias, say) are passed over.

    Args:
        shapes: Of all tensors.
        prefix: What all names begin with.
    """

    def __init__(self, shapes: Shapes, prefix: str = "") -> None:
        self.shapes = shapes
        self.prefix = prefix
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.heads: dict[str, int] = {}
        self.chains: list[tuple[str, ...]] = []
        self.output = FIXED

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name below the prefix."""
        return self.prefix + name in self.shapes

    def shape(self, name: str) -> Sequence[int]:
        """Shape of a tensor below the prefix."""
        return self.shapes[self.prefix + name]

    def numbered(self, name: str) -> list[str]:
        """Prefixes "name.0.", "name.1." and so on, as long as there are tensors below them."""
        start = f"{self.prefix}{name}."
        count = len({rest.split(".")[0] for rest in (one[len(start) :] for one in self.shapes if one.startswith(start))})
        return [f"{name}.{place}." for place in range(count)]

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

    def norm(self, name: str, units: str) -> None:
        """A normalization with its running statistics, if it has some."""
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.tensor(f"{name}.{part}", units)
        self.tensor(f"{name}.num_batches_tracked")

    def finish(self) -> PermutationSpec:
        """The specification. Tensors that nobody named are an error, see `specify`."""
        return specify(self.axes, self.shapes, self.heads, self.chains, self.output)


def _axis(axis: str | Axis) -> Axis:
    if isinstance(axis, str):
        return (Run(axis),) if axis else ()
    return axis
