"""Which axis of which parameter carries which permutation: the units of a network that may be renumbered.

Ainsworth et al., Git Re-Basin, ICLR 2023, arXiv:2209.04836, section 3; thesis chapter 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import StateDict

Shapes = Mapping[str, Sequence[int]]
Permutations = Mapping[str, Tensor]
"""Name to (n,) int64: unit i of the permuted network is unit p[i] of the old one, w' = w[p]."""

NAMED = 3  # tensors that an error names at most


@dataclass(frozen=True)
class Run:
    """A stretch of an axis whose units carry a permutation, `repeat` consecutive elements a unit."""

    permutation: str
    repeat: int = 1

    def __str__(self) -> str:
        return self.permutation + (f" * {self.repeat}" if self.repeat > 1 else "")


Axis = tuple[Run, ...]
"""Runs one after another; () = the axis stays as it is."""


@dataclass(frozen=True)
class Slot:
    """A run in its place.

    Attributes:
        start: Of the run along the axis, in elements.
        size: Units of the permutation.
    """

    tensor: str
    axis: int
    start: int
    repeat: int
    size: int

    @property
    def stretch(self) -> slice:
        """The elements of the axis that it covers."""
        return slice(self.start, self.start + self.size * self.repeat)


@dataclass(frozen=True)
class PermutationSpec:
    """The permutations of an architecture. Make one with `specify`, which checks it, or `architectures.derive`.

    Attributes:
        axes: Of every tensor, an `Axis` for each dimension.
        sizes: Units of each permutation, in the order of depth.
        heads: Attention heads of the permutations that must not mix them.
        chains: Permutations along each residual stream, one a segment; between neighbours the stream runs past a block,
            and where their permutations differ the network needs a residual map there (thesis eq. 8.6).
        output: The permutation that the network's output carries; "" where outputs stay as they are.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    sizes: Mapping[str, int]
    heads: Mapping[str, int] = field(default_factory=dict)
    chains: tuple[tuple[str, ...], ...] = ()
    output: str = ""

    @cached_property
    def slots(self) -> dict[str, tuple[Slot, ...]]:
        """Where each permutation acts."""
        found: dict[str, list[Slot]] = {name: [] for name in self.sizes}
        for tensor, axes in self.axes.items():
            for axis, runs in enumerate(axes):
                start = 0
                for run in runs:
                    slot = Slot(tensor, axis, start, run.repeat, self.sizes[run.permutation])
                    found[run.permutation].append(slot)
                    start += slot.size * run.repeat
        return {name: tuple(slots) for name, slots in found.items()}

    def identity(self) -> dict[str, Tensor]:
        """Every unit where it is."""
        return {name: torch.arange(size) for name, size in self.sizes.items()}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Permutations that leave the function as it is: heads are exchanged as a whole, units within their head."""
        return {name: _draw(size, self.heads.get(name, 1), generator) for name, size in self.sizes.items()}

    def apply(self, state: StateDict, permutations: Permutations) -> StateDict:
        """The permuted tensors; those without an axis to permute are the same objects.

        Args:
            state: Tensors of the specification, or some of them.
            permutations: Names that are missing leave their units alone.
        """
        return {name: self.apply_to(name, tensor, permutations) for name, tensor in state.items()}

    def apply_to(self, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
        """One permuted tensor."""
        for axis, runs in enumerate(self.axes[name]):
            if any(run.permutation in permutations for run in runs):
                tensor = tensor.index_select(axis, self.index(runs, permutations).to(tensor.device))
        return tensor

    def index(self, runs: Axis, permutations: Permutations) -> Tensor:
        """(n,) int64, the old position of every element along an axis."""
        parts, start = [], 0
        for run in runs:
            size = self.sizes[run.permutation]
            units = permutations.get(run.permutation)
            units = torch.arange(size) if units is None else units
            elements = units[:, None] * run.repeat + torch.arange(run.repeat)  # (units, repeat)
            parts.append(elements.reshape(-1) + start)
            start += size * run.repeat
        return torch.cat(parts)

    def shared(self) -> PermutationSpec:
        """With one permutation for each residual stream, so that the plain architecture computes the same function."""
        return self._renamed({name: chain[0] for chain in self.chains for name in chain})

    def spread(self, permutations: Permutations) -> dict[str, Tensor]:
        """Permutations of any form of this specification, such as `shared()`, under the names of all segments."""
        first = {name: chain[0] for chain in self.chains for name in chain}
        found = {name: permutations.get(name, permutations.get(first.get(name, name))) for name in self.sizes}
        return {name: torch.arange(self.sizes[name]) if units is None else units for name, units in found.items()}

    def without_streams(self) -> PermutationSpec:
        """With residual streams that stay as they are."""
        return self._renamed({name: "" for chain in self.chains for name in chain})

    def without_heads(self) -> PermutationSpec:
        """With attention as one projection, whose units may change heads: the function is not preserved."""
        return replace(self, heads={})

    def restricted(self, names: frozenset[str]) -> PermutationSpec:
        """Of some tensors only; permutations that act on none of them are left out."""
        axes = {name: axes for name, axes in self.axes.items() if name in names}
        return replace(self, axes=axes)._trimmed()

    def _renamed(self, new: Mapping[str, str]) -> PermutationSpec:
        def renamed(runs: Axis) -> Axis:
            named = (replace(run, permutation=new.get(run.permutation, run.permutation)) for run in runs)
            return tuple(run for run in named if run.permutation)

        axes = {name: tuple(map(renamed, each)) for name, each in self.axes.items()}
        output = new.get(self.output, self.output)
        return replace(self, axes=axes, chains=(), output=output)._trimmed()

    def _trimmed(self) -> PermutationSpec:
        used = {run.permutation for axes in self.axes.values() for runs in axes for run in runs}
        sizes = {name: size for name, size in self.sizes.items() if name in used}
        heads = {name: count for name, count in self.heads.items() if name in used}
        chains = tuple(tuple(name for name in chain if name in used) for chain in self.chains)
        return replace(self, sizes=sizes, heads=heads, chains=tuple(c for c in chains if len(c) > 1))


def specify(
    axes: Mapping[str, Sequence[Axis]],
    shapes: Shapes,
    heads: Mapping[str, int] | None = None,
    chains: Sequence[Sequence[str]] = (),
    output: str = "",
) -> PermutationSpec:
    """A specification that was checked against the shapes of a state dict.

    Args:
        axes: An `Axis` for each dimension of every tensor.

    Raises:
        InputError: If a tensor or a dimension is left out or invented, or sizes do not agree.
    """
    _check_names(axes, shapes)
    sizes: dict[str, int] = {}
    for name, length, runs in _lengths(axes, shapes):
        if len({run.permutation for run in runs}) == 1:
            _settle(sizes, runs[0].permutation, name, length, sum(run.repeat for run in runs))
    for name, length, runs in _lengths(axes, shapes):
        unknown = [run.permutation for run in runs if run.permutation not in sizes]
        if unknown:
            raise InputError(f"specification: expected {unknown[0]!r} alone on an axis somewhere, to tell its size")
        found = sum(sizes[run.permutation] * run.repeat for run in runs)
        if found != length:
            raise InputError(f"specification: expected runs of {length} elements on {name}, got {found}")
    for name, count in (heads or {}).items():
        check_heads(count, sizes.get(name, 0), name)
    for name in [*(heads or {}), *(name for chain in chains for name in chain), *([output] if output else [])]:
        if name not in sizes:
            raise InputError(f"specification: expected a permutation that acts on an axis, got {name!r}")
    for chain in chains:
        if len({sizes[name] for name in chain}) > 1:
            raise InputError(f"specification: expected one width along the residual stream {', '.join(chain)}")
    whole = {name: tuple(each) for name, each in axes.items()}
    return PermutationSpec(whole, sizes, dict(heads or {}), tuple(map(tuple, chains)), output)._trimmed()


def check_heads(heads: int, width: int, what: str) -> None:
    """Raise InputError unless so many heads divide a width."""
    if heads < 1 or width % heads:
        raise InputError(f"{what}: expected a number of heads that divides {width}, got {heads}; give it with --heads")


def _lengths(axes: Mapping[str, Sequence[Axis]], shapes: Shapes) -> Iterator[tuple[str, int, Axis]]:
    for name, each in axes.items():
        for dimension, runs in enumerate(each):
            if runs:
                yield f"axis {dimension} of {name!r}", shapes[name][dimension], runs


def _settle(sizes: dict[str, int], permutation: str, where: str, length: int, repeat: int) -> None:
    if length % repeat:
        raise InputError(f"specification: expected {repeat} elements a unit of {permutation!r} on {where}, got {length} in all")
    if sizes.setdefault(permutation, length // repeat) != length // repeat:
        expected, found = sizes[permutation], length // repeat
        raise InputError(f"specification: expected {expected} units of {permutation!r} on {where}, got {found}")


def _check_names(axes: Mapping[str, Sequence[Axis]], shapes: Shapes) -> None:
    missing, invented = sorted(shapes.keys() - axes.keys()), sorted(axes.keys() - shapes.keys())
    for what, names in (("to cover", missing), ("to name only tensors that are there, not", invented)):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise InputError(f"specification: expected it {what} {', '.join(names[:NAMED])}{more}")
    for name, each in axes.items():
        if len(each) != len(shapes[name]):
            raise InputError(f"specification: expected {len(shapes[name])} axes of {name!r}, got {len(each)}")


def _draw(size: int, heads: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(heads, generator=generator)
    inside = torch.stack([torch.randperm(size // heads, generator=generator) for _ in range(heads)])  # (H, n / H)
    return (order[:, None] * (size // heads) + inside).reshape(-1)
