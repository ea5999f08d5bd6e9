"""Sigma_score and its energy. Oracles: the SCORE plugin, deltas with known singular vectors, invariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.analysis.deltas import Deltas
from shiftproof.benchmark.analysis.energy import energies, layer_energy, shared_basis, sigma, sigma_of
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.registry.lookup import load_registry

DeltasOf = Callable[..., Deltas]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged(preset: str, matrices: list[Tensor]) -> Tensor:
    """What the plugin adds to the base, here zeros."""
    spec, _, config = load_registry(["score"]).strategy(f"score@{preset}")
    method: Any = spec.build(config, None)  # type: ignore[arg-type]  # there is no run to have a context
    found: Tensor = method.merge("w", torch.zeros_like(matrices[0]), matrices, None)
    return found


@pytest.mark.parametrize("shape", [(12, 12), (20, 13), (9, 14)])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_sigma_and_its_energies_are_those_of_the_score_that_is_registered(shape: tuple[int, int], experts: int) -> None:
    matrices = [random(seed, *shape) for seed in range(experts)]
    left, right = shared_basis(matrices)
    found = layer_energy("w", sigma(matrices), shape, experts)
    torch.testing.assert_close(left @ sigma(matrices) @ right.T, merged("full-matrix", matrices), rtol=1e-9, atol=1e-9)
    assert found.rank == min(shape) // experts * experts
    assert found.diagonal == pytest.approx(float(merged("diagonal", matrices).square().sum()))
    assert found.off_diagonal == pytest.approx(float(merged("off-diagonal", matrices).square().sum()))


def test_experts_in_subspaces_of_their_own_lie_on_the_diagonal_with_their_singular_values() -> None:
    first, second = torch.zeros(2, 6, 6, dtype=torch.float64)
    first[:3, :3], second[3:, 3:] = torch.diag(torch.tensor([5.0, 4, 3])), torch.diag(torch.tensor([2.0, 1.5, 1]))
    found = sigma([first, second])
    torch.testing.assert_close(found.abs(), torch.diag(torch.tensor([5, 4, 3, 2, 1.5, 1], dtype=torch.float64)))
    assert layer_energy("w", found, (6, 6), 2).share == pytest.approx(1)


def test_one_direction_in_two_rotations_is_half_on_the_diagonal() -> None:
    """e1 e1^T and e1 e2^T share their left vector: one direction of U_perp is left; the sum is e1 (e1 + e2)^T."""
    first, second = torch.zeros(2, 2, 2, dtype=torch.float64)
    first[0, 0] = second[0, 1] = 1
    left, right = shared_basis([first, second])
    torch.testing.assert_close(left[:, 0].abs(), torch.tensor([2**-0.5, 0], dtype=torch.float64))
    torch.testing.assert_close(right.abs(), torch.eye(2, dtype=torch.float64))
    found = layer_energy("w", sigma([first, second]), (2, 2), 2)
    assert [found.diagonal, found.off_diagonal] == pytest.approx([1, 1])


def test_square_deltas_lose_no_energy_where_the_experts_divide_the_rank() -> None:
    matrices = [random(seed, 12, 12) for seed in range(3)]
    found = layer_energy("w", sigma(matrices), (12, 12), 3)
    assert found.diagonal + found.off_diagonal == pytest.approx(float(sum(matrices).square().sum()))  # type: ignore[union-attr]


def test_signs_of_singular_vectors_and_the_order_of_experts_do_not_change_the_energy() -> None:
    matrices = [random(seed, 10, 7) for seed in range(3)]
    usual = layer_energy("w", sigma(matrices), (10, 7), 3)
    turn = torch.diag(torch.tensor([1.0, -1] * 5, dtype=torch.float64))
    for others in (matrices[::-1], [-one for one in matrices], [turn @ one for one in matrices]):
        found = layer_energy("w", sigma(others), (10, 7), 3)
        assert [found.diagonal, found.off_diagonal] == pytest.approx([usual.diagonal, usual.off_diagonal])


def test_equal_experts_low_ranks_and_more_experts_than_directions_give_finite_answers() -> None:
    matrix = random(0, 6, 4)
    low = random(1, 6, 1) @ random(2, 1, 4)
    for matrices in ([matrix, matrix], [low, low, matrix], [random(seed, 6, 4) for seed in range(7)]):
        left, right = shared_basis(matrices)
        assert bool(torch.isfinite(sigma(matrices)).all())
        assert float(torch.linalg.svdvals(left)[0]) <= 1 + 1e-9
        assert left.shape[1] == right.shape[1] <= 4


def test_a_layer_tells_who_changed_it_and_what_nobody_changed_is_named(deltas_of: DeltasOf) -> None:
    nothing = torch.zeros(6, 4, dtype=torch.float64)
    a, b = random(0, 6, 4), random(1, 6, 4)
    deltas = deltas_of(x={"0": a, "1": a, "2": nothing}, y={"0": b, "1": nothing, "2": nothing})
    found = energies(deltas)
    assert [(layer.name, layer.experts, layer.rank) for layer in found.layers] == [("0", 2, 4), ("1", 1, 4)]
    assert found.layers[1].share == pytest.approx(1)  # an SVD of its own
    assert found.unchanged == ("2",)
    assert layer_energy("0", sigma_of(deltas, "0"), (6, 4), 2) == found.layers[0]


def test_deltas_that_cancel_have_no_energy_and_no_share() -> None:
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert layer_energy("w", zeros, (3, 3), 2).share == 0


def test_an_expert_that_is_the_base_is_refused(deltas_of: DeltasOf) -> None:
    with pytest.raises(InputError, match="y: expected an expert that differs from the base"):
        energies(deltas_of(x={"w": random(0, 3, 3)}, y={"w": torch.zeros(3, 3, dtype=torch.float64)}))
