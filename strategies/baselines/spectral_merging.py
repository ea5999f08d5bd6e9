"""Spectral merges that SCORE is compared with: TSV-M, Iso-C and Iso-CTS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from shiftproof.benchmark import ExpertExperience, StrategySpec, hookimpl
from shiftproof.strategies.linalg import Triplets, leading_triplets, polar_factor, textbook_triplets
from shiftproof.strategies.merging.spectral import SpectralConfig, SpectralMerge
from shiftproof.strategies.subspaces import SharedBasis, changed, joined_basis, leave_one_out, padded_basis, shared_basis


@dataclass(frozen=True)
class SpectralRouteConfig(SpectralConfig):
    """Knobs of TSV-M and Iso-C."""

    route: Literal["gram", "textbook"] = "gram"  # textbook (released): SVDs as LAPACK leaves them, null space included


@dataclass(frozen=True)
class IsoCtsConfig(SpectralRouteConfig):
    """Knobs of Iso-CTS."""

    common: Annotated[float, Ge(0), Le(1)] = 0.8  # of the rank, for the subspace of the sum


class Tsv(SpectralMerge[SpectralRouteConfig]):
    """TSV-M: the leading 1/D of each expert's singular triplets, with the vectors of all experts made orthogonal."""

    shares_rank = True

    def merge_matrices(self, deltas: Sequence[Tensor]) -> Tensor:
        """(m, n) U_perp diag(s) V_perp^T."""
        return tsv(deltas, self.config.route)


class IsoC(SpectralMerge[SpectralRouteConfig]):
    """Iso-C: the sum of the deltas with a flat spectrum."""

    def merge_matrices(self, deltas: Sequence[Tensor]) -> Tensor:
        """(m, n) the sum, its singular values replaced by their mean."""
        return iso_c(deltas, self.config.route)


class IsoCts(SpectralMerge[IsoCtsConfig]):
    """Iso-CTS: the leading directions of the sum, and what each expert has beside them, with a flat spectrum."""

    def merge_matrices(self, deltas: Sequence[Tensor]) -> Tensor:
        """(m, n) all directions with one singular value."""
        return iso_cts(deltas, self.config.common, self.config.route)


Route = Literal["gram", "textbook"]


def tsv(deltas: Sequence[Tensor], route: Route = "gram", basis: SharedBasis | None = None) -> Tensor:
    """TSV-M of one matrix (Gargiulo et al., CVPR 2025, arXiv:2412.00081).

    Args:
        deltas: D matrices of (m, n), float32 or float64.
        basis: What they share, where it is known, as `leave_one_out` yields it.

    Returns:
        (m, n); zeros if all deltas are.
    """
    if route == "textbook":
        basis = shared_basis(deltas, "raw", "pad")
    elif basis is None:
        active = changed(deltas)
        if not active:
            return torch.zeros_like(deltas[0])
        basis = shared_basis(active)
    return (basis.left * basis.s) @ basis.right.T


def tsv_leave_one_out(deltas: Sequence[Tensor]) -> Iterator[Tensor]:
    """TSV-M of all but one, for each in turn; every delta is factorized once."""
    for others, basis in leave_one_out(deltas):
        yield tsv(others, basis=basis)


def iso_c(deltas: Sequence[Tensor], route: Route = "gram") -> Tensor:
    """Iso-C of one matrix (Marczak et al., ICML 2025, arXiv:2502.04959): polar factor times mean singular value of the sum.

    Args:
        deltas: D matrices of (m, n), float32 or float64.

    Returns:
        (m, n). The mean is over all min(m, n) singular values; on the Gram route directions that do not count stay zero.
    """
    total = _sum(deltas)
    if route == "textbook":
        u, s, v = textbook_triplets(total, min(total.shape))
        return (u * s.mean()) @ v.T
    polar = polar_factor(total)
    return polar.factor * polar.s.mean()


def iso_cts(deltas: Sequence[Tensor], common: float = 0.8, route: Route = "gram") -> Tensor:
    """Iso-CTS of one matrix (Marczak et al., ICML 2025, arXiv:2502.04959).

    Args:
        deltas: D matrices of (m, n), float32 or float64.
        common: Part of the rank for the sum's directions; what is left is rounded to a multiple of D for the experts.

    Returns:
        (m, n); zeros if the deltas add up to zero.
    """
    is_textbook = route == "textbook"
    triplets = textbook_triplets if is_textbook else leading_triplets
    active = list(deltas) if is_textbook else changed(deltas)
    if not active:
        return torch.zeros_like(deltas[0])
    rank = min(deltas[0].shape)
    own = specific_rank(rank, len(active), common)
    total = _sum(deltas)
    factors: list[Triplets] = []
    if count := rank - own * len(active):
        factors.append(triplets(total, count))
    if own:
        beside = [_beside(delta, factors[0].u, is_textbook) for delta in active] if factors else active
        # The experts' own directions come first, the common ones last.
        factors = [*(triplets(delta, own) for delta in beside), *factors]
    basis = padded_basis(factors) if is_textbook else joined_basis(factors)
    return basis.left @ basis.right.T * (basis.s.sum() / basis.rank)


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    """(m, n) one after the other, as one would write it: where the sum lacks rank, its rounding turns the null space."""
    return reduce(torch.add, deltas)


def _beside(delta: Tensor, u: Tensor, is_textbook: bool) -> Tensor:
    """(m, n) a delta without what lies in the span of (m, k) u; the textbook multiplies from left to right, as written."""
    return delta - (u @ u.T @ delta if is_textbook else u @ (u.T @ delta))


def specific_rank(rank: int, experts: int, common: float) -> int:
    """How many directions each expert has of its own: what the common part leaves, shared out and rounded."""
    return min(round((rank - int(common * rank)) / experts), rank // experts)


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`tsv`, `iso-c` and `iso-cts`."""
    return [
        StrategySpec(
            "tsv",
            Tsv,
            SpectralRouteConfig,
            ExpertExperience,
            reference="Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv:2412.00081",
            data_knob="recalibrate_bn",
            presets={"released": SpectralRouteConfig(route="textbook")},
        ),
        StrategySpec(
            "iso-c",
            IsoC,
            SpectralRouteConfig,
            ExpertExperience,
            reference="Marczak et al., No Task Left Behind: Isotropic Model Merging, ICML 2025, arXiv:2502.04959",
            data_knob="recalibrate_bn",
            presets={"released": SpectralRouteConfig(route="textbook")},
        ),
        StrategySpec(
            "iso-cts",
            IsoCts,
            IsoCtsConfig,
            ExpertExperience,
            reference="Marczak et al., No Task Left Behind: Isotropic Model Merging, ICML 2025, arXiv:2502.04959",
            data_knob="recalibrate_bn",
            presets={"released": IsoCtsConfig(route="textbook")},
        ),
    ]
