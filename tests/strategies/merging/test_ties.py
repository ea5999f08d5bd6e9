"""TIES against a reference that flattens everything, and on cases worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from shiftproof.benchmark.merging.driver import Merging, merge_states
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.strategies.merging import task_vectors
from shiftproof.strategies.merging.order_statistics import STRIDE, WHOLE
from shiftproof.strategies.merging.ties import Ties, TiesConfig

State = dict[str, Tensor]
SHAPES = {"b.weight": (60, 41), "a.bias": (17,), "c.kernel": (8, 3, 3, 3), "scale": ()}


def models(count: int, dtype: torch.dtype = torch.float64, step: float = 1e-3) -> tuple[State, list[State]]:
    """A base and experts that lie a multiple of `step` away, so that entries tie and cancel now and then."""
    generator = torch.Generator().manual_seed(count)

    def randn(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: (randn(shape) * 64).round() / 1024 for name, shape in SHAPES.items()}
    experts = [{name: t + (randn(t.shape) * 50 * (i + 1)).round() * step for name, t in base.items()} for i in range(count)]
    return {name: t.to(dtype) for name, t in base.items()}, [{name: t.to(dtype) for name, t in e.items()} for e in experts]


def flat(base: State, experts: Sequence[State]) -> Tensor:
    """(D, d) task vectors, flattened in the order of the sorted names."""
    return torch.stack([torch.cat([(expert[name] - base[name]).reshape(-1) for name in sorted(base)]) for expert in experts])


def merged_vector(base: State, merged: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([(merged[name] - base[name]).reshape(-1) for name in sorted(base)])


def reference(x: Tensor, density: float) -> Tensor:
    """(d,) TIES of (D, d), everything at once."""
    d = x.shape[1]
    threshold = x.abs().kthvalue(max(1, d - int(d * density)), dim=1, keepdim=True).values
    x = x * (x.abs() >= threshold)
    sign = x.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = torch.where(sign > 0, x > 0, x < 0)
    return (x * agree).sum(0) / agree.sum(0).clamp(min=1)


class Passes(Ties):
    """Counts its passes."""

    made = 0

    def combine(self, partials: Mapping[str, Any], facts: Any) -> Any:
        self.made += 1
        return super().combine(partials, facts)


def merge(vectors: Sequence[Sequence[float]], **knobs: Any) -> list[float]:
    """TIES of one tensor over a base of zeros."""
    experts = [{"w": torch.tensor(vector, dtype=torch.float64)} for vector in vectors]
    merged, _ = merge_states(Ties(TiesConfig(**knobs)), {"w": torch.zeros(len(vectors[0]), dtype=torch.float64)}, experts)
    return merged["w"].tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_the_flattened_reference(count: int, density: float, dtype: torch.dtype, tolerance: float) -> None:
    base, experts = models(count, dtype, step=2**-10)  # exact in both dtypes
    merged, _ = merge_states(Ties(TiesConfig(density=density)), base, experts)
    expected = reference(flat(base, experts), density)
    assert expected.abs().max() > 0
    bound = tolerance * float(expected.abs().max())
    torch.testing.assert_close(merged_vector(base, merged), expected, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_many_entries_are_merged_as_the_reference_does_whether_or_not_the_sample_misleads(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"long": torch.zeros(2, WHOLE), "short": torch.zeros(WHOLE // 2)}
    experts = [{name: torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()} for _ in range(3)]
    for expert in experts:
        expert["long"].view(-1)[::STRIDE] += shift  # just those that are looked at
    parts = {name: torch.empty(tensor.numel()) for name, tensor in base.items()}
    sources = [InMemory(state) for state in (base, *experts)]
    passes = Passes(TiesConfig(density=0.5))
    Merging(passes, sources[0], sources[1:], jobs=2).run(
        lambda name, tensor: parts[name].copy_(tensor.reshape(-1)),
        write_part=lambda name, start, part: parts[name][start : start + len(part)].copy_(part),
    )
    assert passes.made == (5 if shift else 3)
    torch.testing.assert_close(torch.cat([parts["long"], parts["short"]]), reference(flat(base, experts), 0.5))


@settings(max_examples=60)
@given(
    st.integers(1, 12).flatmap(
        lambda entries: st.lists(st.lists(st.integers(-3, 3), min_size=entries, max_size=entries), min_size=2, max_size=4)
    ),
    st.floats(0.01, 1.0),
)
def test_small_integers_with_many_ties_equal_the_reference(vectors: list[list[float]], density: float) -> None:
    expected = reference(torch.tensor(vectors, dtype=torch.float64), density)
    torch.testing.assert_close(torch.tensor(merge(vectors, density=density), dtype=torch.float64), expected)


def test_one_entry_more_than_the_share_survives() -> None:
    # int(5 * 0.4) = 2; the threshold is the third smallest magnitude, so three survive
    assert merge([[5, -4, 3, 2, 1], [5, -4, 3, 2, 1]], density=0.4) == [5, -4, 3, 0, 0]


def test_all_that_equal_the_threshold_survive() -> None:
    assert merge([[2, -2, 2, 2, 1], [2, -2, 2, 2, 1]], density=0.2) == [2, -2, 2, 2, 0]


def test_only_entries_that_agree_with_the_elected_sign_are_averaged() -> None:
    # 3 + 1 - 2 elects plus: (3 + 1) / 2; 1 - 4 elects minus
    assert merge([[3, 1], [1, -4], [-2, 0]], density=1.0) == [2, -4]


def test_signs_may_be_elected_by_count() -> None:
    assert merge([[1, 1], [1, 1], [-5, 1]], density=1.0, elect="count") == [1, 1]
    assert merge([[1, 1], [1, 1], [-5, 1]], density=1.0) == [-5, 1]


def test_agreeing_entries_may_be_summed() -> None:
    assert merge([[3, 1], [1, -4], [-2, 0]], density=1.0, aggregate="sum") == [4, -4]


@pytest.mark.parametrize(("vectors", "first"), [([[1, 2, 3], [-1, 2, 3]], 1), ([[1, -2, -3], [-1, -2, -3]], -1)])
def test_where_entries_cancel_the_majority_of_elected_signs_decides(vectors: list[list[float]], first: float) -> None:
    assert merge(vectors, density=1.0)[0] == first


def test_without_a_majority_the_negative_side_is_taken() -> None:
    assert merge([[1, 2, -2], [-1, 2, -2]], density=1.0) == [-1, 2, -2]


def test_the_majority_is_global_or_per_tensor() -> None:
    base = {"up": torch.zeros(3), "down": torch.zeros(5)}
    experts = [{"up": torch.tensor([s, 1.0, 1.0]), "down": torch.tensor([s, -1.0, -1.0, -1.0, -1.0])} for s in (1.0, -1.0)]
    whole, _ = merge_states(Ties(TiesConfig(density=1.0)), base, experts)
    apart, _ = merge_states(Ties(TiesConfig(density=1.0, granularity="tensor")), base, experts)
    assert [float(whole[name][0]) for name in base] == [-1, -1]
    assert [float(apart[name][0]) for name in base] == [1, -1]


def test_the_share_is_global_or_per_tensor() -> None:
    base = {"small": torch.zeros(10), "large": torch.zeros(10)}
    expert = {"small": torch.arange(1.0, 11), "large": torch.arange(101.0, 111)}
    whole, _ = merge_states(Ties(TiesConfig(density=0.2)), base, [expert, expert])
    apart, _ = merge_states(Ties(TiesConfig(density=0.2, granularity="tensor")), base, [expert, expert])
    assert [int((whole[name] != 0).sum()) for name in base] == [0, 5]
    assert [int((apart[name] != 0).sum()) for name in base] == [3, 3]
    assert apart["small"].tolist() == [0] * 7 + [8, 9, 10]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_per_tensor_is_the_global_form_of_each_tensor_alone(granularity: Any) -> None:
    base, experts = models(3)
    for name in base:
        expected = reference(flat({name: base[name]}, experts), 0.1)
        config = TiesConfig(density=0.1, granularity=granularity)
        merged, _ = merge_states(Ties(config), {name: base[name]}, [{name: expert[name]} for expert in experts])
        torch.testing.assert_close(merged_vector({name: base[name]}, merged), expected, rtol=1e-9, atol=1e-9)


def renamed(state: State) -> State:
    """The same tensors under names that sort the other way round."""
    return {f"{len(state) - position}": state[name] for position, name in enumerate(sorted(state))}


def halved(state: State) -> State:
    """The largest tensor under two names."""
    top, bottom = state["b.weight"].split([13, 47])
    return {"z.top": top, **{name: tensor for name, tensor in state.items() if name != "b.weight"}, "b.bottom": bottom}


@pytest.mark.parametrize("change", [renamed, halved])
def test_names_and_cuts_of_tensors_change_nothing(change: Callable[[State], State]) -> None:
    base, experts = models(4)
    merged, _ = merge_states(Ties(TiesConfig()), base, experts)
    other, _ = merge_states(Ties(TiesConfig()), change(base), [change(expert) for expert in experts])
    for name, tensor in change(merged).items():
        assert torch.equal(other[name], tensor)


def test_threads_blocks_and_mixed_dtypes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models(3, step=2**-10)
    for state in (base, *experts):
        state["a.bias"] = state["a.bias"].float()
    expected, _ = merge_states(Ties(TiesConfig()), base, experts)
    monkeypatch.setattr(task_vectors, "STEP", 64)
    monkeypatch.setattr(task_vectors, "CACHED", 1)
    merged: State = {}
    Merging(Ties(TiesConfig()), InMemory(base), [InMemory(expert) for expert in experts], jobs=2).run(merged.__setitem__)
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert merged["a.bias"].dtype == torch.float32


def test_with_density_one_and_no_conflict_it_is_the_mean() -> None:
    base, experts = models(3)
    agreeing = [{name: base[name] + (expert[name] - base[name]).abs() + 1 for name in base} for expert in experts]
    merged, _ = merge_states(Ties(TiesConfig(density=1.0)), base, agreeing)
    for name in base:
        torch.testing.assert_close(merged[name], torch.stack([expert[name] for expert in agreeing]).mean(0))


def test_it_recovers_a_shared_direction_under_interference_and_the_sum_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1000, generator=generator).sign() * (torch.arange(1000) < 200)
    vectors = []
    for task in range(5):
        own = 0.01 * torch.randn(1000, generator=generator)  # what fine-tuning leaves everywhere
        conflict = (torch.arange(1000) % 5 == task) * (2 + 1.9 * torch.rand(1000, generator=generator))
        vectors.append(torch.where(conflict > 0, -conflict * shared, shared) + own * (shared == 0))
    merged = torch.tensor(merge([vector.tolist() for vector in vectors], density=0.2))
    inside = shared != 0
    assert torch.equal(merged[inside], shared[inside])
    assert float(torch.cosine_similarity(torch.stack(vectors).sum(0), shared, dim=0)) < 0.95
    assert float(torch.cosine_similarity(merged, shared, dim=0)) > 0.999


def test_an_expert_that_equals_the_base_has_no_say() -> None:
    assert merge([[3, -2, 1], [0, 0, 0]], density=1.0) == [3, -2, 1]


def test_the_scale_multiplies_the_merged_vector() -> None:
    assert merge([[3, -2], [3, -2]], density=1.0, scale=0.5) == [1.5, -1]
