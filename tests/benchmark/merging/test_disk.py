"""What a merge on disk says of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from shiftproof.benchmark.merging.disk import cost_of, reason, summary
from shiftproof.benchmark.merging.driver import IN_FLIGHT, SAME, Merging, TensorRow
from shiftproof.benchmark.merging.sources import InMemory


@pytest.fixture
def spectral(summing: Callable[..., Any]) -> Any:
    """Matrices by their singular vectors unless they are called heads, everything else as the mean."""

    @dataclass(frozen=True)
    class Spectral(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def path(self, name: str, shape: Sequence[int]) -> Literal["spectral", "average"]:
            return "spectral" if len(shape) == 2 and "head" not in name else "average"

    return Spectral()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (TensorRow("w", (4, 4), "spectral"), ""),
        (TensorRow("b", (4,), "average"), "1-dimensional"),
        (TensorRow("conv", (4, 3, 3, 3), "average"), "4-dimensional"),
        (TensorRow("head.w", (4, 4), "average"), "excluded by name"),
        (TensorRow("head.b", (4,), "average"), "1-dimensional"),
        (TensorRow("running_mean", (4,), "average", "running statistics"), "running statistics"),
        (TensorRow("w", (4, 4), "unchanged", SAME), SAME),
    ],
)
def test_the_reason_is_what_the_tensor_is_or_its_name_or_its_shape(spectral: Any, row: TensorRow, said: str) -> None:
    assert reason(spectral, row) == said


def test_a_method_that_averages_everything_needs_no_reason(spectral: Any) -> None:
    class Mean(type(spectral)):  # type: ignore[misc]  # as above
        def path(self, name: str, shape: Sequence[int]) -> Literal["average"]:
            return "average"

    assert reason(Mean(), TensorRow("b", (4,), "average")) == ""


def test_rows_are_summed_by_rule_and_reason_the_largest_first(spectral: Any) -> None:
    rows = [TensorRow("b", (4,), "average"), TensorRow("c", (5,), "average"), TensorRow("conv", (4, 3, 3, 3), "average")]
    assert summary(rows, spectral) == [("average", "4-dimensional", 1, 108), ("average", "1-dimensional", 2, 9)]


def test_more_threads_hold_no_more(spectral: Any) -> None:
    """Sixteen matrices of 16 MiB in three models: two at a time or twenty, they share one bound."""

    class Stored(InMemory):
        def nbytes(self, name: str) -> int:
            return self.read(name).nbytes

    states = [{f"{position}.w": torch.zeros(1, 1).expand(2048, 2048) for position in range(16)} for _ in range(3)]
    base, *experts = (Stored(state) for state in states)
    on_disk: Any = base
    memory = {jobs: cost_of(Merging(spectral, base, experts, jobs=jobs), on_disk).memory for jobs in (1, 2, 20)}
    assert memory[1] < memory[2] < memory[20] == IN_FLIGHT
