"""Rules, passes, threads and blocks of a merge, against sums and means by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging import driver
from shiftproof.benchmark.merging.driver import RUN, Merging, TensorRow, mean, merge_states, spectral_share
from shiftproof.benchmark.merging.method import MergeMethod
from shiftproof.benchmark.merging.sources import BLOCK, InMemory
from shiftproof.benchmark.registry.lookup import load_registry

State = dict[str, Tensor]


class Collected:
    """Takes whole tensors and parts, as a file would."""

    def __init__(self, base: State) -> None:
        self.flat = {name: torch.zeros_like(tensor).reshape(-1) for name, tensor in base.items()}
        self.shapes = {name: tensor.shape for name, tensor in base.items()}
        self.parts: list[int] = []

    def write(self, name: str, tensor: Tensor) -> None:
        self.flat[name].copy_(tensor.reshape(-1))

    def write_part(self, name: str, start: int, run: Tensor) -> None:
        self.flat[name][start : start + len(run)] = run
        self.parts.append(len(run))

    @property
    def state(self) -> State:
        return {name: flat.view(self.shapes[name]) for name, flat in self.flat.items()}


def in_parts(method: MergeMethod, made: Sequence[State], jobs: int = 1) -> tuple[Collected, list[TensorRow]]:
    base, *experts = (InMemory(state, f"model {position}") for position, state in enumerate(made))
    collected = Collected(made[0])
    return collected, Merging(method, base, experts, jobs=jobs).run(collected.write, write_part=collected.write_part)


def summed(made: Sequence[State], name: str) -> Tensor:
    base = made[0][name].double()
    return base + torch.stack([state[name].double() - base for state in made[1:]]).sum(0)


def test_parameters_go_to_the_method_statistics_are_averaged_and_counters_kept(summing: Any, states: Any) -> None:
    made = states(3)
    merged, rows = merge_states(summing(), made[0], made[1:])
    assert list(merged) == list(made[0])
    for name in ("fc.weight", "fc.bias", "conv.weight", "scale"):
        torch.testing.assert_close(merged[name].double(), summed(made, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged["bn.running_var"], torch.stack([s["bn.running_var"] for s in made[1:]]).mean(0))
    assert merged["bn.num_batches_tracked"] == 0
    assert {row.name: (row.rule, row.why) for row in rows} == {
        **dict.fromkeys(("fc.weight", "fc.bias", "conv.weight", "scale"), ("elementwise", "")),
        "bn.running_var": ("average", "running statistics"),
        "bn.num_batches_tracked": ("copied", "integer"),
    }


def test_what_is_private_and_what_no_expert_changed_stays_the_bases(summing: Any, states: Any) -> None:
    made = states(2)
    for state in made[1:]:
        state["fc.bias"] = made[0]["fc.bias"].clone()
    merged, rows = merge_states(summing(), made[0], made[1:], lambda name: name != "scale")
    assert torch.equal(merged["fc.bias"], made[0]["fc.bias"])
    assert torch.equal(merged["scale"], made[0]["scale"])
    found = {row.name: (row.rule, row.why) for row in rows}
    assert found["fc.bias"] == ("unchanged", "no expert differs from the base")
    assert found["scale"] == ("copied", "private")


def test_a_complex_tensor_is_copied_and_called_so(summing: Any) -> None:
    made = [{"w": torch.rand(3), "c": torch.rand(2, dtype=torch.complex64)} for _ in range(3)]
    merged, rows = merge_states(summing(), made[0], made[1:])
    assert torch.equal(merged["c"], made[0]["c"])
    assert rows[1] == TensorRow("c", (2,), "copied", "complex")


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("blockwise", [True, False])
def test_parts_and_threads_change_no_bit(summing: Any, states: Any, jobs: int, blockwise: bool) -> None:
    made = states(3)
    for state in made:
        state["large"] = torch.rand(2 * BLOCK + 5)
    whole, rows = merge_states(summing(), made[0], made[1:])
    collected, again = in_parts(summing(blockwise), made, jobs)
    assert again == rows
    assert all(torch.equal(collected.state[name], tensor) for name, tensor in whole.items())
    assert (collected.parts.count(BLOCK) == 2) is blockwise
    assert max(collected.parts) <= BLOCK


def test_a_tensor_that_differs_in_its_last_element_alone_is_merged_in_parts(summing: Any) -> None:
    made = [{"w": torch.ones(BLOCK + 7), "same": torch.ones(BLOCK + 7), "none": torch.ones(0)} for _ in range(3)]
    made[2]["w"][-1] = 3.0
    collected, rows = in_parts(summing(), made)
    assert [row.rule for row in rows] == ["elementwise", "unchanged", "unchanged"]
    assert collected.state["w"].sum() == BLOCK + 9
    assert torch.equal(collected.state["same"], made[0]["same"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_the_output_has_the_bases_dtype_and_one_rounding(summing: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    made = [{"w": torch.rand(50, generator=generator).to(dtype)} for _ in range(3)]
    merged, _ = merge_states(summing(), made[0], made[1:])
    exact = made[1]["w"].double() + made[2]["w"].double() - made[0]["w"].double()
    wanted = exact if dtype == torch.float64 else exact.float()
    torch.testing.assert_close(merged["w"].double(), wanted.to(dtype).double(), rtol=1e-12, atol=1e-12)
    assert merged["w"].dtype == dtype


def test_a_method_computes_in_float32_or_in_what_is_asked_for(summing: Any) -> None:
    seen = []

    class Seeing(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
            seen.append((base.dtype, *(expert.dtype for expert in experts)))
            return base

    sources = [InMemory({"w": torch.rand(3, dtype=torch.bfloat16)}) for _ in range(3)]
    for dtype in (None, torch.float64):
        Merging(Seeing(), sources[0], sources[1:], dtype=dtype).run(lambda name, tensor: None)
    assert seen == [(torch.float32,) * 3, (torch.float64,) * 3]


@dataclass
class Largest:
    """Divides each delta by the largest entry of all tensors; two passes, the second of which only counts."""

    rounds: int = 2
    seen: list[Any] = field(default_factory=list)

    def path(self, name: str, shape: Sequence[int]) -> Literal["spectral", "elementwise"]:
        return "spectral" if len(shape) == 2 else "elementwise"

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        return ""

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> float:
        return max(float((expert - base).abs().max()) for expert in experts) if facts is None else 1.0

    def combine(self, partials: Mapping[str, float], facts: Any) -> Any:
        self.seen.append(list(partials))
        return max(partials.values()) if facts is None else (facts, sum(partials.values()))

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        return torch.full_like(base, facts[0] * facts[1])


@dataclass
class Patient(Largest):
    """Wants another pass for as long as it has not seen four."""

    def is_ready(self, facts: Any) -> bool:
        return len(self.seen) >= 4

    def combine(self, partials: Mapping[str, float], facts: Any) -> Any:
        self.seen.append(list(partials))
        return (1.0, len(self.seen))


@pytest.mark.parametrize(("rounds", "passes"), [(2, 4), (5, 5)])
def test_passes_go_on_after_the_rounds_until_the_facts_will_do(rounds: int, passes: int) -> None:
    method = Patient(rounds=rounds)
    merged, _ = merge_states(method, {"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.ones(2)}])
    assert len(method.seen) == passes
    assert merged["w"].tolist() == [passes, passes]


@dataclass
class Counting:
    """Writes the number of all elements everywhere; does not care for the shape."""

    rounds: int = 1
    blockwise: bool = True
    seen: list[Any] = field(default_factory=list)

    def path(self, name: str, shape: Sequence[int]) -> Literal["elementwise"]:
        return "elementwise"

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        return ""

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> int:
        return base.numel()

    def combine(self, partials: Mapping[str, int], facts: Any) -> int:
        self.seen = list(partials.items())
        return sum(partials.values())

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: int) -> Tensor:
        return torch.full_like(base, facts)


@pytest.mark.parametrize("jobs", [1, 3])
def test_passes_see_every_tensor_of_the_method_in_the_order_of_names(states: Any, jobs: int) -> None:
    made = states(2)
    method = Largest()
    collected, _ = in_parts(method, made, jobs)
    own = ["conv.weight", "fc.bias", "fc.weight", "scale"]
    assert method.seen == [own, own]
    largest = max(float((s[name] - made[0][name]).abs().max()) for s in made[1:] for name in own)
    assert collected.state["fc.bias"][0] == torch.tensor(largest * 4)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_pass_goes_over_runs_of_large_tensors_where_a_method_allows_it(jobs: int) -> None:
    made = [{"b": torch.rand(2 * RUN + 5), "a": torch.rand(3, 4), "none": torch.rand(0)} for _ in range(3)]
    method = Counting()
    collected, _ = in_parts(method, made, jobs)
    assert method.seen == [("a", 12), ("b", RUN), (f"b[{RUN}:]", RUN), (f"b[{2 * RUN}:]", 5), ("none", 0)]
    assert collected.state["a"].unique().tolist() == [2 * RUN + 17]
    whole = Counting()
    merge_states(whole, made[0], made[1:])
    assert whole.seen == [("a", 12), ("b", 2 * RUN + 5), ("none", 0)]


def test_progress_hears_of_every_tensor_in_every_pass(states: Any) -> None:
    made = states(2)
    told: list[str] = []
    Merging(Largest(), InMemory(made[0]), [InMemory(s) for s in made[1:]]).run(lambda name, tensor: None, told.append)
    assert len(told) == 2 * 4 + 6
    assert told[0] == "fc.weight"  # the largest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["fc.weight", "bn.running_var"])
@pytest.mark.parametrize("whose", [0, 2])
@pytest.mark.parametrize("blockwise", [True, False])
def test_a_value_that_is_not_finite_is_refused_with_tensor_and_model(
    summing: Any, states: Any, value: float, name: str, whose: int, blockwise: bool
) -> None:
    made = states(2)
    made[whose][name].view(-1)[3] = value
    with pytest.raises(InputError, match=f"NaN or infinity in '{name}' of model {whose}"):
        in_parts(summing(blockwise), made)


@pytest.mark.parametrize("name", ["fc.weight", "bn.running_var"])
@pytest.mark.parametrize("method", [Largest, Counting])
def test_a_method_with_passes_refuses_them_too(method: Callable[[], MergeMethod], name: str, states: Any) -> None:
    made = states(2)
    made[1][name].view(-1)[3] = float("nan")
    with pytest.raises(InputError, match=f"NaN or infinity in '{name}' of model 1"):
        in_parts(method(), made)


@pytest.mark.parametrize("blockwise", [True, False])
def test_inputs_are_looked_at_once_however_many_passes_there_are(
    blockwise: bool, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Tensor] = []

    def look(tensor: Tensor) -> bool:
        looked.append(tensor)
        return True

    monkeypatch.setattr(driver, "is_finite", look)
    made = [{"w": state["fc.weight"]} for state in states(2)]
    in_parts(Counting(rounds=3, blockwise=blockwise), made)
    assert len(looked) == 3 + 1  # the output


def test_finite_values_whose_sum_overflows_are_no_error(summing: Any) -> None:
    made = [{"w": torch.full((100,), 3e38)} for _ in range(3)]
    made[1]["w"][0] = 0.0
    merged, _ = merge_states(summing(), made[0], made[1:])
    assert merged["w"][0] == 0.0
    assert merged["w"][1] == torch.tensor(3e38)


def test_a_merge_that_overflows_the_bases_dtype_is_refused(summing: Any) -> None:
    made = [{"w": torch.full((4,), value, dtype=torch.float16)} for value in (0.0, 6e4, 6e4)]
    with pytest.raises(InputError, match=r"finite merge of 'w'.*torch\.float16 cannot hold"):
        merge_states(summing(), made[0], made[1:])


@pytest.mark.parametrize("blockwise", [True, False])
def test_a_factor_that_the_dtype_cannot_hold_is_refused_and_other_errors_are_not(summing: Any, blockwise: bool) -> None:
    class Scaled(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
            return torch.add(base, experts[0], alpha=1e39) if name == "w" else base.view(3)

    made = [{"w": torch.rand(4)} for _ in range(3)]
    with pytest.raises(InputError, match=r"expected a finite merge of 'w', got a factor that torch\.float32 cannot hold"):
        in_parts(Scaled(blockwise), made)
    with pytest.raises(RuntimeError, match="shape"):
        in_parts(Scaled(blockwise), [{"other": state["w"]} for state in made])


def test_a_merge_of_another_shape_is_refused(summing: Any) -> None:
    class Cut(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
            return base[:1]

    made = [{"w": torch.rand(4)} for _ in range(3)]
    with pytest.raises(InputError, match=r"expected \(4,\) from the merge of 'w', got \(1,\)"):
        merge_states(Cut(), made[0], made[1:])


def test_threads_leave_the_number_of_torchs_threads_as_it_was(summing: Any, states: Any) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Counting(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
            seen.append(torch.get_num_threads())
            return base

    torch.set_num_threads(2)
    try:
        in_parts(Counting(), states(2), jobs=2)
        assert torch.get_num_threads() == 2
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_bytes_in_memory_are_bounded_by_parts_where_a_method_allows_them(summing: Any) -> None:
    sources = [InMemory({"w": torch.empty(4 * BLOCK)}) for _ in range(4)]
    parts = Merging(summing(blockwise=True), sources[0], sources[1:])
    whole = Merging(summing(blockwise=False), sources[0], sources[1:])
    assert parts.held("w", BLOCK) * 4 == whole.held("w", BLOCK) == whole.held("w") == 4 * BLOCK * 4 * 5


def test_reading_happens_in_the_threads_that_merge(summing: Any, states: Any) -> None:
    seen = set()

    class Watched(InMemory):
        def read_into(self, name: str, start: int, into: Tensor) -> None:
            seen.add(threading.current_thread().name)
            super().read_into(name, start, into)

    made = states(2)
    sources = [Watched(state) for state in made]
    collected = Collected(made[0])
    Merging(summing(), sources[0], sources[1:], jobs=2).run(collected.write, write_part=collected.write_part)
    assert threading.main_thread().name not in seen


class Logged(InMemory):
    """Notes what is alive at once: a read that is not yet followed by another."""

    log: list[str] = []  # noqa: RUF012

    def read(self, name: str) -> Tensor:
        Logged.log.append(self.label)
        return super().read(name)


@pytest.mark.parametrize("streams", [True, False])
def test_experts_are_read_when_their_turn_comes_where_a_method_allows_it(summing: Any, states: Any, streams: bool) -> None:
    class Streaming(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
            Logged.log.append("merge")
            return Tensor(super().merge(name, base, experts, facts))

    Streaming.streams = streams
    made = [{"w": state["fc.weight"]} for state in states(3)]
    wanted, _ = merge_states(summing(), made[0], made[1:])
    Logged.log = []
    collected = Collected(made[0])
    base, *experts = (Logged(state, str(position)) for position, state in enumerate(made))
    Merging(Streaming(), base, experts).run(collected.write)
    assert torch.equal(collected.state["w"], wanted["w"])
    position = Logged.log.index("merge")
    assert Logged.log[position + 1 :] == (["1", "2", "3"] if streams else [])


def test_a_value_that_is_not_finite_is_refused_where_experts_are_read_in_turn(summing: Any, states: Any) -> None:
    class Streaming(type(summing())):  # type: ignore[misc]  # a class that comes from a fixture
        streams = True

    made = states(3)
    made[3]["fc.weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity in 'fc\.weight' of expert 3"):
        merge_states(Streaming(), made[0], made[1:])


def test_the_mean_leaves_its_arguments_alone() -> None:
    tensors = [torch.full((2,), float(value)) for value in (1, 2, 6)]
    assert mean(tensors).tolist() == [3.0, 3.0]
    assert tensors[0].tolist() == [1.0, 1.0]


def test_the_spectral_share_counts_parameters() -> None:
    shares: Callable[..., float] = spectral_share
    assert shares(Largest(), {"a": (3, 4), "b": (4,), "c": ()}) == 12 / 17
    assert shares(Largest(), {}) == 0.0


@pytest.mark.parametrize("label", ["tsv", "tsv@released", "score", "iso-c", "iso-cts"])
def test_a_difference_that_the_dtype_cannot_hold_is_refused(label: str) -> None:
    spec, _, config = load_registry(("spectral-merging", "score")).strategy(label)
    made = [{"w": torch.full((4, 4), value)} for value in (-3e38, 3e38, 2.7e38)]
    with pytest.raises(InputError, match=r"merge of 'w', got an expert that is farther from the base than torch\.float32"):
        merge_states(spec.build(config, None), made[0], made[1:])
