"""Exact order statistics of values that are spread over many tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from shiftproof.strategies.merging.order_statistics import (
    NEGATIVE,
    STRIDE,
    WHOLE,
    Search,
    Span,
    collect,
    count_bins,
    find_spans,
    order_statistics,
    settle,
    slack,
    together,
)
from shiftproof.strategies.merging.task_vectors import differences


def found(tensors: Sequence[Tensor], rank: int, off: int = 0) -> float:
    """The order statistic of one row of values that lie in several tensors."""
    spans = find_spans([count_bins([tensor[None]]) for tensor in tensors], lambda _: [rank], lambda _: off)
    values = settle([collect([tensor[None]], spans) for tensor in tensors], lambda _: [rank])
    assert values is not None
    return values[0][0]


floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(floats, min_size=1, max_size=40), st.data())
@pytest.mark.parametrize("off", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_is_that_of_the_sorted_values(
    dtype: torch.dtype, off: int, values: list[float], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    cut = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values, dtype=dtype)
    assert found([tensor[:cut], tensor[cut:]], rank, off) == np.sort(tensor.numpy())[rank]


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
    got = order_statistics(torch.zeros(5001), list(values), differences, lambda count: (0, count // 2, count - 1))
    expected = values.sort(dim=1).values[:, [0, 2500, 5000]]
    assert got == expected.tolist()


def searched(tensors: Sequence[Tensor], ranks: Sequence[int]) -> tuple[list[float], int]:
    """The order statistics of values that lie in several tensors, and the passes that they took."""
    search, passes = Search(), 0
    while search.values is None:
        parts = [search.scan(torch.zeros_like(tensor), [tensor], differences) for tensor in tensors]
        search, passes = search.combined(parts, lambda _: ranks), passes + 1
    return search.values[0], passes


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 30.0)])
def test_a_sample_tells_where_to_look_in_many_values(scales: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        scale * torch.randn(size, generator=generator) for scale, size in zip(scales, (3 * WHOLE, WHOLE // 2), strict=True)
    ]
    every = torch.cat(tensors).sort().values
    ranks = [0, 100, len(every) // 2, int(0.8 * len(every)), len(every) - 2, len(every) - 1]
    values, passes = searched(tensors, ranks)
    assert values == every[ranks].tolist()
    assert passes == 2


def test_where_the_sample_misleads_everything_is_counted() -> None:
    values = torch.randn(2 * WHOLE, generator=torch.Generator().manual_seed(0))
    values[::STRIDE] += 50  # just those that are looked at
    rank = len(values) // 2
    assert searched([values], [rank]) == ([float(values.sort().values[rank])], 4)


def test_short_tensors_weigh_no_more_than_long_ones() -> None:
    """Counting all of the short ones and a part of the long one would put every rank too high."""
    short, long = [torch.full((WHOLE - 1,), 9.0) for _ in range(3)], torch.rand(20 * WHOLE)
    rank = len(long) // 2
    values, passes = searched([*short, long], [rank])
    assert values == [float(long.sort().values[rank])]
    assert passes == 2


def test_equal_values_are_kept_once_however_many_there_are() -> None:
    zeros = torch.zeros(1, 100_000)
    spans = find_spans([count_bins([zeros])], lambda count: [count // 2], lambda _: 0)
    (((below, tally, total),),) = collect(zeros.split(1000, dim=1), spans)
    assert tally.keys.tolist() == [0.0]
    assert tally.counts.tolist() == [100_000]
    assert (below, total) == (0, 100_000)


def test_zeros_of_both_signs_are_one_value() -> None:
    values = torch.tensor([-0.0, 0.0, -0.0, 1.0, -1.0])
    assert [found([values], rank) for rank in range(5)] == [-1, 0, 0, 0, 1]


def test_what_is_collected_is_a_small_part_of_normal_values() -> None:
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).abs()
    spans = find_spans([count_bins([values])], lambda count: [int(0.8 * count)], slack)
    (((_, tally, _),),) = collect([values], spans)
    assert 0 < tally.counts.sum() < 0.1 * values.numel()


def test_a_rank_outside_its_span_is_told() -> None:
    values = torch.arange(10.0)[None]
    row = [Span(NEGATIVE, NEGATIVE + 1)]  # zero and what is hardly more
    assert settle([collect([values], [row])], lambda _: [5]) is None


def test_of_no_values_the_statistic_is_zero() -> None:
    assert found([torch.zeros(0)], 0) == 0


def test_tallies_add_up() -> None:
    (first,), (second,) = count_bins([torch.tensor([[1.0, 1.0, -2.0]])]), count_bins([torch.tensor([[math.pi, 1.0]])])
    both = together([first, second])
    assert both.counts.tolist() == [1, 3, 1]  # -2, 1 and pi
    assert (np.diff(both.keys) > 0).all()
