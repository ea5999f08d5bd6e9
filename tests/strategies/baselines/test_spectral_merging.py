"""TSV-M, Iso-C and Iso-CTS beside the textbook in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.merging.driver import Merging
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.strategies.baselines.spectral_merging import (
    IsoC,
    IsoCts,
    IsoCtsConfig,
    Route,
    SpectralRouteConfig,
    Tsv,
    iso_c,
    iso_cts,
    shiftproof_strategies,
    specific_rank,
    tsv,
    tsv_leave_one_out,
)
from tests.strategies.spectral import concatenated, deltas, polar, relative

SHAPES = [(24, 16), (16, 24), (18, 18), (50, 11)]
DTYPES = [(torch.float32, 1e-4), (torch.float64, 1e-9)]
STATES = {"layer.weight": (12, 8), "layer.bias": (8,), "conv.weight": (6, 2, 3, 3), "text_projection": (8, 8)}


def states(experts: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and its experts."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in STATES.items()}
    tuned = [{name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(experts)]
    return base, tuned


def merged(method: Any, name: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a method makes of a tensor, and the tensor in base and experts."""
    base, experts = states()
    return method.merge(name, base[name], [one[name] for one in experts], None), base[name], [one[name] for one in experts]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_tsv_is_the_equation(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, experts: int) -> None:
    given = deltas(*shape, experts, dtype)
    left, right, values = concatenated(given)
    expected = polar(left) * values @ polar(right).T
    assert relative(tsv(given), expected) < tolerance
    assert relative(tsv(given, "textbook"), expected) < tolerance  # singular values are 0 where the textbook pads


def test_tsv_does_not_depend_on_signs_or_on_the_order_of_experts() -> None:
    given = deltas(20, 15, 4)
    assert relative(tsv([given[at] for at in (2, 0, 3, 1)]), tsv(given)) < 1e-10
    assert relative(-tsv([-one for one in given]), tsv(given)) < 1e-10
    flipped = tsv([one.flip(0) for one in given]).flip(0)  # turns the largest entries of left vectors elsewhere
    assert relative(flipped, tsv(given)) < 1e-10


def test_folds_from_shared_factors_are_the_folds_one_by_one() -> None:
    given = deltas(30, 20, 4, torch.float32)
    given.insert(2, torch.zeros(30, 20))
    for held_out, fold in enumerate(tsv_leave_one_out(given)):
        assert relative(fold, tsv(given[:held_out] + given[held_out + 1 :])) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_equal_experts_give_the_leading_half_of_one(dtype: torch.dtype) -> None:
    given = deltas(20, 16, 1, dtype)[0]
    u, s, vh = np.linalg.svd(given.double().numpy(), full_matrices=False)
    assert relative(tsv([given, given]), u[:, :8] * s[:8] @ vh[:8]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("route", ["gram", "textbook"])
def test_iso_c_flattens_the_spectrum_of_the_sum(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float, route: Any
) -> None:
    given = deltas(*shape, 3, dtype)
    u, s, vh = np.linalg.svd(sum(one.double().numpy() for one in given), full_matrices=False)
    found = iso_c(given, route)
    assert relative(found, s.mean() * u @ vh) < tolerance
    assert np.linalg.svd(found.double().numpy(), compute_uv=False) == pytest.approx(s.mean(), rel=10 * tolerance)


@pytest.mark.parametrize("shape", [(41, 60), (41, 61), (60, 41)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_released_iso_c_adds_one_expert_after_the_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Five experts of rank four: the null space of the sum, which the flat spectrum lifts, depends on the last bit."""
    generator = torch.Generator().manual_seed(1)
    factors = [
        [torch.randn(size, generator=generator, dtype=dtype) for size in ((shape[0], 4), (4, shape[1]))] for _ in range(5)
    ]
    given = [left @ right for left, right in factors]
    u, s, vh = torch.linalg.svd(sum(given[1:], given[0]), full_matrices=False)
    assert relative(iso_c(given, "textbook"), u @ torch.diag(s.mean().expand(len(s))) @ vh) < 1e-5


def test_iso_c_leaves_out_what_no_expert_changed() -> None:
    narrow = torch.cat([deltas(10, 4, 1)[0], torch.zeros(10, 3, dtype=torch.float64)], dim=1)
    s = np.linalg.svd(narrow.numpy(), compute_uv=False)
    found = iso_c([narrow, torch.zeros_like(narrow)])
    assert np.linalg.svd(found.numpy(), compute_uv=False) == pytest.approx([s.sum() / 7] * 4 + [0] * 3, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("route", ["gram", "textbook"])
def test_iso_cts_is_the_equation(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, route: Any) -> None:
    given, rank = deltas(*shape, 2, dtype), min(shape)
    arrays = [one.double().numpy() for one in given]
    u, s, vh = np.linalg.svd(sum(arrays), full_matrices=False)
    own = round((rank - int(0.8 * rank)) / 2)
    common = rank - 2 * own
    lefts, values, rights = [], [], []
    for one in arrays:
        p, t, qh = np.linalg.svd(one - u[:, :common] @ u[:, :common].T @ one, full_matrices=False)
        lefts.append(p[:, :own])
        values.append(t[:own])
        rights.append(qh[:own].T)
    left, right = np.hstack([*lefts, u[:, :common]]), np.hstack([*rights, vh[:common].T])
    expected = np.concatenate([*values, s[:common]]).mean() * polar(left) @ polar(right).T
    assert own > 0
    assert relative(iso_cts(given, 0.8, route), expected) < tolerance


@pytest.mark.parametrize(
    ("rank", "experts", "common", "expected"),
    [(768, 5, 0.8, 31), (768, 8, 0.8, 19), (10, 3, 0.8, 1), (10, 5, 0.8, 0), (5, 3, 0.0, 1), (4, 2, 1.0, 0)],
)
def test_what_an_expert_keeps_for_itself_is_rounded(rank: int, experts: int, common: float, expected: int) -> None:
    assert specific_rank(rank, experts, common) == expected  # r - round((r - int(0.8 r)) / D) D is common


@pytest.mark.parametrize("merge", [tsv, iso_c, iso_cts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_expert_that_changed_nothing_has_no_say(merge: Any, dtype: torch.dtype) -> None:
    given, zeros = deltas(15, 12, 3, dtype), torch.zeros(15, 12, dtype=dtype)
    assert relative(merge([zeros, *given, zeros]), merge(given)) < 1e-6
    assert torch.equal(merge([zeros, zeros]), zeros)


@pytest.mark.parametrize("merge", [tsv, iso_c, iso_cts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_experts_give_one_finite_answer(merge: Any, dtype: torch.dtype) -> None:
    first, second = deltas(24, 20, 2, dtype)
    low = first[:, :3] @ second[:3]
    row = second[:1]
    for given in ([first, first], [first, first + 1e-3 * second], [low, 2 * low], [low, first], [row, row, -row], [first] * 25):
        found = merge(given)
        assert bool(torch.isfinite(found).all())
        assert torch.equal(found, merge([one.clone() for one in given]))
        assert float(found.norm()) < 5 * sum(float(one.norm()) for one in given)


@pytest.mark.parametrize("spec", shiftproof_strategies(), ids=lambda spec: spec.name)
def test_what_is_no_matrix_or_is_excluded_is_the_mean(spec: Any) -> None:
    method = spec.build(spec.config(), None)
    for name in ("layer.bias", "conv.weight", "text_projection"):
        found, _, experts = merged(method, name)
        assert method.path(name, found.shape) == "average"
        assert relative(found, torch.stack(experts).mean(dim=0)) < 1e-6
    assert method.path("layer.weight", (12, 8)) == "spectral"
    assert spec.build(replace(spec.config(), exclude=()), None).path("text_projection", (8, 8)) == "spectral"


@pytest.mark.parametrize("spec", shiftproof_strategies(), ids=lambda spec: spec.name)
def test_a_kernel_of_any_rank_may_be_merged_as_a_matrix(spec: Any) -> None:
    method = spec.build(replace(spec.config(), conv="matrix"), None)
    found, base, experts = merged(method, "conv.weight")
    as_matrix = method.merge("w", base.flatten(1), [one.flatten(1) for one in experts], None)
    assert torch.equal(found.flatten(1), as_matrix)
    assert method.path("conv.weight", (4, 3, 3, 3, 3)) == "spectral"


@pytest.mark.parametrize("kind", [Tsv, IsoC])
def test_scale_is_of_the_whole_delta(kind: Any) -> None:
    once, twice = kind(SpectralRouteConfig()), kind(SpectralRouteConfig(scale=2.0))
    for name in STATES:
        found, base, _ = merged(once, name)
        assert relative(merged(twice, name)[0] - base, 2 * (found - base)) < 1e-5


@pytest.mark.parametrize("spec", shiftproof_strategies(), ids=lambda spec: spec.name)
def test_threads_do_not_change_the_merge(spec: Any) -> None:
    base, experts = states()
    found: list[dict[str, Tensor]] = [{}, {}]
    for jobs in (1, 2):
        merging = Merging(spec.build(spec.config(), None), InMemory(base), [InMemory(one) for one in experts], jobs=jobs)
        merging.run(found[jobs - 1].__setitem__)
    assert all(torch.equal(found[0][name], found[1][name]) for name in STATES)


def test_released_takes_the_textbook_route() -> None:
    presets = {spec.name: spec.presets["released"] for spec in shiftproof_strategies()}
    assert {name: config.route for name, config in presets.items()} == dict.fromkeys(("tsv", "iso-c", "iso-cts"), "textbook")
    given = deltas(20, 16, 3, torch.float32)
    method = IsoCts(IsoCtsConfig(route="textbook"))
    assert torch.equal(method.merge_matrices(given), iso_cts(given, route="textbook"))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (18, 18)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_iso_cts_without_common_directions_are_the_experts_own(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    given, own = deltas(*shape, 2, dtype), min(shape) // 2
    factors = [np.linalg.svd(one.double().numpy(), full_matrices=False) for one in given]
    left = np.hstack([u[:, :own] for u, _, _ in factors])
    right = np.hstack([vh[:own].T for _, _, vh in factors])
    expected = np.concatenate([s[:own] for _, s, _ in factors]).mean() * polar(left) @ polar(right).T
    routes: tuple[Route, ...] = ("gram", "textbook")
    for route in routes:
        assert relative(iso_cts(given, 0.0, route), expected) < tolerance


def test_iso_cts_of_a_row_that_one_expert_changed_is_that_row() -> None:
    """One direction is all there is; rounding leaves it to the expert and none to the sum."""
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(iso_cts([row, torch.zeros_like(row)]), row)


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_released_iso_cts_rounds_as_its_products_are_written(shape: tuple[int, int], experts: int) -> None:
    """Flat spectra, where in float32 the order of two products shows."""
    generator = torch.Generator().manual_seed(experts)
    given = [torch.randn(shape, generator=generator) for _ in range(experts)]
    own = specific_rank(min(shape), experts, 0.8)
    u, s, vh = torch.linalg.svd(sum(given[1:], given[0]), full_matrices=False)
    u, s, vh = u[:, : min(shape) - own * experts], s[: min(shape) - own * experts], vh[: min(shape) - own * experts]
    lefts, values, rights = [], [], []
    for one in given:
        p, t, qh = torch.linalg.svd(one - u @ u.T @ one, full_matrices=False)
        lefts, values, rights = [*lefts, p[:, :own]], [*values, t[:own]], [*rights, qh[:own]]
    sides = (torch.hstack([*lefts, u]), torch.vstack([*rights, vh]))
    left, right = (p @ qh for p, _, qh in (torch.linalg.svd(side, full_matrices=False) for side in sides))
    expected = torch.linalg.multi_dot([left, torch.diag(torch.cat([*values, s]).mean().expand(left.shape[1])), right])
    assert relative(iso_cts(given, 0.8, "textbook"), expected) < 2e-6
