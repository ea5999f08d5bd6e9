"""Buffers against sequential references, closed forms and chi-square."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies.replay import GroupBalancedBuffer, LossBinnedBuffer, ReservoirBuffer
from shiftproof.strategies.selection import loss_bins, lower_fullest, reservoir_slots, within_quota

Add = Callable[[Any, int, torch.Generator], None]
fast = settings(deadline=None, max_examples=60, derandomize=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def stream(buffer: ReservoirBuffer, positions: Tensor, generator: torch.Generator, batch: int = 7) -> None:
    for part in positions.split(batch):
        buffer.add(part, part, zeros(len(part)), generator)


def populate(buffer: LossBinnedBuffer, losses: Tensor, generator: torch.Generator, task: int = 0) -> None:
    x = torch.arange(len(losses))
    buffer.populate(x, x, zeros(len(losses)) + task, losses, generator, {"recorded": losses})


def offer(buffer: LossBinnedBuffer, losses: Tensor, generator: torch.Generator, task: int = 0) -> None:
    x = torch.arange(len(losses))
    buffer.offer(x, x, zeros(len(losses)) + task, losses, generator)


# reservoir


def test_each_position_of_the_stream_stays_with_the_same_probability() -> None:
    length, capacity, trials = 40, 8, 1500
    kept = torch.zeros(length)
    generator = seeded(1)
    for _ in range(trials):
        buffer = ReservoirBuffer(capacity)
        stream(buffer, torch.arange(length), generator, batch=9)
        kept[buffer.contents().x] += 1
    share = capacity / length
    # Inclusions of one trial are negatively correlated, since they add up to the capacity: variance p (1 - p) n / (n - 1).
    statistic = ((kept - trials * share) ** 2).sum() / (trials * share * (1 - share) * length / (length - 1))
    assert 0.001 < float(chi2.sf(statistic.item(), length - 1)) < 0.999


@fast
@given(seen=st.integers(0, 40), capacity=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_slots_are_those_of_algorithm_r_one_sample_at_a_time(seen: int, capacity: int, size: int, seed: int) -> None:
    draws = np.random.default_rng(seed).random(size)
    expected = []
    for number, draw in enumerate(draws, start=seen):
        if number < capacity:
            expected.append(number)
        else:
            slot = int(draw * (number + 1))
            expected.append(slot if slot < capacity else -1)
    assert reservoir_slots(seen, capacity, draws).tolist() == expected


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_the_reservoir_holds_what_the_last_write_to_each_slot_left(batch: int) -> None:
    buffer, reference = ReservoirBuffer(5), [-1] * 5
    generator, twin = seeded(3), seeded(3)
    for start in range(0, 200, batch):
        positions = torch.arange(start, min(start + batch, 200))
        buffer.add(positions, positions, zeros(len(positions)), generator)
        draws = torch.rand(len(positions), dtype=torch.float64, generator=twin).tolist()
        for position, draw in zip(positions.tolist(), draws, strict=True):
            slot = position if position < 5 else int(draw * (position + 1))
            if slot < 5:
                reference[slot] = position
    assert buffer.contents().x.tolist() == reference


def test_rows_stay_together_and_keep_their_type() -> None:
    buffer, generator = ReservoirBuffer(20), seeded()
    for start in range(0, 300, 10):
        y = torch.arange(start, start + 10)
        x = (y % 251).to(torch.uint8).view(-1, 1, 1).expand(-1, 2, 3)
        logits = torch.stack((y, 2 * y), 1).float().requires_grad_()
        buffer.add(x, y, y // 100, generator, {"logits": logits})
    memory = buffer.sample(8, generator)
    assert memory.x.dtype == torch.uint8
    assert torch.equal(memory.x[:, 1, 2], (memory.y % 251).to(torch.uint8))
    assert torch.equal(memory.task, memory.y // 100)
    assert torch.equal(memory.extras["logits"], torch.stack((memory.y, 2 * memory.y), 1).float())
    assert not memory.extras["logits"].requires_grad
    assert torch.equal(buffer.contents().y[memory.index], memory.y)


def test_half_precision_extras_are_kept() -> None:
    buffer = ReservoirBuffer(3)
    buffer.add(zeros(2), zeros(2), zeros(2), seeded(), {"logits": torch.tensor([0.5, -1.25], dtype=torch.bfloat16)})
    assert buffer.contents().extras["logits"].tolist() == [0.5, -1.25]


def test_a_sample_has_no_duplicates_and_covers_the_buffer_evenly() -> None:
    buffer, generator = ReservoirBuffer(10), seeded(2)
    stream(buffer, torch.arange(10), generator)
    counts = torch.zeros(10)
    for _ in range(3000):
        drawn = buffer.sample(4, generator)
        assert len(drawn.index.unique()) == len(drawn) == 4
        counts[drawn.index] += 1
    statistic = ((counts - 1200) ** 2).sum() / (3000 * 0.4 * 0.6 * 10 / 9)
    assert 0.001 < float(chi2.sf(statistic.item(), 9)) < 0.999


def test_everything_comes_where_more_is_asked_for_than_is_there() -> None:
    buffer = ReservoirBuffer(10)
    stream(buffer, torch.arange(6), seeded())
    assert sorted(buffer.sample(32, seeded()).x.tolist()) == list(range(6))


def test_the_generator_decides_and_nothing_global_is_drawn() -> None:
    before = torch.get_rng_state()
    buffers = [ReservoirBuffer(8), ReservoirBuffer(8), ReservoirBuffer(8)]
    for buffer, seed in zip(buffers, (0, 0, 1), strict=True):
        stream(buffer, torch.arange(100), seeded(seed))
    first, same, other = (buffer.contents().x.tolist() for buffer in buffers)
    assert first == same != other
    assert torch.equal(before, torch.get_rng_state())


# balanced over groups


@fast
@given(seed=st.integers(0, 10**6), number=st.integers(1, 6), capacity=st.integers(6, 25), batch=st.integers(1, 40))
def test_balanced_counts_are_those_of_taking_one_sample_at_a_time(seed: int, number: int, capacity: int, batch: int) -> None:
    generator = seeded(seed)
    shares = torch.rand(number, generator=generator) ** 4 + 1e-3
    cells = torch.multinomial(shares, 120, replacement=True, generator=generator)
    buffer, count = GroupBalancedBuffer(capacity), dict[int, int]()
    for part in torch.arange(120).split(batch):
        buffer.add(part, part, zeros(len(part)), cells[part], generator, {"cell": cells[part]})
        for cell in cells[part].tolist():
            if count.setdefault(cell, 0) < capacity // len(count):
                if sum(count.values()) == capacity:
                    count[max(sorted(count), key=lambda key: count[key])] -= 1
                count[cell] += 1
        memory = buffer.contents()
        assert memory.extras["cell"].bincount(minlength=number).tolist() == [count.get(cell, 0) for cell in range(number)]
        assert torch.equal(cells[memory.x], memory.extras["cell"])
        assert len(memory.x.unique()) == len(memory) == len(buffer)


def test_a_full_cell_keeps_its_first_samples() -> None:
    buffer = GroupBalancedBuffer(6)
    cells = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 1])
    buffer.add(torch.arange(9), zeros(9), zeros(9), cells, seeded())
    # Cell 0 takes two before cell 1 is known (cap 6), then up to the cap of 3.
    assert sorted(buffer.contents().x.tolist()) == [0, 1, 2, 3, 5, 7]


def test_victims_are_drawn_evenly_within_the_largest_cell() -> None:
    survived = torch.zeros(10)
    generator = seeded(5)
    for _ in range(800):
        buffer = GroupBalancedBuffer(10)
        buffer.add(torch.arange(10), zeros(10), zeros(10), zeros(10), generator)
        buffer.add(torch.arange(10, 15), zeros(5), zeros(5), zeros(5) + 3, generator)
        kept = buffer.contents().x
        survived[kept[kept < 10]] += 1
    statistic = ((survived - 400) ** 2).sum() / (800 * 0.25 * 10 / 9)
    assert 0.001 < float(chi2.sf(statistic.item(), 9)) < 0.999


def test_more_cells_than_slots_are_refused() -> None:
    with pytest.raises(InputError, match="slot a cell"):
        GroupBalancedBuffer(2).add(zeros(3), zeros(3), zeros(3), torch.arange(3), seeded())
    with pytest.raises(InputError, match="from 0"):
        GroupBalancedBuffer(2).add(zeros(1), zeros(1), zeros(1), zeros(1) - 1, seeded())


# binned by loss, as in the text


def test_budgets_are_those_of_the_text_over_three_tasks() -> None:
    buffer, generator = LossBinnedBuffer(64, bins=4), seeded()
    for task, rows in enumerate(([[16] * 4], [[8] * 4] * 2, [[5, 5, 5, 6]] * 2 + [[5] * 4])):
        populate(buffer, torch.linspace(0, 1, 400), generator, task)
        assert buffer.composition().tolist() == rows  # 64 // 3 = 21, of which a new task fills 4 x 5
        assert buffer.contents().task.bincount().tolist() == [sum(row) for row in rows]


def test_bins_are_equal_intervals_and_take_random_samples_without_duplicates() -> None:
    losses = torch.rand(500, generator=seeded(8)) ** 3
    kept = []
    for seed in (0, 1):
        buffer = LossBinnedBuffer(50, bins=5)
        populate(buffer, losses, seeded(seed))
        recorded = buffer.contents().extras["recorded"]
        counts = np.histogram(recorded.numpy(), bins=5, range=(float(losses.min()), float(losses.max())))[0]
        available = np.histogram(losses.numpy(), bins=5, range=(float(losses.min()), float(losses.max())))[0]
        assert counts.tolist() == np.minimum(available, 10).tolist() == buffer.composition()[0].tolist()
        assert len(buffer.contents().x.unique()) == len(buffer)
        kept.append(set(buffer.contents().x.tolist()))
    assert kept[0] != kept[1]


def test_slots_of_bins_without_enough_samples_stay_empty_or_go_to_others() -> None:
    losses = torch.tensor([0.0] * 50 + [0.5] * 20 + [1.0] * 3)
    plain, full = LossBinnedBuffer(40, bins=4), LossBinnedBuffer(40, bins=4, redistribute=True)
    for buffer in (plain, full):
        populate(buffer, losses, seeded())
    assert plain.composition().tolist() == [[10, 0, 10, 3]]
    assert full.composition().tolist() == [[18, 0, 19, 3]]


def test_older_tasks_give_from_their_fullest_bin() -> None:
    buffer, generator = LossBinnedBuffer(40, bins=4, redistribute=True), seeded()
    populate(buffer, torch.tensor([0.0] * 50 + [0.5] * 20 + [1.0] * 3), generator)
    populate(buffer, torch.linspace(0, 1, 100), generator)
    assert buffer.composition().tolist() == [[8, 0, 9, 3], [5, 5, 5, 5]]


def test_what_stays_of_an_older_task_is_a_subset_with_its_losses() -> None:
    buffer, generator = LossBinnedBuffer(30, bins=3), seeded()
    losses = torch.rand(100, generator=seeded(1))
    populate(buffer, losses, generator)
    before = set(buffer.contents().x.tolist())
    populate(buffer, torch.rand(100, generator=seeded(2)), generator, task=1)
    memory = buffer.contents()
    old = memory.task == 0
    assert set(memory.x[old].tolist()) < before
    assert torch.equal(memory.extras["recorded"][old], losses[memory.x[old]])


@fast
@given(
    losses=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    bins=st.integers(1, 8),
    shift=st.integers(-1000, 1000),
    exponent=st.integers(-30, 30),
)
def test_bins_do_not_depend_on_scale_or_shift(losses: list[int], bins: int, shift: int, exponent: int) -> None:
    values = np.array(losses, dtype=np.float64)
    moved = (values + shift) * 2.0**exponent  # exact in floating point
    plain = loss_bins(values, values.min(), values.max(), bins)
    assert np.array_equal(plain, loss_bins(moved, moved.min(), moved.max(), bins))
    assert plain.min() == 0
    assert plain.max() == (bins - 1 if values.max() > values.min() else 0)


def test_equal_losses_fall_into_the_first_bin() -> None:
    buffer = LossBinnedBuffer(40, bins=4)
    populate(buffer, torch.full((100,), 0.3), seeded())
    assert buffer.composition().tolist() == [[10, 0, 0, 0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_losses_that_are_not_finite_are_refused(bad: float) -> None:
    for mode, fill in (("population", populate), ("running", offer)):
        buffer = LossBinnedBuffer(8, mode=mode)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="finite"):
            fill(buffer, torch.tensor([0.1, bad]), seeded())
        assert len(buffer) == 0


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """One in twenty samples conflicts with the bias and has a high loss: (1000,) bool and (1000,) losses."""
    conflicts = torch.arange(1000) % 20 == 0
    noise = torch.randn(1000, generator=seeded(seed)).abs()
    return conflicts, torch.where(conflicts, 1.5 + 0.5 * noise, 0.1 * noise)


def test_bins_bring_in_the_rare_conflicting_samples_and_one_bin_does_not() -> None:
    shares: dict[str, list[float]] = {"binned": [], "one bin": [], "reservoir": []}
    for seed in range(20):
        conflicts, losses = planted(seed)
        reservoir = ReservoirBuffer(64)
        stream(reservoir, torch.arange(1000), seeded(seed), batch=32)
        binned, one = LossBinnedBuffer(64, bins=4), LossBinnedBuffer(64, bins=1)
        for name, buffer in (("binned", binned), ("one bin", one)):
            populate(buffer, losses, seeded(seed))
            shares[name].append(float(conflicts[buffer.contents().x].float().mean()))
        shares["reservoir"].append(float(conflicts[reservoir.contents().x].float().mean()))
    mean = {name: float(np.mean(values)) for name, values in shares.items()}
    assert mean["binned"] > 5 * mean["reservoir"]
    # 20 buffers of 64 at a share of 0.05: three standard errors are 0.018.
    assert mean["one bin"] == pytest.approx(0.05, abs=0.018)
    assert mean["reservoir"] == pytest.approx(0.05, abs=0.018)


# binned by loss, as in the released code


def test_running_composition_is_that_of_random_overwriting() -> None:
    total, trials = torch.zeros(3), 150
    generator = seeded(4)
    for _ in range(trials):
        buffer = LossBinnedBuffer(64, bins=4, mode="running")
        for task in range(3):
            for _ in range(3):
                offer(buffer, torch.linspace(0, 1, 80), generator, task)
            buffer.end_task()
        total += buffer.contents().task.bincount(minlength=3)
    # Task t inserts 4 x (16 // t) samples; each later one leaves a slot alone with probability 63/64.
    stays = 63 / 64
    second = 64 * (1 - stays**32) * stays**20
    third = 64 * (1 - stays**20)
    assert (total / trials).tolist() == pytest.approx([64 - second - third, second, third], abs=0.7)


def test_running_bins_widen_with_the_range_and_close_when_full() -> None:
    buffer, generator = LossBinnedBuffer(8, bins=4, mode="running"), seeded()
    offer(buffer, torch.zeros(5), generator)
    assert buffer.composition().tolist() == [[2, 0, 0, 0]]
    offer(buffer, torch.tensor([0.0, 4.0, 1.0, 0.9]), generator)
    assert buffer.composition().tolist() == [[2, 1, 0, 1]]
    offer(buffer, torch.tensor([40.0, 4.0, 30.0]), generator)  # now 4.0 is in the first bin, which is full
    assert buffer.composition().tolist() == [[2, 1, 0, 2]]
    assert buffer.contents().x.tolist() == [0, 1, 1, 2, 0]


def test_the_end_of_a_task_resets_counters_and_range() -> None:
    buffer, generator = LossBinnedBuffer(16, bins=2, mode="running"), seeded()
    offer(buffer, torch.tensor([0.0] * 9 + [100.0]), generator)
    assert buffer.composition().tolist() == [[8, 1]]
    buffer.end_task()
    offer(buffer, torch.tensor([5.0] * 9 + [6.0] * 2), generator, task=1)
    assert buffer.composition()[1].tolist() == [4, 2]
    assert len(buffer) == 15


def test_running_mode_takes_a_sample_again() -> None:
    buffer = LossBinnedBuffer(8, bins=2, mode="running")
    for _ in range(3):
        offer(buffer, torch.tensor([0.5]), seeded())
    assert buffer.contents().x.tolist() == [0, 0, 0]


def test_each_mode_has_its_own_calls() -> None:
    with pytest.raises(InputError, match="mode 'running'"):
        offer(LossBinnedBuffer(8), torch.rand(3), seeded())
    with pytest.raises(InputError, match="mode 'population'"):
        populate(LossBinnedBuffer(8, mode="running"), torch.rand(3), seeded())
    with pytest.raises(InputError, match="mode 'running'"):
        LossBinnedBuffer(8).end_task()


def test_a_capacity_that_leaves_a_bin_nothing_is_refused() -> None:
    buffer = LossBinnedBuffer(7, bins=4)
    populate(buffer, torch.rand(20, generator=seeded()), seeded())
    with pytest.raises(InputError, match="at least tasks x bins = 8, got 7"):
        populate(buffer, torch.rand(20, generator=seeded()), seeded())


def test_running_mode_inserts_nothing_once_a_bin_has_no_share_left() -> None:
    buffer, generator = LossBinnedBuffer(7, bins=4, mode="running"), seeded()
    offer(buffer, torch.rand(20, generator=generator), generator)
    before = buffer.contents()
    assert len(before) == 4
    buffer.end_task()
    offer(buffer, torch.rand(20, generator=generator), generator)
    after = buffer.contents()
    assert torch.equal(before.x, after.x)
    buffer.end_task()
    assert buffer.composition().sum(dim=1).tolist() == [4, 0]


# what all of them share


def add_reservoir(buffer: Any, step: int, generator: torch.Generator) -> None:
    y = torch.arange(8) + 8 * step
    buffer.add(torch.full((8, 2), step, dtype=torch.uint8), y, y % 3, generator, {"logits": torch.ones(8, 2) * y[:, None]})


def add_balanced(buffer: Any, step: int, generator: torch.Generator) -> None:
    y = torch.arange(8) + 8 * step
    buffer.add(y.float(), y, y % 3, (y * y) % (2 + step), generator)


def add_population(buffer: Any, step: int, generator: torch.Generator) -> None:
    populate(buffer, torch.rand(30, generator=generator), generator, task=step)


def add_running(buffer: Any, step: int, generator: torch.Generator) -> None:
    offer(buffer, torch.rand(8, generator=generator) / 10 ** (step % 3), generator, task=step // 3)
    if step % 3 == 2:
        buffer.end_task()


@pytest.mark.parametrize(
    ("make", "add"),
    [
        (lambda: ReservoirBuffer(20), add_reservoir),
        (lambda: GroupBalancedBuffer(20), add_balanced),
        (lambda: LossBinnedBuffer(20, 2), add_population),
        (lambda: LossBinnedBuffer(20, 2, "running"), add_running),
    ],
)
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(make: Callable[[], Any], add: Add) -> None:
    for stop in (0, 1, 4):
        straight, before, file = make(), make(), io.BytesIO()
        for step in range(8):
            add(straight, step, seeded(step))
        for step in range(stop):
            add(before, step, seeded(step))
        torch.save(before.state_dict(), file)
        file.seek(0)
        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert len(resumed) == len(before)
        for step in range(stop, 8):
            add(resumed, step, seeded(step))
        first, second = straight.contents(), resumed.contents()
        assert torch.equal(first.x, second.x)
        assert torch.equal(first.y, second.y)
        assert first.extras.keys() == second.extras.keys()
        assert torch.equal(straight.sample(5, seeded()).task, resumed.sample(5, seeded()).task)


def test_a_state_is_a_snapshot_of_the_slots_in_use() -> None:
    buffer = ReservoirBuffer(1000)
    stream(buffer, torch.arange(3), seeded())
    state = buffer.state_dict()
    stream(buffer, torch.arange(50, 60), seeded())
    assert state["columns"]["x"].tolist() == [0, 1, 2]
    assert state["columns"]["x"].untyped_storage().nbytes() == 3 * 8
    with pytest.raises(InputError, match="capacity 5"):
        ReservoirBuffer(5).load_state_dict(state)


@pytest.mark.parametrize("buffer", [ReservoirBuffer(4), GroupBalancedBuffer(4), LossBinnedBuffer(4)])
def test_nothing_can_be_drawn_from_an_empty_buffer(buffer: Any) -> None:
    with pytest.raises(InputError, match="samples"):
        buffer.sample(1, seeded())
    with pytest.raises(InputError, match="samples"):
        buffer.contents()


@pytest.mark.parametrize(
    ("x", "y", "extras", "message"),
    [
        (torch.zeros(3, 2), zeros(4), None, "as many rows"),
        (torch.zeros(0, 2), zeros(0), None, "at least one"),
        (torch.zeros(4, 2), zeros(4), {"logits": torch.zeros(3)}, "as many rows"),
        (torch.zeros(4, 2), zeros(4), {"y": zeros(4)}, "names of extras"),
        (torch.zeros(4, 2), zeros(4), {"_bin": zeros(4)}, "names of extras"),
        (torch.zeros(4, 3), zeros(4), {"logits": torch.zeros(4, 2)}, "shapes stored already"),
        (torch.zeros(4, 2), zeros(4), {"logits": torch.zeros(4, 5)}, "shapes stored already"),
        (torch.zeros(4, 2), zeros(4), None, "shapes stored already"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x: Tensor, y: Tensor, extras: dict[str, Tensor] | None, message: str) -> None:
    buffer = ReservoirBuffer(10)
    buffer.add(torch.zeros(2, 2), zeros(2), zeros(2), seeded(), {"logits": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=message):
        buffer.add(x, y, zeros(len(y)), seeded(), extras)
    assert len(buffer) == 2


def test_a_capacity_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        ReservoirBuffer(0)
    with pytest.raises(InputError, match="bins"):
        LossBinnedBuffer(4, bins=0)


# selection


@fast
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6), keep=st.integers(0, 60))
def test_lowering_is_taking_one_at_a_time_from_the_first_largest(counts: list[int], keep: int) -> None:
    expected = list(counts)
    while sum(expected) > keep:
        expected[expected.index(max(expected))] -= 1
    assert lower_fullest(np.array(counts), keep).tolist() == expected


@fast
@given(
    groups=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    quota=st.lists(st.integers(-1, 6), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_quotas_go_to_the_first_in_order(groups: list[int], quota: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(groups))
    expected, left = [False] * len(groups), list(quota)
    for position in order:
        if left[groups[position]] > 0:
            left[groups[position]] -= 1
            expected[position] = True
    assert within_quota(np.array(groups), np.array(quota), order).tolist() == expected
