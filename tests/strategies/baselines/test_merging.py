"""Task arithmetic, weight average, MagMax and DARE, and what every element-wise merge keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shiftproof.benchmark import ExpertExperience
from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.merging.driver import Merging, merge_states
from shiftproof.benchmark.merging.method import MergeMethod
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.strategies.baselines.merging import Dare, DareConfig, MagMax, ScaleConfig, TaskArithmetic, shiftproof_strategies
from shiftproof.strategies.merging import task_vectors
from shiftproof.strategies.merging.pcb import PcbConfig
from shiftproof.strategies.merging.ties import TiesConfig

State = dict[str, Tensor]
SPECS: dict[str, StrategySpec[Any]] = {spec.name: spec for spec in shiftproof_strategies()}
CASES = [name for spec in SPECS.values() for name in (spec.name, *(f"{spec.name}@{preset}" for preset in spec.presets))]


def method(case: str) -> MergeMethod:
    """A strategy without a run, by name and preset."""
    name, _, preset = case.partition("@")
    spec = SPECS[name]
    built = spec.build(spec.presets[preset] if preset else spec.config(), None)  # type: ignore[arg-type]
    assert isinstance(built, MergeMethod)
    return built


def models(count: int, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(count)

    def randn(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes = {"b.weight": (90, 31), "a.bias": (17,), "c.kernel": (4, 3, 3, 3), "scale": (), "none": (0, 3)}
    base = {name: randn(shape) for name, shape in shapes.items()}
    return base, [{name: tensor + randn(tensor.shape) / 10 for name, tensor in base.items()} for _ in range(count)]


def merge(case: MergeMethod, vectors: Sequence[Sequence[float]], base: Sequence[float] | None = None) -> list[float]:
    """The merge of one tensor, over a base of zeros if none is given."""
    origin = torch.tensor(base or [0.0] * len(vectors[0]), dtype=torch.float64)
    experts = [{"w": torch.tensor(vector, dtype=torch.float64)} for vector in vectors]
    merged, _ = merge_states(case, {"w": origin}, experts)
    return merged["w"].tolist()


def test_specs_say_what_they_are() -> None:
    assert list(SPECS) == ["task-arithmetic", "weight-average", "magmax", "dare", "ties", "pcb"]
    assert all(spec.consumes is ExpertExperience and "arXiv" in spec.reference for spec in SPECS.values())
    assert all("released" in SPECS[name].presets for name in ("task-arithmetic", "magmax", "ties", "pcb"))


def test_presets_hold_what_the_released_code_does() -> None:
    assert SPECS["task-arithmetic"].presets["released"].scale == 1.0
    assert SPECS["ties"].presets["released"] == TiesConfig(0.2, "global", "mass", "mean", 1.0)
    assert SPECS["ties"].presets["thesis"] == TiesConfig(0.1, "tensor", "mass", "mean", 1.0)
    assert SPECS["pcb"].presets["released"] == PcbConfig("parameter-competition", 0.05, 0.01, 1.0)
    assert SPECS["pcb"].presets["standalone"] == PcbConfig("standalone", 0.1, 0.0001, 1.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes_stay_and_no_argument_is_altered(case: str, dtype: torch.dtype) -> None:
    base, experts = models(3, dtype)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, *experts)]
    merged, _ = merge_states(method(case), base, experts)
    for then, now in zip(before, (base, *experts), strict=True):
        assert all(torch.equal(then[name], now[name]) for name in base)
    assert all(merged[name].dtype == dtype and merged[name].shape == base[name].shape for name in base)
    assert not torch.equal(merged["b.weight"], base["b.weight"])


@pytest.mark.parametrize("case", CASES)
def test_one_expert_or_one_that_equals_the_base_gives_finite_tensors(case: str) -> None:
    base, experts = models(1)
    for given in (experts, [*experts, base], [base, base]):
        merged, _ = merge_states(method(case), base, given)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_which_nothing_is_left_to_the_method_stays(case: str) -> None:
    base = {"steps": torch.tensor(3), "head.weight": torch.ones(2)}
    merged, _ = merge_states(method(case), base, [{**base, "head.weight": torch.zeros(2)}] * 2, lambda name: name == "steps")
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("case", CASES)
def test_order_of_names_threads_and_runs_of_elements_change_nothing(case: str) -> None:
    base, experts = models(3)
    expected, _ = merge_states(method(case), base, experts)
    backwards = [InMemory({name: state[name] for name in sorted(base, reverse=True)}) for state in (base, *experts)]
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    merging = Merging(method(case), backwards[0], backwards[1:], jobs=2)
    merging.run(
        lambda name, tensor: parts.setdefault(name, []).append((0, tensor.reshape(-1))),
        write_part=lambda name, start, part: parts.setdefault(name, []).append((start, part.reshape(-1).clone())),
    )
    for name in base:
        whole = torch.cat([part for _, part in sorted(parts.get(name, []), key=lambda item: item[0])] or [torch.zeros(0)])
        assert torch.equal(whole, expected[name].reshape(-1))


@pytest.mark.parametrize("case", [case for case in CASES if getattr(method(case), "blockwise", False)])
def test_methods_that_promise_it_merge_each_run_of_elements_alone(case: str) -> None:
    base, experts = models(3)
    one = method(case)
    facts: Any = None
    for _ in range(one.rounds):
        partials = {name: one.scan(name, base[name], [expert[name] for expert in experts], facts) for name in sorted(base)}
        facts = one.combine(partials, facts)
    whole = one.merge("b.weight", base["b.weight"], [expert["b.weight"] for expert in experts], facts).reshape(-1)
    flat, *others = [state["b.weight"].reshape(-1) for state in (base, *experts)]
    for start in (0, 700, 1400, 2100):
        run = slice(start, start + 700)
        part = one.merge("b.weight", flat[run], [other[run] for other in others], facts)
        torch.testing.assert_close(part, whole[run], rtol=0, atol=1e-7)


def test_masks_and_statistics_of_a_tensor_are_not_promised_to_be_blockwise() -> None:
    assert [case for case in CASES if not getattr(method(case), "blockwise", False)] == ["dare", "ties@thesis"]


def test_task_arithmetic_is_the_scaled_sum() -> None:
    assert merge(TaskArithmetic(ScaleConfig()), [[2.0, 5.0], [3.0, 4.0]], [1.0, 4.0]) == [4.0, 5.0]
    assert merge(TaskArithmetic(ScaleConfig(0.5)), [[2.0, 5.0], [3.0, 4.0]], [1.0, 4.0]) == [2.5, 4.5]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_task_arithmetic_equals_the_sum_of_task_vectors(dtype: torch.dtype, tolerance: float) -> None:
    base, experts = models(5, dtype)
    merged, _ = merge_states(method("task-arithmetic"), base, experts)
    for name in base:
        expected = base[name] + sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(merged[name], expected, rtol=tolerance, atol=tolerance)


def test_weight_average_is_the_mean_and_says_so() -> None:
    average = method("weight-average")
    assert merge(average, [[2.0, 5.0], [4.0, -1.0]], [1.0, 9.0]) == [3.0, 2.0]
    _, rows = merge_states(average, *models(2))
    assert {row.rule for row in rows} == {"average", "unchanged"}  # the tensor without entries


def test_task_arithmetic_with_weights_that_sum_to_one_is_the_weight_average() -> None:
    base, experts = models(4, torch.float64)
    average, _ = merge_states(method("weight-average"), base, experts)
    scaled, _ = merge_states(TaskArithmetic(ScaleConfig(1 / 4)), base, experts)
    for name in base:
        torch.testing.assert_close(average[name], scaled[name])


def test_magmax_takes_the_greatest_magnitude_and_of_equals_the_later() -> None:
    vectors = [[1.0, -5.0, 2.0, 3.0], [-2.0, 4.0, -2.0, 3.0], [1.5, 0.0, 0.0, -3.0]]
    assert merge(MagMax(ScaleConfig()), vectors) == [-2.0, -5.0, -2.0, -3.0]
    assert merge(MagMax(ScaleConfig(0.5)), vectors) == [-1.0, -2.5, -1.0, -1.5]


def test_magmax_equals_a_gather_by_argmax() -> None:
    base, experts = models(5, torch.float64)
    merged, _ = merge_states(method("magmax"), base, experts)
    for name in ("b.weight", "c.kernel"):
        deltas = torch.stack([expert[name] - base[name] for expert in experts])
        expected = base[name] + deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)


def dare(base: State, experts: Sequence[State], **knobs: Any) -> State:
    return merge_states(Dare(DareConfig(**knobs)), base, experts)[0]


def ones(*names: str, entries: int = 20_000) -> tuple[State, State]:
    """A base of zeros and an expert of ones."""
    return {name: torch.zeros(entries) for name in names}, {name: torch.ones(entries) for name in names}


def test_dare_without_drop_is_task_arithmetic() -> None:
    base, experts = models(3)
    merged, _ = merge_states(TaskArithmetic(ScaleConfig(0.7)), base, experts)
    assert all(torch.equal(dare(base, experts, drop=0.0, scale=0.7)[name], merged[name]) for name in base)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dare_drops_the_share_and_rescales_the_rest(drop: float) -> None:
    base, expert = ones("w")
    merged = dare(base, [expert], drop=drop)["w"]
    kept = merged != 0
    spread = (drop * (1 - drop) / len(merged)) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - drop)) < 4 * spread
    torch.testing.assert_close(merged[kept], torch.full_like(merged[kept], 1 / (1 - drop)))


def test_masks_of_dare_differ_by_seed_name_and_position() -> None:
    base, expert = ones("w", "v")
    none = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    first = dare(base, [expert, none])
    masks = [first["w"], first["v"], dare(base, [none, expert])["w"], dare(base, [expert, none], seed=1)["w"]]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            both = float(((mask != 0) & (other != 0)).float().mean())
            assert abs(both - 0.01) < 4 * (0.01 * 0.99 / 20_000) ** 0.5  # as of independent masks


def test_masks_of_dare_are_the_same_again_whatever_else_is_merged_and_in_which_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = ones("w", "v", entries=20_001)
    both = dare(base, [expert, expert])
    alone = {"w": base["w"]}
    monkeypatch.setattr(task_vectors, "CACHED", 1)
    assert torch.equal(dare(alone, [expert, expert])["w"], both["w"])


def test_masks_of_dare_are_what_they_were() -> None:
    base, expert = ones("w", entries=40)
    kept = [0, 2, 10, 11, 14, 15, 16, 17, 18, 19, 22, 26, 28, 32, 36, 37, 39]  # numpy keeps its bit streams for good
    assert dare(base, [expert], drop=0.5)["w"].nonzero().flatten().tolist() == kept
