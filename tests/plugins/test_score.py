"""SCORE beside Algorithm 1 in NumPy, and what its knobs and presets mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.config import check_type, check_values
from shiftproof.benchmark.merging.driver import Merging
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.plugins.score import Score, ScoreConfig, score, score_leave_one_out, shiftproof_strategies, trimmed
from shiftproof.strategies.baselines.spectral_merging import tsv
from tests.strategies.spectral import Array, concatenated, deltas, polar, relative

SHAPES = [(24, 16), (16, 24), (18, 18), (50, 11)]
DTYPES = [(torch.float32, 2e-4), (torch.float64, 1e-9)]
PRESETS = shiftproof_strategies()[0].presets


def by_hand(given: list[Tensor], divisor: float = 1.0, center: bool = True, is_trimmed: bool = True) -> Array:
    """Algorithm 1 and Eq. 4 in float64 with canonical signs."""
    left, right, _ = concatenated(given)
    left, right = polar(left), polar(right)
    total = np.zeros((left.shape[1], right.shape[1]))
    off = ~np.eye(len(total), dtype=bool)
    for delta in given:
        projection = left.T @ delta.double().numpy() @ right
        mean = projection[off].mean() if center else 0.0
        std = projection[off].std(ddof=1) if center else np.sqrt((projection[off] ** 2).mean())
        if is_trimmed:
            projection[off & (np.abs(projection - mean) > 1.96 * std / divisor)] = 0
        total += projection
    return np.asarray(left @ total @ right.T)


def as_released(given: list[Tensor], divisor: float) -> Tensor:
    """The released code's steps, written from their description: padded buffers, raw signs, zeros in the statistics."""
    rank = min(given[0].shape)
    count = rank // len(given)
    left, right = given[0].new_zeros(given[0].shape[0], rank), given[0].new_zeros(rank, given[0].shape[1])
    for domain, delta in enumerate(given):
        u, _, vt = torch.linalg.svd(delta, full_matrices=False)
        left[:, domain * count : (domain + 1) * count] = u[:, :count]
        right[domain * count : (domain + 1) * count] = vt[:count]
    (p, _, q), (x, _, y) = torch.linalg.svd(left, full_matrices=False), torch.linalg.svd(right, full_matrices=False)
    left, right = p @ q, x @ y
    total = given[0].new_zeros(rank, rank)
    for delta in given:
        projection = left.T @ delta @ right.T
        diagonal = projection.diag().diag()
        off = projection - diagonal
        total += torch.where((off - off.mean()).abs() <= 1.96 * off.std() / divisor, off, 0.0) + diagonal
    merged: Tensor = left @ total @ right
    return merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_the_defaults_are_algorithm_1(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, experts: int) -> None:
    given = deltas(*shape, experts, dtype)
    assert relative(score(given, ScoreConfig()), by_hand(given)) < tolerance
    assert relative(score(given, ScoreConfig(sigma_divisor="domains")), by_hand(given, experts)) < tolerance
    assert relative(score(given, ScoreConfig(center=False)), by_hand(given, center=False)) < tolerance
    assert relative(score(given, ScoreConfig(trim=False)), by_hand(given, is_trimmed=False)) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_released_is_the_released_code(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, experts: int) -> None:
    given = deltas(*shape, experts, dtype)
    assert relative(score(given, PRESETS["released"]), as_released(given, experts)) < tolerance
    assert relative(score(given, PRESETS["released-medical"]), as_released(given, 1)) < tolerance


def test_released_keeps_an_expert_that_changed_nothing() -> None:
    given = [*deltas(18, 12, 2), torch.zeros(18, 12, dtype=torch.float64)]
    assert relative(score(given, PRESETS["released"]), as_released(given, 3)) < 1e-9
    assert relative(score(given, ScoreConfig()), score(given[:2], ScoreConfig())) < 1e-12


def test_the_full_matrix_is_task_arithmetic_where_the_basis_is_whole() -> None:
    given = deltas(20, 20, 4)
    assert relative(score(given, PRESETS["full-matrix"]), sum(given)) < 1e-10
    assert relative(score([one.float() for one in given], PRESETS["full-matrix"]), sum(given)) < 1e-4
    assert relative(score(deltas(20, 20, 3), PRESETS["full-matrix"]), sum(deltas(20, 20, 3))) > 0.01  # 18 of 20 directions


def test_rows_of_table_3_add_up() -> None:
    given = deltas(24, 16, 3)
    rows = {name: score(given, PRESETS[name]) for name in ("diagonal", "off-diagonal", "full-matrix", "trimmed")}
    assert relative(rows["diagonal"] + rows["off-diagonal"], rows["full-matrix"]) < 1e-10
    assert torch.equal(rows["trimmed"], score(given, PRESETS["paper"]))
    assert min(relative(rows["trimmed"], rows[name]) for name in ("diagonal", "off-diagonal", "full-matrix")) > 0.01


def test_without_a_mean_the_signs_of_singular_vectors_do_not_matter() -> None:
    given = deltas(30, 24, 3)
    raw, canonical = (ScoreConfig(signs=signs, center=False) for signs in ("raw", "canonical"))
    flipped = score([one.flip(0) for one in given], canonical).flip(0)  # turns the largest entries of left vectors elsewhere
    assert relative(score(given, raw), score(given, canonical)) < 1e-10
    assert relative(flipped, score(given, canonical)) < 1e-10
    assert relative(score(given, replace(raw, center=True)), score(given, replace(canonical, center=True))) > 1e-3


def test_canonical_signs_do_not_depend_on_those_of_lapack() -> None:
    given = deltas(30, 24, 3)
    assert relative(-score([-one for one in given], ScoreConfig()), score(given, ScoreConfig())) < 1e-10
    padded = ScoreConfig(remainder="pad")  # 24 = 3 x 8: nothing is left over, so nothing comes from the null space
    assert relative(score(given, padded), score(given, ScoreConfig())) < 1e-10


@pytest.mark.parametrize("statistics", ["off-diagonal", "all"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_statistics_are_numpy_s(statistics: Any, unbiased: bool) -> None:
    given = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    off = given.numpy().copy()
    np.fill_diagonal(off, 0)
    values = off if statistics == "all" else off[~np.eye(7, dtype=bool)]
    kept = np.abs(off - values.mean()) <= 1.1 * values.std(ddof=int(unbiased)) / 2
    config = ScoreConfig(statistics=statistics, unbiased=unbiased, tau=1.1, sigma_divisor=2.0)
    found = trimmed(given.clone(), 7, 5, config)
    assert found.numpy() == pytest.approx(np.where(np.eye(7, dtype=bool), given.numpy(), off * kept))


def test_constant_couplings_stay() -> None:
    given = torch.full((6, 6), 0.25)
    assert torch.equal(trimmed(given.clone(), 6, 2, ScoreConfig()), given)


def test_tau_prunes_more_the_smaller_it_is() -> None:
    given = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    kept = [float((trimmed(given.clone(), 60, 2, ScoreConfig(tau=tau)) != 0).float().mean()) for tau in (0.0, 0.5, 1.96, 10.0)]
    assert kept == sorted(kept)
    assert kept[2] == pytest.approx(0.95, abs=0.01)
    assert kept[0] == pytest.approx(1 / 60)
    assert kept[3] == 1


def test_the_trim_removes_couplings_that_stand_out_and_keeps_the_agreement() -> None:
    """Three domains own eight directions each; every one also couples two directions that belong to the others."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 24, generator=generator, dtype=torch.float64)).Q for side in (40, 24))
    given, agreement = [], torch.zeros(40, 24, dtype=torch.float64)
    for domain in range(3):
        sigma = 0.005 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
        own = range(8 * domain, 8 * domain + 8)
        sigma[own, own] = torch.linspace(1, 0.5, 8, dtype=torch.float64)
        agreement += left * sigma.diagonal() @ right.T
        one, other = 8 * ((domain + 1) % 3), 8 * ((domain + 2) % 3)
        sigma[one, other] = sigma[other + 1, one + 1] = 0.3  # weaker than what it owns, so no leading direction of its own
        given.append(left @ sigma @ right.T)
    after = {name: relative(score(given, PRESETS[name]), agreement) for name in ("paper", "full-matrix")}
    assert after["paper"] < after["full-matrix"] / 3
    total = given[0] + given[1] + given[2]
    assert after["full-matrix"] == pytest.approx(relative(total, agreement))  # without the trim all interference stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_experts_give_one_finite_answer(dtype: torch.dtype) -> None:
    first, second = deltas(24, 20, 2, dtype)
    low, row = first[:, :3] @ second[:3], second[:1]
    for given in ([first, first], [first, first + 1e-3 * second], [low, 2 * low], [low, first], [row, row, -row], [first] * 25):
        for config in PRESETS.values():
            found = score(given, config)
            assert bool(torch.isfinite(found).all())
            assert torch.equal(found, score([one.clone() for one in given], config))
    zeros = torch.zeros_like(first)
    assert torch.equal(score([zeros, zeros], ScoreConfig()), zeros)


def test_two_equal_experts_give_twice_their_leading_half() -> None:
    given = deltas(20, 16, 1)[0]
    u, s, vh = np.linalg.svd(given.numpy(), full_matrices=False)
    leading = u[:, :8] * s[:8] @ vh[:8]
    assert relative(score([given, given], PRESETS["full-matrix"]), 2 * leading) < 1e-10
    assert relative(score([given, given], PRESETS["diagonal"]), leading) < 1e-10  # half of it lies on the diagonal, as in TSV
    assert relative(tsv([given, given]), leading) < 1e-10


def test_more_experts_than_rank_leave_the_first_ones_a_direction_each() -> None:
    given = deltas(30, 4, 6)
    left = np.stack([np.linalg.svd(one.numpy())[0][:, 0] for one in given[:4]], axis=1)
    found = score(given, ScoreConfig()).numpy()
    basis = np.linalg.qr(left)[0]
    assert basis @ basis.T @ found == pytest.approx(found, abs=1e-10)
    assert np.linalg.matrix_rank(found) == 4


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_folds_from_shared_factors_are_the_folds_one_by_one(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    given = deltas(*shape, 4, dtype)
    given.insert(2, torch.zeros_like(given[0]))
    for held_out, fold in enumerate(score_leave_one_out(given, ScoreConfig())):
        assert relative(fold, score(given[:held_out] + given[held_out + 1 :], ScoreConfig())) < tolerance


def test_the_merge_is_base_plus_lambda_times_the_delta_and_alters_nothing() -> None:
    given = deltas(12, 10, 3, torch.float32)
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))
    experts = [base + one for one in given]
    before = [one.clone() for one in (base, *experts)]
    once, twice = (Score(ScoreConfig(scale=scale)).merge("w", base, experts, None) - base for scale in (1.0, 2.0))
    assert relative(once, score([one - base for one in experts], ScoreConfig())) < 1e-5
    assert relative(twice, 2 * once) < 1e-5
    assert all(torch.equal(one, other) for one, other in zip(before, (base, *experts), strict=True))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_threads_do_not_change_the_merge(preset: str) -> None:
    given = [deltas(20 + size, 16, 3, torch.float32, seed=size) for size in range(6)]
    base = {str(at): torch.zeros_like(one[0]) for at, one in enumerate(given)}
    experts = [InMemory({str(at): one[expert] for at, one in enumerate(given)}) for expert in range(3)]
    found: list[dict[str, Tensor]] = [{}, {}]
    for jobs in (1, 2):
        Merging(Score(PRESETS[preset]), InMemory(base), experts, jobs=jobs).run(found[jobs - 1].__setitem__)
    assert all(torch.equal(found[0][name], found[1][name]) for name in base)


def test_presets_are_what_they_say() -> None:
    check_type(ScoreConfig)
    for config in PRESETS.values():
        check_values(config)
    divisors = {name: PRESETS[name].sigma_divisor for name in ("paper", "paper-medical", "released", "released-medical")}
    assert divisors == {"paper": 1.0, "paper-medical": "domains", "released": "domains", "released-medical": 1.0}
    assert PRESETS["paper"] == ScoreConfig()
