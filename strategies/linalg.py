"""Dense linear algebra of the spectral merges: leading singular triplets and polar factors, by Gram matrices or the textbook.

**Gram route**, for float32. A matrix is taken in its tall orientation, its Gram matrix and the eigenvectors of that are
computed in float64, and the long side follows from one product. Squaring halves the digits, so float64 keeps what float32 data
have: a singular value of 1e-6 of the largest is an eigenvalue of 1e-12, far above the 1e-15 that float64 resolves. float64 data
have digits that a Gram matrix would lose, and take `torch.linalg.svd`.

**What counts as a direction.** A singular value at or below `TOLERANCE` times the largest is rounding: its vectors are whatever
the library left there, and change with library, threads and device. On the Gram route such directions are left out: fewer
triplets come back than were asked for, and a polar factor is U V^T over the other directions only, a partial isometry. So two
equal experts, a delta of low rank or of zeros have one finite answer. The textbook functions keep everything, as it comes.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

from shiftproof.strategies.eigenpairs import ROWS, gram, leading_eigenpairs

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Singular values at or below this part of the largest are taken for zero."""

_DELICATE = 1e-3
"""Eigenvalues below this part of the largest have inverse roots too large for a product in float32."""


class Triplets(NamedTuple):
    """Singular values in descending order with their vectors.

    Attributes:
        u: (m, k) left vectors, in columns.
        s: (k,) singular values.
        v: (n, k) right vectors, in columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def first(self, count: int) -> Triplets:
        """The leading ones of these."""
        return Triplets(self.u[:, :count], self.s[:count], self.v[:, :count])


class Polar(NamedTuple):
    """Polar factor, and what else its computation found.

    Attributes:
        factor: (m, n) the orthonormal factor U V^T, over the directions that count.
        s: (n,) singular values in descending order; 0 where a direction does not count.
    """

    factor: Tensor
    s: Tensor


def leading_triplets(matrix: Tensor, count: int) -> Triplets:
    """The leading singular triplets that count, each left vector's entry of largest magnitude positive.

    Args:
        matrix: (m, n) float32 (Gram route) or float64.
        count: How many at most, 1 ... min(m, n).

    Returns:
        At most `count` triplets: those above `TOLERANCE` times the largest singular value; none for a matrix of zeros.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix  # of a wide one an SVD takes twice as long
    found = textbook_triplets(tall, count) if matrix.dtype == torch.float64 else _tall_triplets(tall, count)
    return canonical_signs(significant(Triplets(found.v, found.s, found.u) if is_wide else found))


def textbook_triplets(matrix: Tensor, count: int) -> Triplets:
    """The leading singular triplets out of a thin SVD, signs and null space as LAPACK leaves them.

    Args:
        matrix: (m, n) float32 or float64.
        count: How many, 0 ... min(m, n).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Triplets(u[:, :count], s[:count], vh[:count].T)


def significant(triplets: Triplets) -> Triplets:
    """Those above `TOLERANCE` times the first."""
    return triplets.first(int((triplets.s > TOLERANCE[triplets.s.dtype] * triplets.s[:1]).sum()))


def canonical_signs(triplets: Triplets) -> Triplets:
    """The same triplets with the entry of largest magnitude of every left vector positive; of two as large, the first."""
    u, s, v = triplets
    if not len(s):
        return triplets
    peaks = u.gather(0, u.abs().argmax(dim=0, keepdim=True))  # (1, k)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
    return Triplets(u * signs, s, v * signs)


def polar_factor(matrix: Tensor, overwrite: bool = False) -> Polar:
    """The polar factor U V^T over the singular values that count.

    Args:
        matrix: (m, n) float32 (Gram route) or float64, m >= n or not.
        overwrite: The factor may take the place of the matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = polar_factor(matrix.T, overwrite)
        return Polar(found.factor.T, found.s)
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        counts = s > TOLERANCE[matrix.dtype] * s[0]
        return Polar((u * counts) @ vh, s * counts)
    return _tall_polar(matrix, matrix if overwrite else torch.empty_like(matrix))


def textbook_polar_factor(matrix: Tensor) -> Tensor:
    """(m, n) the polar factor out of a thin SVD; columns of zeros get directions from LAPACK's null space."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = u @ vh
    return factor


def _tall_triplets(matrix: Tensor, count: int) -> Triplets:
    if matrix.device.type == "cpu":
        with _one_thread:
            found, basis = leading_eigenpairs(gram(matrix), count)
        values, v = torch.from_numpy(found.copy()), torch.from_numpy(basis.T.copy()).to(matrix.dtype).T
    else:
        every, vectors = _eigenpairs(matrix)
        values, v = every[-count:].flip(0), vectors[:, -count:].flip(1).to(matrix.dtype)
    s = values.clamp(min=0).sqrt()
    counts = s > TOLERANCE[matrix.dtype] * s[0]
    inverse = torch.where(counts, s, 1.0).reciprocal() * counts
    return Triplets(matrix @ (v * inverse.to(matrix.dtype)), s.to(matrix.dtype), v)


def _tall_polar(matrix: Tensor, into: Tensor) -> Polar:
    """X G^(-1/2), where the delicate part of the root stays in float64; a few rows at a time, so that it may overwrite X."""
    values, vectors = _eigenpairs(matrix)
    top = values[-1]
    counts = values > TOLERANCE[matrix.dtype] ** 2 * top
    inverse = torch.where(counts, values, 1.0).rsqrt() * counts
    split = int((values <= _DELICATE * top).sum())
    quarter = (vectors[:, split:] * inverse[split:].sqrt()).to(matrix.dtype)
    root, delicate = quarter @ quarter.T, vectors[:, :split]
    for rows, place in zip(matrix.split(ROWS), into.split(ROWS), strict=True):
        factor = rows @ root
        if split:
            factor += (((rows.double() @ delicate) * inverse[:split]) @ delicate.T).to(matrix.dtype)
        place.copy_(factor)
    s = (values * counts).clamp(min=0).sqrt().flip(0)
    return Polar(into, s.to(matrix.dtype))


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of X^T X in ascending order with their vectors, float64."""
    if matrix.device.type != "cpu":
        double = matrix.double()
        return tuple(torch.linalg.eigh(double.T @ double))
    with _one_thread:
        product = torch.from_numpy(gram(matrix))
    return tuple(torch.linalg.eigh(product, UPLO="U"))


class _OneThread:
    """One thread for NumPy's products: first in sets the limit, last out lifts it, as it holds for the whole process.

    Matrices are merged beside each other; threads of a library that wait for each other in a loop cost more than they give.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.inside = 0
        self.limits: Any = None

    @cached_property
    def controller(self) -> Any:
        """Looking for the libraries takes milliseconds, limiting them microseconds."""
        return ThreadpoolController()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.limits = self.controller.limit(limits=1, user_api="blas")

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.limits.restore_original_limits()


_one_thread = _OneThread()
