"""How much the subspaces of experts overlap: subspace alignment ratio and principal angles.

"Bridging Domains through Subspace-Aware Model Merging", Eq. 1-2, Fig. 2, A2.4 and Fig. 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftproof.benchmark.analysis.deltas import Deltas, Progress, silent
from shiftproof.benchmark.errors import InputError

EPSILON = 0.243
"""The paper gives none; the released code keeps sqrt(energy) above 0.97, and 0.243 = sqrt(1 - 0.97^2)."""


@dataclass(frozen=True)
class SubspaceRule:
    """How many left singular vectors span the subspace of a delta, Eq. 2.

    Attributes:
        epsilon: Part of the Frobenius norm that may be left out, in (0, 1).
        one_fewer: One vector fewer than Eq. 2, as in the released code; one is kept at least.
    """

    epsilon: float = EPSILON
    one_fewer: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise InputError(f"expected an epsilon above 0 and below 1, got {self.epsilon}; the usual one is {EPSILON}")

    def rank(self, s: Tensor) -> int:
        """k of Eq. 2 for (r,) singular values in descending order, not all zero."""
        energy = s.square()
        left_out = energy.flip(0).cumsum(0).flip(0)  # of all from i on, smallest first so that little is not lost
        k = int((left_out > self.epsilon**2 * left_out[0]).sum())
        return max(1, k - int(self.one_fewer))


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """Overlap in one matrix. What an expert did not change has neither subspace nor angle: NaN, and rank 0.

    Attributes:
        ranks: k of each expert.
        sar: (D, D) float64, row i, column j: how much of delta i lies in the subspace of delta j.
        angle: (D, D) float64, mean principal angle in radians, symmetric.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    sar: Tensor
    angle: Tensor

    @property
    def chance(self) -> float:
        """SAR upon random subspaces of these ranks, as root mean square sqrt(k / m), mean over the experts: no overlap."""
        kept = [rank for rank in self.ranks if rank]
        return sum(math.sqrt(rank / self.shape[0]) for rank in kept) / len(kept)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Overlap of experts.

    Attributes:
        unchanged: Matrices that no expert changed; they are left out.
    """

    experts: tuple[str, ...]
    layers: tuple[LayerOverlap, ...]
    unchanged: tuple[str, ...]
    rule: SubspaceRule

    @property
    def sar(self) -> Tensor:
        """(D, D) mean over the layers in which both experts changed something: SAR_avg."""
        return torch.stack([layer.sar for layer in self.layers]).nanmean(0)

    @property
    def angle(self) -> Tensor:
        """(D, D) mean over the layers likewise, in radians."""
        return torch.stack([layer.angle for layer in self.layers]).nanmean(0)


def overlap(deltas: Deltas, part: str = "", rule: SubspaceRule | None = None, progress: Progress = silent) -> Overlap:
    """SAR and principal angles of every pair of experts, layer by layer.

    Args:
        part: Only matrices whose name contains it.
        rule: None = Eq. 2 with the usual epsilon.
        progress: Told the name of each matrix that is done.

    Raises:
        InputError: For fewer than two experts, no matrix of that name, or an expert that changed none of them.
    """
    rule = rule or SubspaceRule()
    layers, unchanged = [], []
    for name in deltas.matrices(part):
        layer = layer_overlap(name, deltas.read(name), rule)
        if any(layer.ranks):
            layers.append(layer)
        else:
            unchanged.append(name)
        progress(name)
    deltas.refuse_unchanged([any(layer.ranks[i] for layer in layers) for i in range(len(deltas.labels))])
    return Overlap(deltas.labels, tuple(layers), tuple(unchanged), rule)


def layer_overlap(name: str, matrices: Sequence[Tensor], rule: SubspaceRule) -> LayerOverlap:
    """Overlap of D matrices of (m, n), float32 or float64."""
    bases = [left_basis(matrix, rule) for matrix in matrices]
    count = len(matrices)
    sar_values, angles = (torch.full((count, count), torch.nan, dtype=torch.float64) for _ in range(2))
    for i in range(count):
        for j in range(count):
            if bases[i].shape[1] and bases[j].shape[1]:
                sar_values[i, j] = sar(matrices[i], bases[j])
                angles[i, j] = mean_angle(bases[i], bases[j]) if i < j else angles[j, i] if j < i else 0.0
    return LayerOverlap(name, tuple(matrices[0].shape), tuple(basis.shape[1] for basis in bases), sar_values, angles)


def left_basis(matrix: Tensor, rule: SubspaceRule) -> Tensor:
    """(m, k) the leading left singular vectors of (m, n); k = 0 for a matrix of zeros."""
    if not bool(matrix.any()):
        return matrix.new_zeros(len(matrix), 0)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis: Tensor = u[:, : rule.rank(s)]
    return basis


def sar(matrix: Tensor, basis: Tensor) -> float:
    """Eq. 1: the part of the Frobenius norm of (m, n) that lies in the span of (m, k) orthonormal columns, in [0, 1]."""
    return float(torch.linalg.norm(basis.T @ matrix) / torch.linalg.norm(matrix))


def mean_angle(first: Tensor, second: Tensor) -> float:
    """Mean principal angle between the spans of (m, k) and (m, l) orthonormal columns, in [0, pi/2].

    There are min(k, l) of them. The arc cosine of A2.4 loses half the digits of small angles; with the sine, which is that of
    Knyazev and Argentati (SIAM J. Sci. Comput. 23, 2002), none are lost.
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    cosine = torch.linalg.svdvals(first.T @ second)  # (min(k, l),) from the smallest angle on
    sine = torch.linalg.svdvals(second - first @ (first.T @ second)).flip(0)
    return float(torch.atan2(sine, cosine).mean())
