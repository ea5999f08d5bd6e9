"""Differences of experts from their base, a block at a time, so that no method holds a copy of a tensor for each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CACHED = 1 << 19  # entries of all experts together: 2 MB in float32 stay in the cache of one core
STEP = 1 << 12  # sides of blocks are multiples of it
ON_DEVICE = 1 << 24  # entries on an accelerator, where a kernel's launch costs more than a cache miss


def differences(base: Tensor, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Blocks of expert - base, in the order of the flattened tensor; at least one, which may be empty.

    Args:
        base: (...) float32 or float64.
        experts: D tensors of its shape and dtype.

    Yields:
        (D, B) of the same dtype. The caller may overwrite it; the next step does.
    """
    origin, others = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    entries = CACHED if base.device.type == "cpu" else ON_DEVICE
    size = min(max(STEP, entries // len(experts) // STEP * STEP), base.numel())
    block = base.new_empty(len(experts), size)
    for start in range(0, max(1, base.numel()), max(1, size)):
        part = block[:, : base.numel() - start]
        stop = start + part.shape[1]
        for row, other in zip(part, others, strict=True):
            torch.sub(other[start:stop], origin[start:stop], out=row)
        yield part


def magnitudes(base: Tensor, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Blocks of |expert - base|: (D, B), as `differences` yields them."""
    for block in differences(base, experts):
        yield block.abs_()


def add_merged(base: Tensor, experts: Sequence[Tensor], rule: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """base + scale * rule(differences).

    Args:
        rule: (D, B) differences to (B,) merged ones; called on consecutive blocks.

    Returns:
        (...) a new tensor of the base's shape and dtype.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    origin, flat = base.reshape(-1), merged.view(-1)
    start = 0
    for block in differences(base, experts):
        stop = start + block.shape[1]
        torch.add(origin[start:stop], rule(block), alpha=scale, out=flat[start:stop])
        start = stop
    return merged
