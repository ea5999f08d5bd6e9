"""Differences of experts from their base, a block at a time."""

from __future__ import annotations

import pytest
import torch

from shiftproof.strategies.merging import task_vectors
from shiftproof.strategies.merging.task_vectors import add_merged, differences, magnitudes


@pytest.mark.parametrize("entries", [1, 4095, 4096, 4097, 10_000])
def test_blocks_hold_every_difference_in_order(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(task_vectors, "CACHED", 1)  # blocks of the least size
    base = torch.arange(entries, dtype=torch.float32)
    experts = [base * 2, base * -3]
    blocks = [block.clone() for block in differences(base, experts)]
    assert len(blocks) == -(-entries // 4096)
    assert torch.equal(torch.cat(blocks, dim=1), torch.stack([base, base * -4]))
    assert torch.equal(torch.cat([block.clone() for block in magnitudes(base, experts)], dim=1), torch.stack([base, base * 4]))


def test_a_tensor_without_entries_is_one_empty_block() -> None:
    (block,) = differences(torch.zeros(0, 3), [torch.zeros(0, 3)] * 2)
    assert block.shape == (2, 0)
    assert add_merged(torch.zeros(0, 3), [torch.zeros(0, 3)], lambda part: part.sum(0), 1.0).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (50, 30), (8, 4, 3, 3), (4, 2, 3, 3, 3)])
def test_shape_and_dtype_are_those_of_the_base(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, expert = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    merged = add_merged(base, [expert, expert], lambda block: block.sum(0), 0.5)
    assert merged.dtype == dtype
    assert torch.equal(merged, expert)


def test_memory_may_lie_in_another_order() -> None:
    base = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expert = (base + 1).contiguous(memory_format=torch.channels_last)
    merged = add_merged(base, [expert], lambda block: block.sum(0), 1.0)
    torch.testing.assert_close(merged, expert, rtol=0, atol=1e-6)
    torch.testing.assert_close(add_merged(base.mT, [expert.mT], lambda block: block.sum(0), 1.0), expert.mT, rtol=0, atol=1e-6)
