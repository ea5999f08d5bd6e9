"""Experts with planted singular values, and the textbook's equations in NumPy, for the tests of the spectral merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def deltas(rows: int, columns: int, experts: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Random deltas with a part that all share; singular values fall like i^-0.7."""
    generator = torch.Generator().manual_seed(seed)

    def part() -> Tensor:
        rank = min(rows, columns)
        left, right = (torch.randn(side, rank, generator=generator, dtype=torch.float64) for side in (rows, columns))
        one: Tensor = torch.linalg.qr(left).Q * torch.arange(1, rank + 1) ** -0.7 @ torch.linalg.qr(right).Q.T
        return one

    shared = part()
    return [(shared + part()).to(dtype) for _ in range(experts)]


def relative(ours: Tensor, expected: Any) -> float:
    """Frobenius distance over the norm of what is expected."""
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(ours.double().numpy() - expected) / np.linalg.norm(expected))


def polar(matrix: Array) -> Array:
    """P Q^T of the thin SVD P Sigma Q^T."""
    p, _, qt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(p @ qt)


def concatenated(given: Sequence[Tensor], is_canonical: bool = True) -> tuple[Array, Array, Array]:
    """U_*, V_* and the singular values of lines 1-5 of SCORE's Algorithm 1, in float64, k = r // D."""
    count = min(given[0].shape) // len(given)
    lefts, rights, values = [], [], []
    for delta in given:
        u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        u, v = u[:, :count], vt[:count].T
        if is_canonical:
            signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(count)])
            u, v = u * signs, v * signs
        lefts.append(u)
        rights.append(v)
        values.append(s[:count])
    return np.hstack(lefts), np.hstack(rights), np.concatenate(values)
