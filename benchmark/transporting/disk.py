"""A transport from disk to disk: two releases and a fine-tuning of the old one become one checkpoint of the new."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.merging.checkpoints import Checkpoint
from shiftproof.benchmark.merging.safetensors_files import Entry
from shiftproof.benchmark.merging.sources import is_finite
from shiftproof.benchmark.merging.writing import Output
from shiftproof.benchmark.transporting.alignment import STATISTICS, Alignment, added, task_vector
from shiftproof.benchmark.transporting.specification import PermutationSpec, Shapes

Fate = Literal["transported", "unchanged", "carried over", "left"]
NAMED = 3  # tensors that an error names at most


@dataclass(frozen=True)
class Releases:
    """Checkpoints that were found to belong together.

    Attributes:
        source, tuned, target: theta_A, theta_A after fine-tuning, theta_B.
        specification: Of the tuned model.
    """

    source: Checkpoint
    tuned: Checkpoint
    target: Checkpoint
    specification: PermutationSpec

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Tensors that all three have in one shape."""
        return tuple(name for name in self.target.names() if _same(self.source, self.tuned, name))

    @cached_property
    def own(self) -> tuple[str, ...]:
        """Tensors that the tuned model has alone, or in a shape of its own: a new head."""
        return tuple(name for name in self.tuned.names() if not _same(self.source, self.tuned, name))

    def layout(self) -> Checkpoint:
        """The target with the tuned model's own tensors in place of its own: names, shapes and dtypes of the output."""
        gone = {name for name in self.target.names() if name not in self.shared}
        entries: dict[str, Entry] = {name: entry for name, entry in self.target.entries.items() if name not in gone}
        loaded = {name: tensor for name, tensor in self.target.loaded.items() if name not in gone}
        loaded |= {name: self.tuned.read(name) for name in self.own}
        homes = {**self.target.homes, **dict.fromkeys(self.own, self.target.located.files[-1])}
        return replace(self.target, entries=entries, loaded=loaded, homes=homes)


def releases(
    source: Checkpoint, tuned: Checkpoint, target: Checkpoint, derived: Callable[[Shapes], PermutationSpec]
) -> Releases:
    """Check that three checkpoints belong together.

    Args:
        derived: Makes the specification of the tuned model from its shapes.

    Raises:
        InputError: If the architectures differ or are not known, nothing was tuned, or a tensor is not finite.
    """
    before, after, new = (shapes_of(one) for one in (source, tuned, target))
    if odd := [_told(name, before, new) for name in {**before, **new} if before.get(name) != new.get(name)]:
        raise InputError(f"{target.label}: expected one architecture with {source.label}, got {_some(odd)}")
    if missing := [repr(name) for name in before if name not in after]:
        raise InputError(f"{tuned.label}: expected every tensor of {source.label}, got none named {_some(missing)}")
    found = Releases(source, tuned, target, derived(after))
    _check_architecture(found, before, after)
    for checkpoint in (source, tuned, target):
        _check_untied(checkpoint)
        _check_finite(checkpoint)
    if not found.own and all(_equal(source.read(name), tuned.read(name)) for name in found.shared):
        raise InputError(
            f"{tuned.label}: expected a fine-tuned model, got the weights of {source.label}; nothing to carry over"
        )
    return found


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor."""
    return {name: checkpoint.shape(name) for name in checkpoint.names()}


def states(found: Releases) -> tuple[StateDict, StateDict]:
    """What is aligned: the tensors of both releases that fine-tuning has left in their shape."""
    source, target = ({name: one.read(name) for name in found.shared} for one in (found.source, found.target))
    return source, target


def write(
    found: Releases, alignment: Alignment, alpha: float, output: Output, progress: Callable[[str], None] = lambda name: None
) -> dict[str, Fate]:
    """Write theta_B + alpha * pi(tau), tensor by tensor; the tuned model's own tensors come over permuted.

    Returns:
        What became of each tensor.

    Raises:
        InputError: If a tensor does not stay finite.
    """
    fates: dict[str, Fate] = {}
    for name in [*found.shared, *found.own]:
        fates[name], tensor = _carried(found, alignment, alpha, name)
        output.write(name, tensor)
        progress(name)
    return fates


def _carried(found: Releases, alignment: Alignment, alpha: float, name: str) -> tuple[Fate, Tensor]:
    """What becomes of a tensor, and what it is then."""
    tuned = found.tuned.read(name)
    if name in found.own:
        return "carried over", found.specification.apply_to(name, tuned, alignment.permutations)
    target = found.target.read(name)
    if not tuned.is_floating_point() or name.endswith(STATISTICS):
        return "left", target
    source = found.source.read(name)
    if _equal(source, tuned):
        return "unchanged", target
    vector = found.specification.apply(task_vector({name: source}, {name: tuned}), alignment.permutations)
    moved = added({name: target}, vector, alpha)[name]
    if not is_finite(moved):
        raise InputError(
            f"expected finite numbers for {name!r}, got NaN or infinity with --alpha {alpha:g}; take a smaller --alpha"
        )
    return "transported", moved


def _check_architecture(found: Releases, before: Shapes, after: Shapes) -> None:
    """A head of another size is a fine-tuning's; other units or blocks are another network's."""
    specification = found.specification
    wider = [
        name
        for name in found.own
        for axis, runs in enumerate(specification.axes[name])
        if name in before and runs and (len(before[name]) <= axis or before[name][axis] != after[name][axis])
    ]
    inside = specification.restricted(frozenset(found.shared)).sizes
    deeper = [name for chain in specification.chains for name in chain if name not in inside]
    if odd := wider or deeper:
        label = found.tuned.label
        raise InputError(f"{label}: expected the architecture of {found.source.label}, got another in {_some(odd)}")


def _check_untied(checkpoint: Checkpoint) -> None:
    """Two names for one tensor would need one permutation for what a specification takes for two."""
    places: dict[object, str] = {}
    for name in checkpoint.names():
        if not math.prod(checkpoint.shape(name)):
            continue
        entry = checkpoint.entries.get(name)
        place = checkpoint.loaded[name].data_ptr() if entry is None else (checkpoint.homes[name], entry.offset)
        if (other := places.setdefault(place, name)) != name:
            both = f"{other!r} and {name!r}"
            raise InputError(f"{checkpoint.label}: expected a tensor of its own for every name, got tied {both}; remove one")


def _check_finite(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{checkpoint.label}: expected finite numbers, got NaN or infinity in {name!r}")


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    return all(name in held.entries or name in held.loaded for held in (one, other)) and one.shape(name) == other.shape(name)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _told(name: str, before: Shapes, after: Shapes) -> str:
    if name not in before or name not in after:
        return f"{name!r} in one of them only"
    return f"{name!r} {tuple(after[name])} for {tuple(before[name])}"


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more
