"""Energy on and off the diagonal of Sigma_score: how far a shared basis fits all experts.

"Bridging Domains through Subspace-Aware Model Merging", Algorithm 1, Eq. 3 and Fig. 3. With the signs of the
singular vectors an entry changes at most its own sign, so that energies do not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftproof.benchmark.analysis.deltas import Deltas, Progress, silent


@dataclass(frozen=True)
class LayerEnergy:
    """Squared entries of Sigma_score of one matrix.

    Attributes:
        experts: How many changed it; only they have a part in the basis.
        rank: Rows and columns of Sigma_score.
    """

    name: str
    shape: tuple[int, ...]
    experts: int
    rank: int
    diagonal: float
    off_diagonal: float

    @property
    def share(self) -> float:
        """Part of the energy that lies on the diagonal, in [0, 1]; 0 where deltas that cancel each other leave none."""
        total = self.diagonal + self.off_diagonal
        return self.diagonal / total if total else 0.0


@dataclass(frozen=True)
class Energies:
    """Energies of all layers.

    Attributes:
        unchanged: Matrices that no expert changed; they are left out.
    """

    experts: tuple[str, ...]
    layers: tuple[LayerEnergy, ...]
    unchanged: tuple[str, ...]


def energies(deltas: Deltas, part: str = "", progress: Progress = silent) -> Energies:
    """Energy on and off the diagonal of Sigma_score, layer by layer.

    Args:
        part: Only matrices whose name contains it.
        progress: Told the name of each matrix that is done.

    Raises:
        InputError: For fewer than two experts, no matrix of that name, or an expert that changed none of them.
    """
    layers, unchanged = [], []
    has_changed = [False] * len(deltas.labels)
    for name in deltas.matrices(part):
        matrices = deltas.read(name)
        active = [bool(matrix.any()) for matrix in matrices]
        has_changed = [one or other for one, other in zip(has_changed, active, strict=True)]
        if any(active):
            layers.append(layer_energy(name, sigma(matrices, deltas.tolerance(name)), matrices[0].shape, sum(active)))
        else:
            unchanged.append(name)
        progress(name)
    deltas.refuse_unchanged(has_changed)
    return Energies(deltas.labels, tuple(layers), tuple(unchanged))


def layer_energy(name: str, values: Tensor, shape: Sequence[int], experts: int) -> LayerEnergy:
    """The energies of (p, p) Sigma_score."""
    squares = values.square()
    diagonal = float(squares.diagonal().sum())
    return LayerEnergy(name, tuple(shape), experts, len(values), diagonal, float(squares.fill_diagonal_(0).sum()))


def sigma_of(deltas: Deltas, name: str) -> Tensor:
    """(p, p) Sigma_score of one matrix that some expert changed, before the trim."""
    return sigma(deltas.read(name), deltas.tolerance(name))


def sigma(matrices: Sequence[Tensor], tolerance: float = 1e-12) -> Tensor:
    """(p, p) Sigma_score before the trim, as in Fig. 3: the sum over experts of U_perp^T delta_d V_perp.

    Args:
        matrices: D of (m, n), float32 or float64, not all zero.
        tolerance: Singular values at or below this part of the largest do not count.
    """
    left, right = shared_basis(matrices, tolerance)
    return left.T @ sum(matrices[1:], start=matrices[0]) @ right


def shared_basis(matrices: Sequence[Tensor], tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """(m, p) U_perp and (n, p) V_perp of Eq. 3, p <= min(m, n).

    Where D does not divide min(m, n) the remainder is dropped; matrices of zeros have no part in it and are not among D; more
    experts than directions leave each one triplet, and the first of them a place.
    """
    active = [matrix for matrix in matrices if bool(matrix.any())]
    rank = min(active[0].shape)
    triplets = [_leading(matrix, max(1, rank // len(active)), tolerance) for matrix in active]
    left, right = (torch.cat(side, dim=1)[:, :rank] for side in zip(*triplets, strict=True))
    return _polar(left, tolerance), _polar(right, tolerance)


def _leading(matrix: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """(m, k) and (n, k) singular vectors; k is less than `count` where the matrix has a lower rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(count, int((s > tolerance * s[0]).sum()))
    return u[:, :kept], vh[:kept].T


def _polar(matrix: Tensor, tolerance: float) -> Tensor:
    """P Q^T of the SVD P S Q^T, over the singular values that count: others leave directions to chance."""
    p, s, qh = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = (p * (s > tolerance * s[0])) @ qh
    return factor
