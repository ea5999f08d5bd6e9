"""Exact order statistics of values that are spread over many tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from shiftproof.strategies.merging.order_statistics import collect, count_bins, find_bins, order_statistics, settle, together


def found(tensors: Sequence[Tensor], rank: int) -> float:
    """The order statistic of one row of values that lie in several tensors."""
    places = find_bins([count_bins([tensor[None]]) for tensor in tensors], lambda _: [rank])
    return settle([collect([tensor[None]], places) for tensor in tensors], places)[0][0]


floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(floats, min_size=1, max_size=40), st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_is_that_of_the_sorted_values(dtype: torch.dtype, values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    cut = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values, dtype=dtype)
    assert found([tensor[:cut], tensor[cut:]], rank) == np.sort(tensor.numpy())[rank]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_values_that_float32_cannot_tell_apart_are_found_exactly(values: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    tensor = torch.tensor([*values, 1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)
    assert found([tensor], rank) == np.sort(tensor.numpy())[rank]


@pytest.mark.parametrize("rank", [0, 1, 1999, 2000, 3998, 3999])
def test_dtypes_may_be_mixed(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    single = torch.randn(2000, generator=generator)
    double = torch.randn(2000, generator=generator, dtype=torch.float64)
    assert found([single, double], rank) == float(torch.cat([single.double(), double]).sort().values[rank])


def test_rows_are_searched_apart_and_ranks_may_depend_on_how_many_values_there_are() -> None:
    values = torch.randn(3, 5001, generator=torch.Generator().manual_seed(0))
    got = order_statistics(lambda: values.split(700, dim=1), lambda count: (0, count // 2, count - 1))
    expected = values.sort(dim=1).values[:, [0, 2500, 5000]]
    assert got == expected.tolist()


def test_equal_values_are_kept_once_however_many_there_are() -> None:
    zeros = torch.zeros(1, 100_000)
    places = find_bins([count_bins([zeros])], lambda count: [count // 2])
    ((tally,),) = collect(zeros.split(1000, dim=1), places)
    assert tally.keys.tolist() == [0.0]
    assert tally.counts.tolist() == [100_000]


def test_what_is_collected_is_a_small_part_of_normal_values() -> None:
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).abs()
    places = find_bins([count_bins([values])], lambda count: [int(0.8 * count)])
    ((tally,),) = collect([values], places)
    assert 0 < tally.counts.sum() < 0.01 * values.numel()


def test_of_no_values_the_statistic_is_zero() -> None:
    assert found([torch.zeros(0)], 0) == 0


def test_tallies_add_up() -> None:
    (first,), (second,) = count_bins([torch.tensor([[1.0, 1.0, -2.0]])]), count_bins([torch.tensor([[math.pi, 1.0]])])
    both = together([first, second])
    assert both.counts.tolist() == [1, 3, 1]  # -2, 1 and pi
    assert (np.diff(both.keys) > 0).all()
