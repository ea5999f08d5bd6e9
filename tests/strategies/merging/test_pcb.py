"""PCB against a reference that flattens everything, and on cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.merging.driver import Merging, merge_states
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.strategies.merging import task_vectors
from shiftproof.strategies.merging.pcb import Pcb, PcbConfig

State = dict[str, Tensor]
SHAPES = {"b.weight": (60, 41), "a.bias": (17,), "c.kernel": (8, 3, 3, 3), "scale": ()}
STANDALONE = {"form": "standalone", "ratio": 0.1, "clip": 0.0001}


def models(count: int, dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(count)

    def randn(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: (randn(shape) / 32).to(dtype) for name, shape in SHAPES.items()}
    return base, [{name: t + (randn(t.shape) * (i + 1) / 1000).to(dtype) for name, t in base.items()} for i in range(count)]


def flat(base: State, experts: Sequence[State]) -> Tensor:
    """(D, d) task vectors, flattened in the order of the sorted names."""
    return torch.stack([torch.cat([(expert[name] - base[name]).reshape(-1) for name in sorted(base)]) for expert in experts])


def minmax(x: Tensor) -> Tensor:
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    return (x - low) / (high - low)


def reference(x: Tensor, form: str = "", ratio: float = 0.05, clip: float = 0.01) -> Tensor:
    """(d,) PCB of (D, d), everything at once."""
    tasks, d = x.shape
    ascending = x.abs().sort(dim=1).values
    size = x.abs().clamp(ascending[:, [int(d * clip)]], ascending[:, [int(d * (1 - clip) - 1)]])
    unit = x.sign() * minmax(size)
    inter = torch.tanh(x * x.sum(0)) if form else torch.stack([torch.tanh(row * unit).sum(0) for row in unit])
    score = torch.exp(tasks * minmax(size) ** 2) * inter
    weight = minmax(score.clamp(min=score.sort(dim=1).values[:, [int(d * (1 - ratio))]]))
    return (weight * x.sign() * size).sum(0) / weight.sum(0).clamp(min=1e-12)


def merge(vectors: Sequence[Sequence[float]], **knobs: Any) -> list[float]:
    """PCB of one tensor over a base of zeros."""
    experts = [{"w": torch.tensor(vector, dtype=torch.float64)} for vector in vectors]
    merged, _ = merge_states(Pcb(PcbConfig(**knobs)), {"w": torch.zeros(len(vectors[0]), dtype=torch.float64)}, experts)
    return merged["w"].tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("knobs", [{}, STANDALONE, {"ratio": 0.3, "clip": 0.1}, {"ratio": 1.0, "clip": 0.0}])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_the_flattened_reference(count: int, knobs: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    base, experts = models(count, dtype)
    merged, _ = merge_states(Pcb(PcbConfig(**knobs)), base, experts)
    expected = reference(flat(base, experts), **knobs)
    vector = torch.cat([merged[name].reshape(-1) for name in sorted(base)])
    origin = torch.cat([base[name].reshape(-1) for name in sorted(base)])
    assert expected.abs().max() > 0
    torch.testing.assert_close(vector, origin + expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, [0, 0, 0, 0]), (0.5, [0, 0, 0, 5]), (0.75, [0, 0, 3, 5])])
def test_the_score_at_the_index_of_the_quantile_and_all_below_it_weigh_nothing(ratio: float, expected: list[float]) -> None:
    # of one task the score grows with the magnitude; index int(4 * (1 - ratio)) of the ascending scores is cut off
    assert merge([[1, 2, 3, 5]], ratio=ratio, clip=0.0) == pytest.approx(expected, rel=1e-12)


def test_magnitudes_are_clamped_at_the_indices_of_the_quantiles() -> None:
    # ascending 1 ... 100: index int(100 * 0.01) = 1 and int(100 * 0.99 - 1) = 98, which hold 2 and 99
    merged = merge([[*range(1, 101)]], ratio=1.0)
    assert merged[-3:] == pytest.approx([98, 99, 99], rel=1e-12)
    assert merged[:3] == pytest.approx([0, 0, 3], rel=1e-12)


def test_two_tasks_by_hand() -> None:
    # minmax of (1, 3, 5) and (1, 5, 3) is (0, 1/2, 1) and (0, 1, 1/2); the second task points down at the last entry
    inter = [math.tanh(0.25) + math.tanh(0.5), math.tanh(1) - math.tanh(0.5)]
    first = [0, math.exp(0.5) * inter[0], math.exp(2) * inter[1]]
    second = [0, math.exp(2) * (math.tanh(1) + math.tanh(0.5)), math.exp(0.5) * (math.tanh(0.25) - math.tanh(0.5))]
    weights = [[(score - min(row)) / (max(row) - min(row)) for score in row] for row in (first, second)]
    tasks = [[1, 3, 5], [1, 5, -3]]
    expected = [sum(w[i] * x[i] for w, x in zip(weights, tasks, strict=True)) / sum(w[i] for w in weights) for i in range(3)]
    assert merge(tasks, ratio=1.0, clip=0.0) == pytest.approx(expected, rel=1e-12)


def test_agreement_beats_a_lone_conflict_of_the_same_size() -> None:
    rest = [0.1] * 30
    merged = merge([[1, 1, *rest], [1, 1, *rest], [1, -1, *rest]], ratio=0.05, clip=0.0)
    assert merged[0] == pytest.approx(1)
    assert merged[1] == 0


@pytest.mark.parametrize("knobs", [{}, STANDALONE])
def test_no_more_entries_than_the_share_of_each_task_are_merged(knobs: dict[str, Any]) -> None:
    base, experts = models(3)
    merged, _ = merge_states(Pcb(PcbConfig(**knobs)), base, experts)
    changed = sum(int((merged[name] != base[name]).sum()) for name in base)
    entries = sum(tensor.numel() for tensor in base.values())
    assert 0 < changed <= 3 * knobs.get("ratio", 0.05) * entries


def renamed(state: State) -> State:
    """The same tensors under names that sort the other way round."""
    return {f"{len(state) - position}": state[name] for position, name in enumerate(sorted(state))}


def halved(state: State) -> State:
    """The largest tensor under two names."""
    top, bottom = state["b.weight"].split([13, 47])
    return {"z.top": top, **{name: tensor for name, tensor in state.items() if name != "b.weight"}, "b.bottom": bottom}


@pytest.mark.parametrize("change", [renamed, halved])
@pytest.mark.parametrize("knobs", [{}, STANDALONE])
def test_names_and_cuts_of_tensors_change_nothing(knobs: dict[str, Any], change: Callable[[State], State]) -> None:
    base, experts = models(4)
    merged, _ = merge_states(Pcb(PcbConfig(**knobs)), base, experts)
    other, _ = merge_states(Pcb(PcbConfig(**knobs)), change(base), [change(expert) for expert in experts])
    for name, tensor in change(merged).items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-12, atol=0)


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models(3)
    expected, _ = merge_states(Pcb(PcbConfig()), base, experts)
    monkeypatch.setattr(task_vectors, "STEP", 64)
    monkeypatch.setattr(task_vectors, "CACHED", 1)
    merged: State = {}
    Merging(Pcb(PcbConfig()), InMemory(base), [InMemory(expert) for expert in experts], jobs=2).run(merged.__setitem__)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=0)


def test_an_expert_that_equals_the_base_takes_no_part() -> None:
    merged = merge([[1, 2, 3, 5], [0, 0, 0, 0]], ratio=0.5, clip=0.0)
    assert merged == [0, 0, 0, 5]


def test_equal_magnitudes_leave_nothing_to_compete_for() -> None:
    assert merge([[1, -1, 1], [1, 1, 1]], clip=0.0) == [0, 0, 0]


def test_a_hundred_experts_do_not_overflow_float32() -> None:
    vectors = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
    merged, _ = merge_states(Pcb(PcbConfig()), {"w": torch.zeros(400)}, [{"w": vector} for vector in vectors])
    expected = reference(vectors.double())
    assert expected.abs().max() > 1
    torch.testing.assert_close(merged["w"].double(), expected, rtol=1e-3, atol=1e-6)


def test_the_scale_multiplies_the_merged_vector() -> None:
    assert merge([[1, 2, 3, 5]], ratio=0.5, clip=0.0, scale=0.5) == [0, 0, 0, 2.5]
