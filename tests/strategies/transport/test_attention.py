"""The distance between heads against scipy's singular values; the search over pairs against all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from shiftproof.benchmark.transporting.specification import Slot
from shiftproof.strategies.transport.assignment import assign, picked
from shiftproof.strategies.transport.attention import best_heads, compose, spectral_distance

HEADS, SIZE, WIDTH = 3, 4, 10


def projection(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(HEADS * SIZE, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def value(similarity: torch.Tensor, units: torch.Tensor) -> float:
    return float(picked(similarity, units).sum())


def slots(tensor: str = "q", axis: int = 0) -> list[Slot]:
    return [Slot(tensor, axis, 0, 1, HEADS * SIZE)]


def test_the_distance_is_that_of_singular_values() -> None:
    a, b = projection(0), projection(1)
    found = spectral_distance({"q": a}, {"q": b}, slots(), HEADS)
    values = [[scipy.linalg.svdvals(h.double().numpy()) for h in tensor.view(HEADS, SIZE, WIDTH)] for tensor in (a, b)]
    for i, j in itertools.product(range(HEADS), repeat=2):
        assert float(found[i, j]) == pytest.approx(np.linalg.norm(values[1][i] - values[0][j]), abs=1e-6)


def test_the_distance_does_not_change_under_permutations_of_rows_and_columns() -> None:
    a, b = projection(0), projection(1)
    generator = torch.Generator().manual_seed(5)
    rows = torch.cat([h * SIZE + torch.randperm(SIZE, generator=generator) for h in range(HEADS)])
    moved = a[rows][:, torch.randperm(WIDTH, generator=generator)]
    before, after = (spectral_distance({"q": one}, {"q": b}, slots(), HEADS) for one in (a, moved))
    assert torch.allclose(before, after, atol=1e-6)


def test_distances_are_summed_over_projections_and_heads_may_lie_along_columns() -> None:
    state = {"q": projection(0), "out": projection(1).T.contiguous()}
    other = {"q": projection(2), "out": projection(3).T.contiguous()}
    both = spectral_distance(state, other, [*slots(), *slots("out", 1)], HEADS)
    alone = [
        spectral_distance({"q": a}, {"q": b}, slots(), HEADS)
        for a, b in ((0, 2), (1, 3))
        for a, b in [(projection(a), projection(b))]
    ]
    assert torch.allclose(both, alone[0] + alone[1], atol=1e-6)


def test_the_search_over_pairs_of_heads_finds_the_best_of_all_structured_permutations() -> None:
    heads, size = 2, 3
    similarity = torch.randn(heads * size, heads * size, generator=torch.Generator().manual_seed(0))
    inner = [torch.tensor(units) for units in itertools.permutations(range(size))]
    every = [
        compose(torch.tensor(order), torch.stack(within))
        for order in itertools.permutations(range(heads))
        for within in itertools.product(inner, repeat=heads)
    ]
    assert value(similarity, best_heads(similarity, heads)) == pytest.approx(max(value(similarity, one) for one in every))


def test_an_assignment_is_the_best_of_all_permutations() -> None:
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    every = [value(similarity, torch.tensor(units)) for units in itertools.permutations(range(5))]
    assert value(similarity, assign(similarity)) == pytest.approx(max(every))
