"""Which attention head of one model is which of the other: thesis section 8.2.1, algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.specification import Slot
from shiftproof.strategies.transport.assignment import assign, picked, units


def spectral_distance(source: StateDict, target: StateDict, projections: Sequence[Slot], heads: int) -> Tensor:
    """(H, H) float64, D of eq. 8.1: how far the singular values of head i of the target are from those of head j of the source.

    Args:
        projections: Queries, keys and values, each with its heads along the slot's axis; the distances are summed over them.
    """
    total = torch.zeros(heads, heads, dtype=torch.float64)
    for slot in projections:
        ours, theirs = (_singular_values(state[slot.tensor], slot, heads) for state in (target, source))
        total += torch.linalg.vector_norm(ours[:, None] - theirs, dim=2).cpu()
    return total


def best_heads(similarity: Tensor, heads: int) -> Tensor:
    """(n,) int64, units after a search over all pairs of heads by their best inner product: the thesis's "brute force".

    Args:
        similarity: (n, n), of all units of the target with all of the source.
    """
    size = len(similarity) // heads
    blocks = similarity.reshape(heads, size, heads, size).transpose(1, 2)  # (H, H, d_k, d_k)
    within = [[assign(block) for block in row] for row in blocks]
    scores = [[float(picked(blocks[i, j], within[i][j]).sum()) for j in range(heads)] for i in range(heads)]
    order = assign(torch.tensor(scores, dtype=torch.float64))
    return compose(order, torch.stack([within[head][int(order[head])] for head in range(heads)]))


def compose(order: Tensor, within: Tensor) -> Tensor:
    """(n,) int64: heads in an order, and units within each head (eq. 8.18).

    Args:
        order: (H,) int64, head h comes from head order[h].
        within: (H, n / H) int64, unit i of head h comes from unit within[h, i] of that head.

    >>> compose(torch.tensor([1, 0]), torch.tensor([[0, 1], [1, 0]]))
    tensor([2, 3, 1, 0])
    """
    return (order[:, None] * within.shape[1] + within).reshape(-1)


def _singular_values(tensor: Tensor, slot: Slot, heads: int) -> Tensor:
    """(H, min) float64, descending, of the (n / H, rest) matrix of each head."""
    matrices = units(tensor, slot).double().reshape(heads, slot.size // heads, -1)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    # Squares in double precision keep 8 digits, more than single-precision weights have.
    squares: Tensor = torch.linalg.eigvalsh(matrices @ matrices.mT)
    return squares.clamp_(min=0).sqrt_().flip(1)
