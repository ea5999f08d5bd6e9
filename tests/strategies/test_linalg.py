"""Leading triplets and polar factors beside NumPy's and SciPy's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]
from torch import Tensor

from shiftproof.strategies.eigenpairs import gram, leading_eigenpairs
from shiftproof.strategies.linalg import (
    canonical_signs,
    leading_triplets,
    polar_factor,
    textbook_polar_factor,
    textbook_triplets,
)

SHAPES = [(40, 12), (12, 40), (20, 20), (1, 9), (9, 1), (300, 270)]
DTYPES = [(torch.float32, 2e-5), (torch.float64, 1e-11)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random, with singular values that fall like i^-0.7."""
    rank = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64)).Q
    product: Tensor = left * torch.arange(1, rank + 1) ** -0.7 @ right.T
    return product.to(dtype)


def distance(ours: Any, expected: Any) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max())


def of_rank(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(30, 20) of that rank, up to rounding."""
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randn(side, rank, generator=generator, dtype=torch.float64) for side in (30, 20))
    return (left @ right.T).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_leading_triplets_are_those_of_numpy(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    given = matrix(*shape, dtype)
    count = max(1, min(shape) // 3)
    found = leading_triplets(given, count)
    u, s, vh = np.linalg.svd(given.double().numpy(), full_matrices=False)
    assert found.s.numpy() == pytest.approx(s[:count], rel=tolerance)
    # Products of one left and one right vector do not depend on the sign convention.
    ours = torch.einsum("ik,jk->kij", found.u, found.v).numpy()
    assert distance(ours, np.einsum("ik,kj->kij", u[:, :count], vh[:count])) < 50 * tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_entry_of_a_left_vector_is_positive(shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = matrix(*shape, dtype, seed=1)
    found = leading_triplets(given, min(shape))
    assert bool((found.u.gather(0, found.u.abs().argmax(dim=0, keepdim=True)) > 0).all())
    flipped = canonical_signs(found._replace(u=-found.u, v=-found.v))
    assert torch.equal(flipped.u, found.u)
    assert torch.equal(flipped.v, found.v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_wide", [False, True])
def test_directions_that_are_rounding_are_left_out(dtype: torch.dtype, is_wide: bool) -> None:
    given = of_rank(5, dtype).T if is_wide else of_rank(5, dtype)
    found = leading_triplets(given, 8)
    assert [part.shape[-1] for part in found] == [5, 5, 5]
    assert distance((found.u * found.s) @ found.v.T, given) < 1e-4


def test_zeros_have_no_directions() -> None:
    assert len(leading_triplets(torch.zeros(6, 4), 3).s) == 0
    assert torch.equal(polar_factor(torch.zeros(6, 4)).factor, torch.zeros(6, 4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_polar_factor_is_that_of_scipy(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    given = matrix(*shape, dtype)
    found = polar_factor(given)
    expected, _ = scipy.linalg.polar(given.double().numpy())
    assert distance(found.factor, expected) < tolerance
    assert found.s.numpy() == pytest.approx(np.linalg.svd(given.double().numpy(), compute_uv=False), rel=50 * tolerance)


def test_the_polar_factor_of_a_badly_conditioned_basis_is_orthonormal() -> None:
    square = torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(square)
    bad = (u * torch.logspace(0, -4.5, 200, dtype=torch.float64) @ vh).float()  # condition 3e4, as bases of many experts have
    found = polar_factor(bad).factor.double()
    assert (found.T @ found - torch.eye(200)).abs().max() < 2e-3
    expected, _ = scipy.linalg.polar(bad.double().numpy())
    assert np.linalg.norm(found.numpy() - expected) / np.sqrt(200) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_polar_factor_of_a_singular_matrix_is_a_partial_isometry(dtype: torch.dtype) -> None:
    given = of_rank(5, dtype)
    u, _, vh = np.linalg.svd(given.double().numpy(), full_matrices=False)
    found = polar_factor(given)
    assert distance(found.factor, u[:, :5] @ vh[:5]) < 1e-5
    assert int((found.s > 0).sum()) == 5


def test_twice_the_same_columns_share_their_direction() -> None:
    columns = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(3))).Q
    found = polar_factor(torch.cat([columns, columns], dim=1)).factor
    assert distance(found, torch.cat([columns, columns], dim=1) / 2**0.5) < 1e-6


@pytest.mark.parametrize("shape", [(600, 40), (40, 600)])
def test_a_polar_factor_may_take_the_place_of_its_matrix(shape: tuple[int, int]) -> None:
    given = matrix(*shape)
    untouched = given.clone()
    expected = polar_factor(given).factor
    assert torch.equal(given, untouched)
    found = polar_factor(given, overwrite=True).factor
    assert torch.equal(found, expected)
    assert found.data_ptr() == given.data_ptr()


def test_the_textbook_is_torch_s_svd() -> None:
    given = matrix(12, 9)
    u, s, vh = torch.linalg.svd(given, full_matrices=False)
    found = textbook_triplets(given, 4)
    assert torch.equal(found.u, u[:, :4])
    assert torch.equal(found.s, s[:4])
    assert torch.equal(found.v, vh[:4].T)
    assert torch.equal(textbook_polar_factor(given), u @ vh)


@pytest.mark.parametrize("is_row_major", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (512, 7), (1100, 40)])
def test_a_gram_matrix_is_summed_in_float64(shape: tuple[int, int], is_row_major: bool) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(shape if is_row_major else (columns, rows), generator=generator)
    given = given if is_row_major else given.T
    double = given.double().numpy()
    assert np.triu(gram(given)) == pytest.approx(np.triu(double.T @ double), rel=1e-13, abs=1e-12)


def test_leading_eigenpairs_look_at_the_upper_triangle_only() -> None:
    product = gram(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
    assert not np.tril(product, -1).any()
    whole = product + np.triu(product, 1).T
    values, vectors = leading_eigenpairs(product, 4)
    assert values == pytest.approx(np.linalg.eigvalsh(whole)[::-1][:4], rel=1e-12)
    assert distance(whole @ vectors, vectors * values) < 1e-12 * values[0]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (2, 2), (37, 5), (200, 200)])
def test_leading_eigenpairs_are_those_of_numpy(size: int, count: int) -> None:
    factor = np.random.default_rng(size).standard_normal((size + 3, size))
    product = factor.T @ factor
    values, vectors = leading_eigenpairs(product.copy(), count)
    assert values == pytest.approx(np.linalg.eigvalsh(product)[::-1][:count], rel=1e-10)
    assert distance(product @ vectors, vectors * values) < 1e-10 * values[0]
    assert distance(vectors.T @ vectors, np.eye(count)) < 1e-12


def test_what_is_not_finite_is_an_error_of_lapack() -> None:
    with pytest.raises(np.linalg.LinAlgError, match="dstedc"):
        leading_eigenpairs(np.full((4, 4), np.nan), 2)


def test_threads_side_by_side_find_the_same_bits_and_leave_the_limits_as_they_were() -> None:
    def limits() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    given, before = [matrix(90, 70, seed=seed) for seed in range(8)], limits()
    alone = [leading_triplets(one, 20).u for one in given]
    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(lambda one: leading_triplets(one, 20).u, given))
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
    assert limits() == before
