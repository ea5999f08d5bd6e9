"""SAR and principal angles. Oracles: scipy, subspaces whose overlap is known, invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import subspace_angles
from torch import Tensor

from shiftproof.benchmark.analysis.deltas import Deltas
from shiftproof.benchmark.analysis.overlap import (
    EPSILON,
    SubspaceRule,
    layer_overlap,
    left_basis,
    mean_angle,
    overlap,
    sar,
)
from shiftproof.benchmark.errors import InputError

DeltasOf = Callable[..., Deltas]
RULE = SubspaceRule()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    q: Tensor = torch.linalg.qr(random(seed, rows, columns))[0]
    return q


def test_the_usual_epsilon_is_that_of_the_released_threshold() -> None:
    assert pytest.approx(math.sqrt(1 - 0.97**2), abs=2e-4) == EPSILON


@pytest.mark.parametrize(
    ("values", "epsilon", "rank"),
    [
        ([3.0, 0.0, 0.0], 0.243, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.243, 4),  # a quarter of the energy in each; 0.059 may be left out
        ([1.0, 1.0, 1.0, 1.0], 0.5, 3),  # exactly a quarter may be left out
        ([1.0, 1.0, 1.0, 1.0], 0.49, 4),
        ([4.0, 2.0, 1.0], 0.5, 1),  # leaves 5 of 21
        ([4.0, 2.0, 1.0], 0.3, 2),  # 1 of 21 = 0.048 <= 0.09 < 5 of 21
    ],
)
def test_k_is_the_smallest_whose_rest_is_within_epsilon(values: list[float], epsilon: float, rank: int) -> None:
    assert SubspaceRule(epsilon).rank(torch.tensor(values, dtype=torch.float64)) == rank


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), epsilon=st.floats(0.05, 0.95))
def test_k_is_the_first_for_which_the_projection_is_near_enough(seed: int, epsilon: float) -> None:
    """Eq. 2 in its first form, by norms of projections."""
    matrix = random(seed, 9, 6)
    u = torch.linalg.svd(matrix, full_matrices=False)[0]
    rests = [float((matrix - u[:, :k] @ u[:, :k].T @ matrix).norm() / matrix.norm()) for k in range(7)]
    assert left_basis(matrix, SubspaceRule(epsilon)).shape[1] == next(k for k, rest in enumerate(rests) if rest <= epsilon)


def test_the_released_rule_takes_one_vector_fewer_and_keeps_one_at_least() -> None:
    s = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert [SubspaceRule(one_fewer=True).rank(values) for values in (s, s[:1])] == [3, 1]


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1, float("nan")])
def test_an_epsilon_that_is_no_part_is_refused(epsilon: float) -> None:
    with pytest.raises(InputError, match="expected an epsilon above 0 and below 1, got"):
        SubspaceRule(epsilon)


def test_sar_is_1_within_the_subspace_0_across_and_the_cosine_between() -> None:
    basis = torch.eye(5, 2, dtype=torch.float64)
    inside, across = torch.zeros(2, 5, 3, dtype=torch.float64)
    inside[:2], across[2:] = random(0, 2, 3), random(1, 3, 3)
    assert sar(inside, basis) == pytest.approx(1, abs=1e-12)
    assert sar(across, basis) == 0
    between = torch.tensor([[3.0], [0], [4.0], [0], [0]], dtype=torch.float64)
    assert sar(between, basis) == pytest.approx(0.6)


def test_rows_are_projected_upon_the_subspace_of_columns() -> None:
    """The small subspace lies in the large one, not the other way round; SAR of the large one is that of its first half."""
    small, large = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([1.0, 1.0]))
    found = layer_overlap("w", [small, large], RULE)
    assert found.ranks == (1, 2)
    torch.testing.assert_close(found.sar, torch.tensor([[1, 1], [math.sqrt(0.5), 1]], dtype=torch.float64))
    assert float(found.angle.max()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("k", "other"), [(1, 1), (3, 3), (2, 5), (5, 2), (4, 8)])
def test_the_mean_angle_is_scipys(k: int, other: int) -> None:
    first, second = orthonormal(k, 12, k), orthonormal(100 + other, 12, other)
    expected = float(np.mean(subspace_angles(first.numpy(), second.numpy())))
    assert mean_angle(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 0.1, math.pi / 4, math.pi / 2 - 1e-9])
def test_small_angles_keep_their_digits(angle: float) -> None:
    first = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    second = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert mean_angle(first, second) == pytest.approx(angle, rel=1e-6)


def test_signs_and_sizes_of_deltas_and_rotations_of_their_rows_do_not_matter() -> None:
    matrices = [random(0, 8, 5), random(1, 8, 5), random(2, 8, 5)]
    turned = [factor * orthonormal(3, 8, 8) @ matrix for factor, matrix in zip((-1.0, 5.0, 0.01), matrices, strict=True)]
    first, second = layer_overlap("w", matrices, RULE), layer_overlap("w", turned, RULE)
    torch.testing.assert_close(first.sar, second.sar)
    torch.testing.assert_close(first.angle, second.angle)


def test_another_order_of_experts_only_permutes() -> None:
    matrices = [random(seed, 8, 5) for seed in range(3)]
    order = [2, 0, 1]
    first, second = layer_overlap("w", matrices, RULE), layer_overlap("w", [matrices[i] for i in order], RULE)
    torch.testing.assert_close(first.sar[order][:, order], second.sar)
    torch.testing.assert_close(first.angle[order][:, order], second.angle)
    assert torch.equal(second.angle, second.angle.T)


def test_random_deltas_overlap_as_much_as_chance_has_it() -> None:
    found = layer_overlap("w", [random(seed, 200, 100) for seed in range(4)], RULE)
    pairs = found.sar[~torch.eye(4, dtype=torch.bool)]
    assert float(pairs.mean()) == pytest.approx(found.chance, rel=0.01)


def test_the_average_is_over_layers_and_skips_those_in_which_one_expert_changed_nothing(deltas_of: DeltasOf) -> None:
    a, b, c = (random(seed, 6, 4) for seed in range(3))
    nothing = torch.zeros(6, 4, dtype=torch.float64)
    found = overlap(
        deltas_of(
            x={"0": a, "1": b, "2": nothing}, y={"0": b, "1": nothing, "2": nothing}, z=dict.fromkeys("012", c) | {"2": nothing}
        )
    )
    assert [layer.name for layer in found.layers] == ["0", "1"]
    assert found.unchanged == ("2",)
    assert found.layers[1].ranks[1] == 0
    assert bool(found.layers[1].sar[1].isnan().all())
    torch.testing.assert_close(found.sar[0, 1], found.layers[0].sar[0, 1])
    torch.testing.assert_close(found.angle[0, 2], (found.layers[0].angle[0, 2] + found.layers[1].angle[0, 2]) / 2)


def test_only_matrices_that_are_named_and_shared_are_looked_at(deltas_of: DeltasOf) -> None:
    a = {"enc.w": random(0, 4, 4), "enc.b": random(1, 4), "enc.conv": random(2, 2, 2, 3, 3), "dec.w": random(3, 4, 4)}
    deltas = deltas_of(x=a, y={name: 2 * tensor for name, tensor in a.items()})
    assert deltas.matrices() == ["enc.w", "dec.w"]
    assert [layer.name for layer in overlap(deltas, "enc").layers] == ["enc.w"]


def test_wrong_input_is_refused_with_what_there_is(deltas_of: DeltasOf) -> None:
    a = {"enc.w": random(0, 4, 4)}
    with pytest.raises(InputError, match="expected two experts or more, got 1"):
        overlap(deltas_of(x=a))
    with pytest.raises(InputError, match=r"expected --layers as a part of the name of a matrix, got 'dec'; there are enc\.w"):
        overlap(deltas_of(x=a, y=a), "dec")
    with pytest.raises(InputError, match="y: expected an expert that differs from the base"):
        overlap(deltas_of(x=a, y={"enc.w": torch.zeros(4, 4, dtype=torch.float64)}))
    with pytest.raises(InputError, match="expected matrices in the base, got no tensor with two dimensions"):
        overlap(deltas_of(x={"b": random(0, 4)}, y={"b": random(1, 4)}))
    with pytest.raises(InputError, match=r"y: expected finite values in 'enc\.w', got NaN or infinity"):
        overlap(deltas_of(x=a, y={"enc.w": torch.full((4, 4), torch.inf, dtype=torch.float64)}))


def test_another_shape_is_refused_by_name(deltas_of: DeltasOf) -> None:
    deltas = deltas_of(x={"w": random(0, 4, 4)}, y={"w": random(1, 4, 4)})
    other = deltas_of(z={"w": random(0, 4, 5)})
    mixed = Deltas(deltas.base, [*deltas.experts, *other.experts], ("x", "y", "z"))
    with pytest.raises(InputError, match=r"z: expected \(4, 4\) for 'w', got \(4, 5\)"):
        overlap(mixed)
