"""What experts changed in one matrix, as singular subspaces: each expert's leading directions, and a basis that they share.

The step that TSV (Gargiulo et al., CVPR 2025, arXiv:2412.00081) and SCORE have in common: the leading 1/D of the singular
triplets of every delta, side by side, and the polar factor of both sides (SCORE, Algorithm 1, lines 1-9, Eq. 3).

Conventions where the equations say nothing. An expert whose delta is zero in a matrix is left out there, as if it had not been
merged: D counts the others. D > r leaves every expert one triplet, and the first r experts a place. Directions that do not
count (`shiftproof.strategies.linalg`) take no place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shiftproof.strategies.linalg import (
    Triplets,
    canonical_signs,
    leading_triplets,
    polar_factor,
    significant,
    textbook_polar_factor,
    textbook_triplets,
)

_LANE = 16  # float32 numbers in a register of the widest kind; products of matrices with other strides run at 70 % of the rate
_SMALL = 256  # columns, below which zeros cost more than they bring


@dataclass(frozen=True)
class SharedBasis:
    """Orthonormal factors of the experts' concatenated directions.

    Attributes:
        left: (m, p) U_perp in its first `rank` columns, then zeros.
        right: (n, p) V_perp likewise.
        s: (p,) the experts' own singular values side by side, then zeros.
        rank: How many columns there are.
        is_textbook: Products are taken from left to right, as they are written, and not in the cheaper order.
    """

    left: Tensor
    right: Tensor
    s: Tensor
    rank: int
    is_textbook: bool = False

    @property
    def is_tall(self) -> bool:
        """Whether the matrices have as many rows as columns, or more."""
        return len(self.left) >= len(self.right)

    def project(self, delta: Tensor) -> Tensor:
        """(p, p) U_perp^T delta V_perp of an (m, n) matrix."""
        if self.is_tall or self.is_textbook:
            return (self.left.T @ delta) @ self.right
        return self.left.T @ (delta @ self.right)

    def reconstruct(self, sigma: Tensor) -> Tensor:
        """(m, n) U_perp sigma V_perp^T of a (p, p) matrix."""
        if self.is_tall and not self.is_textbook:
            return self.left @ (sigma @ self.right.T)
        return (self.left @ sigma) @ self.right.T


def changed(deltas: Sequence[Tensor]) -> list[Tensor]:
    """The deltas that are not exactly zero."""
    return [delta for delta in deltas if is_changed(delta)]


def is_changed(delta: Tensor) -> bool:
    """Whether any entry is not exactly zero; the first row mostly tells."""
    return bool(delta[0].any()) or bool(delta.any())


def shared_basis(
    deltas: Sequence[Tensor],
    signs: Literal["canonical", "raw"] = "canonical",
    remainder: Literal["drop", "pad"] = "drop",
) -> SharedBasis:
    """U_perp and V_perp of the experts' leading 1/D, on the Gram route unless something is to be as LAPACK leaves it.

    Args:
        deltas: D matrices of (m, n), float32 or float64; none of zeros unless padded.
        signs: Of singular vectors: the largest entry of every left one positive, or as LAPACK leaves them.
        remainder: Without the r - kD columns that are left over, or with directions of LAPACK's null space in them.
    """
    shape, experts = deltas[0].shape, len(deltas)
    if remainder == "drop" and signs == "canonical":
        return joined_basis(leading_triplets(delta, share_of(shape, experts)) for delta in deltas)
    count = min(shape) // experts if remainder == "pad" else share_of(shape, experts)
    factors = [textbook_triplets(delta, count) for delta in deltas]
    if signs == "canonical":
        factors = [canonical_signs(factor) for factor in factors]
    return padded_basis(factors) if remainder == "pad" else joined_basis(map(significant, factors))


def share_of(shape: Sequence[int], experts: int) -> int:
    """How many triplets each expert keeps: 1/D of min(m, n), at least one."""
    return max(1, min(shape) // experts)


def joined_basis(factors: Iterable[Triplets]) -> SharedBasis:
    """Polar factors of [U_1 | ... | U_D] and [V_1 | ... | V_D], cut to min(m, n) columns, without padding.

    Args:
        factors: Of D matrices of (m, n); at least one triplet in all. Each is copied before the next is asked for.
    """
    left, right, s = _SideBySide(), _SideBySide(), _SideBySide()
    for factor in factors:
        rank = min(len(factor.u), len(factor.v))
        left.append(factor.u, rank)
        right.append(factor.v, rank)
        s.append(factor.s[None], rank)
    u_perp, v_perp = (polar_factor(side.matrix(), overwrite=True).factor for side in (left, right))
    u_perp[:, s.filled :], v_perp[:, s.filled :] = 0, 0
    return SharedBasis(u_perp, v_perp, s.matrix()[0], s.filled)


def padded_basis(factors: Sequence[Triplets]) -> SharedBasis:
    """The textbook's basis of r = min(m, n) columns, of which r - kD come out of LAPACK's null space.

    Args:
        factors: k <= r / D triplets of each of D matrices of (m, n); k may be 0.
    """
    rank = min(len(factors[0].u), len(factors[0].v))
    left, right, s = (factors[0].u.new_zeros(side, rank) for side in (len(factors[0].u), len(factors[0].v), 1))
    start = 0
    for u, values, v in factors:
        place = slice(start, start + len(values))
        left[:, place], right[:, place], s[0, place] = u, v, values
        start += len(values)
    # LAPACK is handed V^T, (r, n), as in the released code: of its transpose it would leave another null space.
    return SharedBasis(textbook_polar_factor(left), textbook_polar_factor(right.T.contiguous()).T, s[0], rank, is_textbook=True)


def leave_one_out(deltas: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], SharedBasis]]:
    """For every fold the other experts' deltas, zeros apart, and their basis; each delta is factorized once for all folds.

    Args:
        deltas: D matrices of (m, n), of which at least two are not zero.
    """
    experts = len(changed(deltas))
    others = [experts - 1 if is_changed(delta) else experts for delta in deltas]
    factors = [leading_triplets(delta, share_of(delta.shape, min(others))) for delta in deltas]
    for held_out in range(len(deltas)):
        count = share_of(deltas[0].shape, others[held_out])
        fold = [at for at in range(len(deltas)) if at != held_out and len(factors[at].s)]
        yield [deltas[at] for at in fold], joined_basis(factors[at].first(count) for at in fold)


class _SideBySide:
    """Columns in one matrix, followed by zeros up to a multiple of `_LANE` where that pays."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.filled = 0

    def append(self, part: Tensor, rank: int) -> None:
        """Copy the columns of (rows, k), of which there is room for `rank` in all."""
        if self.buffer is None:
            self.buffer = part.new_zeros(part.shape[0], _padded(rank))
        stop = min(self.filled + part.shape[1], rank)
        self.buffer[:, self.filled : stop] = part[:, : stop - self.filled]
        self.filled = stop

    def matrix(self) -> Tensor:
        """(rows, p)."""
        assert self.buffer is not None
        return self.buffer[:, : _padded(self.filled)].contiguous()


def _padded(rank: int) -> int:
    return -(-rank // _LANE) * _LANE if rank > _SMALL else rank
