"""Cluster weights against cases worked out by hand, an O(N) recomputation, and invariances."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies.cluster_weights import (
    ClusterWeights,
    cluster_error,
    exponential_blend,
    over_batch_mean,
    raw_weights,
)


def made(cluster: list[int] | Tensor, **knobs: Any) -> ClusterWeights:
    weights = ClusterWeights(**knobs)
    weights.start(torch.as_tensor(cluster))
    return weights


def step(weights: ClusterWeights, index: list[int], target: list[float], pseudo: list[float] | None, epoch: int) -> list[float]:
    """Read, record, and give what was read."""
    rows = torch.tensor(index)
    read = weights.of(rows, epoch)
    weights.update(rows, torch.tensor(target), None if pseudo is None else torch.tensor(pseudo), epoch)
    return [float(one) for one in read]


def read(weights: ClusterWeights, index: list[int], epoch: int) -> list[float]:
    return [float(one) for one in weights.of(torch.tensor(index), epoch)]


# the rule of the released LwS


def test_lws_rule_by_hand() -> None:
    weights = made([0, 0, 0, 1], gamma=0.5)
    # A_0 = 1 + 0.5 * 2 = 2 and A_1 = 3 + 0.5 * 4 = 5, so raw = (4/3)(2/7), 4 (5/7) = 8/21, 60/21, batch mean 34/21
    assert step(weights, [0, 3], [1.0, 3.0], [2.0, 4.0], epoch=0) == [1.0, 1.0]
    assert read(weights, [0, 1, 2, 3], 0) == pytest.approx([8 / 34, 1, 1, 60 / 34])
    # Epoch 1, one cluster in the batch, so fresh weights are 1; 0.7 old + 0.3 fresh, not normalised again.
    assert step(weights, [0, 1], [3.0, 1.0], [4.0, 2.0], epoch=1) == pytest.approx([8 / 34, 1.0])
    assert read(weights, [0, 1, 2, 3], 1) == pytest.approx([0.7 * 8 / 34 + 0.3, 1, 1, 60 / 34])
    # By now the records of cluster 0 are (5, 1) and (4, 2): A_0 = 3 + 0.5 * 3 = 4.5. A_1 = 6, its pseudo loss being 0.
    step(weights, [0, 3], [5.0, 6.0], [4.0, 0.0], epoch=2)
    raw = [4 / 3 * 4.5 / 10.5, 4 * 6 / 10.5]
    fresh = [2 * one / sum(raw) for one in raw]
    old = [0.7 * 8 / 34 + 0.3, 60 / 34]
    expected = [0.7 * before + 0.3 * now for before, now in zip(old, fresh, strict=True)]
    assert read(weights, [0, 3], 2) == pytest.approx(expected)


def test_the_first_epoch_takes_fresh_weights_as_they_are() -> None:
    weights = made([0, 1], gamma=0)
    step(weights, [0, 1], [1.0, 3.0], None, epoch=0)
    step(weights, [0, 1], [3.0, 1.0], None, epoch=0)
    assert read(weights, [0, 1], 0) == pytest.approx([1.5, 0.5])


def test_a_loss_of_zero_is_taken_for_unseen() -> None:
    plain, strict = (made([0, 0, 1], gamma=0, zero_is_unseen=flag, momentum=1, applied="current") for flag in (True, False))
    for weights in (plain, strict):
        step(weights, [0, 1, 2], [0.0, 2.0, 2.0], None, epoch=0)
    # A_0 is 2 or (0 + 2) / 2; raw is 1.5 A_0 : 3 A_1
    assert read(plain, [0, 2], 0) == pytest.approx([2 / 3, 4 / 3])
    assert read(strict, [0, 2], 0) == pytest.approx([2 * 1.5 / 7.5, 2 * 6 / 7.5])


def test_a_cluster_that_was_not_seen_has_no_error_and_no_share() -> None:
    weights = made([0, 1, 2, 2], gamma=0, momentum=1, applied="current")
    step(weights, [0, 1], [1.0, 1.0], None, epoch=0)
    assert read(weights, [0, 1, 2], 0) == pytest.approx([1.5, 1.5, 0.0])


def test_weights_are_ones_before_anything_is_recorded_or_where_all_losses_are_zero() -> None:
    weights = made([0, 1, 1], gamma=0)
    assert step(weights, [0, 1], [0.0, 0.0], None, epoch=0) == [1.0, 1.0]
    assert all(math.isfinite(one) and one > 0 for one in read(weights, [0, 1, 2], 0))


def test_gradients_do_not_pass_and_the_type_is_float32() -> None:
    weights = made([0, 1])
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    weights.update(torch.tensor([0, 1]), 2 * losses, losses, 0)
    weight = weights.of(torch.tensor([0, 1]), 0)
    assert weight.dtype == torch.float32
    assert not weight.requires_grad


def test_half_precision_losses_are_recorded() -> None:
    weights = made([0, 1], gamma=0)
    weights.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0], dtype=torch.bfloat16), None, 0)
    assert read(weights, [0, 1], 0) == pytest.approx([0.5, 1.5])


# incremental sums


def reference_weights(cluster: Tensor, target: Tensor, pseudo: Tensor, index: Tensor, gamma: float) -> Tensor:
    """Fresh weights of a batch from the recorded losses of everybody, NaN for nobody's: loops and masks."""
    error = []
    for one in range(int(cluster.max()) + 1):
        total = 0.0
        for losses, factor in ((target, 1.0), (pseudo, gamma)):
            members = losses[(cluster == one) & (losses > 0)]
            total += factor * float(members.double().mean()) if len(members) else 0.0
        error.append(total)
    share = torch.tensor(error, dtype=torch.float64) / sum(error)
    raw = (len(cluster) / cluster.bincount() * share)[cluster[index]]
    return raw / raw.mean()


def test_sums_kept_by_differences_equal_a_recomputation_also_with_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(0, 6, (80,), generator=generator)
    weights = made(cluster, gamma=0.7, momentum=1)
    target, pseudo = torch.full((80,), torch.nan), torch.full((80,), torch.nan)
    for _ in range(400):
        index = torch.randint(0, 80, (16,), generator=generator)  # with replacement
        losses = (torch.rand(2, 16, generator=generator) - 0.2).clamp(min=0) * 10 ** torch.randint(
            -3, 4, (1,), generator=generator
        ).item()
        weights.update(index, losses[0], losses[1], 0)
        for row, place in enumerate(index.tolist()):
            target[place], pseudo[place] = losses[0, row], losses[1, row]
        expected = reference_weights(cluster, target, pseudo, index, 0.7)
        assert torch.allclose(weights.of(index, 0).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mean_over_nobody_is_exactly_zero() -> None:
    weights = made([0, 0, 1], gamma=0, momentum=1, applied="current")
    for value in (0.1, 0.2, 0.3, 0.0):  # 0 takes the last member out; the differences need not cancel exactly
        step(weights, [0, 1, 2], [value, value, 1.0], None, epoch=0)
    assert read(weights, [0, 2], 0) == [0.0, 2.0]


# invariances


def run(weights: ClusterWeights, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    for epoch in range(3):
        for index in torch.randperm(40, generator=generator).split(8):
            losses = scale * torch.rand(2, 8, generator=generator)
            weights.update(index, losses[0], losses[1], epoch)
    return weights.of(torch.arange(40), 3)


RULES: list[Callable[[], ClusterWeights]] = [
    ClusterWeights,
    lambda: ClusterWeights(state="cluster"),
    lambda: ClusterWeights(applied="current"),
    ClusterWeights.bpa_released,
]


@pytest.mark.parametrize("rule", RULES)
def test_names_of_clusters_do_not_matter(rule: Callable[[], ClusterWeights]) -> None:
    cluster = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(1))
    plain, renamed = rule(), rule()
    plain.start(cluster)
    renamed.start(torch.tensor([6, 0, 4, 2, 1])[cluster])  # 3 and 5 are nobody's
    assert torch.allclose(run(plain), run(renamed), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-4, 37.0])
def test_the_scale_of_losses_does_not_matter(rule: Callable[[], ClusterWeights], scale: float) -> None:
    cluster = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(1))
    plain, scaled = rule(), rule()
    plain.start(cluster)
    scaled.start(cluster)
    assert torch.allclose(run(plain), run(scaled, scale), atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_repeating_the_training_set_does_not_matter(rule: Callable[[], ClusterWeights]) -> None:
    cluster = torch.tensor([0, 0, 0, 1, 1, 2])
    once, twice = rule(), rule()
    once.start(cluster)
    twice.start(cluster.repeat(2))
    losses = torch.tensor([1.0, 2.0, 3.0, 1.5, 0.5, 4.0])
    for epoch in range(2):
        once.update(torch.arange(6), losses, losses, epoch)
        twice.update(torch.arange(12), losses.repeat(2), losses.repeat(2), epoch)
    assert torch.allclose(once.of(torch.arange(6), 2), twice.of(torch.arange(12), 2)[:6])


def test_rare_and_hard_clusters_weigh_more() -> None:
    weights = made([0] * 8 + [1] * 2, gamma=0, momentum=1, applied="current")
    step(weights, list(range(10)), [0.1] * 8 + [0.9] * 2, None, epoch=0)
    common, rare = read(weights, [0, 9], 1)
    assert rare / common == pytest.approx(4 * 9)


# momentum of clusters


def test_momentum_of_clusters_by_hand() -> None:
    weights = made([0, 0, 1], gamma=0, state="cluster", momentum=0.25)
    assert step(weights, [0, 2], [1.0, 3.0], None, epoch=0) == [1.0, 1.0]
    # v = (3/2)(1/4), 3 (3/4) = 0.375, 2.25
    assert read(weights, [0, 2], 0) == pytest.approx([2 * 0.375 / 2.625, 2 * 2.25 / 2.625])
    step(weights, [1], [3.0], None, epoch=1)  # A = 2, 3: fresh = 1.5 * 0.4, 3 * 0.6 = 0.6, 1.8
    v = [0.75 * 0.375 + 0.25 * 0.6, 0.75 * 2.25 + 0.25 * 1.8]
    assert read(weights, [0, 1, 2], 1) == pytest.approx([3 * one / (2 * v[0] + v[1]) for one in (v[0], v[0], v[1])])


def test_a_cluster_that_was_not_seen_keeps_its_weight_under_momentum_of_clusters() -> None:
    weights = made([0, 1, 1], gamma=0, state="cluster")
    step(weights, [0], [2.0], None, epoch=0)  # v = 3, 1
    assert read(weights, [0, 1], 0) == pytest.approx([1.5, 0.5])


# BPA


def test_bpa_without_momentum_is_eq_4_5_over_the_batch_mean() -> None:
    cluster = torch.tensor([0, 0, 0, 1, 1, 2])
    losses = torch.tensor([1.0, 2.0, 3.0, 1.5, 0.5, 4.0])
    weights = made(cluster, gamma=0, momentum=1, applied="current")
    weights.update(torch.arange(6), losses, None, 0)
    printed = torch.tensor([2.0, 1.0, 4.0]) / torch.tensor([3, 2, 1])  # mean loss / N_c
    index = torch.tensor([5, 0, 3])
    expected = printed[cluster[index]] / printed[cluster[index]].mean()
    assert torch.allclose(weights.of(index, 7), expected)


def test_current_weights_use_what_was_recorded_before_the_step_and_stored_ones_the_last_visit() -> None:
    current, stored = (made([0, 1, 1], gamma=0, momentum=1, applied=applied) for applied in ("current", "stored"))
    for weights in (current, stored):
        assert step(weights, [0, 1], [1.0, 1.0], None, epoch=0) == (
            [1.0, 1.0] if weights is stored else pytest.approx([4 / 3, 2 / 3])
        )
        step(weights, [0, 2], [1.0, 3.0], None, epoch=0)  # A = 1, 2
    assert read(current, [0, 1], 0) == pytest.approx([1.0, 1.0])
    assert read(stored, [0, 1], 0) == pytest.approx([1.0, 2 / 3])  # 1 since the second step, 2 of [4/3, 2/3] since the first


def test_current_weights_with_momentum_blend_with_the_weight_applied_last() -> None:
    weights = made([0, 1], gamma=0, momentum=0.5, applied="current")
    step(weights, [0, 1], [1.0, 3.0], None, epoch=0)
    assert step(weights, [0, 1], [3.0, 1.0], None, epoch=0) == pytest.approx([0.5, 1.5])
    assert step(weights, [0, 1], [1.0, 1.0], None, epoch=1) == pytest.approx([0.5 * 0.5 + 0.5 * 1.5, 1.0])
    assert read(weights, [0, 1], 1) == pytest.approx([1.0, 1.0])


def blended(raw: list[float]) -> list[float]:
    mean = sum(raw) / len(raw)
    curved = [one / mean * math.exp(0.05 * one / mean) for one in raw]
    return [one * len(raw) / sum(curved) for one in curved]


def test_released_bpa_uses_sizes_until_everybody_was_seen() -> None:
    released = ClusterWeights.bpa_released()
    released.start(torch.tensor([0, 0, 0, 1]))
    assert step(released, [0, 3], [1.0, 9.0], None, epoch=0) == pytest.approx(blended([4 / 3, 4]))
    assert step(released, [1, 3], [1.0, 9.0], None, epoch=0) == pytest.approx(blended([4 / 3, 4]))
    assert step(released, [2, 2], [1.0, 1.0], None, epoch=0) == pytest.approx([1.0, 1.0])
    released.end_epoch(0)
    assert read(released, [0, 3], 1) == pytest.approx(blended([4 / 3 * 0.1, 4 * 0.9]))


def test_seeing_a_sample_again_does_not_stand_for_seeing_another() -> None:
    weights = made([0, 0, 0, 1], gamma=0, momentum=1, applied="current", sizes_until_seen=True)
    for _ in range(4):
        assert step(weights, [0, 3], [1.0, 9.0], None, epoch=0) == pytest.approx([0.5, 1.5])
    step(weights, [1, 2], [1.0, 1.0], None, epoch=0)
    assert read(weights, [0, 3], 0) == pytest.approx([2 / 28, 54 / 28])


def test_sizes_count_from_the_first_step_under_momentum_of_clusters() -> None:
    weights = made([0, 0, 0, 1], gamma=0, state="cluster", sizes_until_seen=True)
    assert step(weights, [0, 3], [1.0, 9.0], None, epoch=0) == pytest.approx([0.5, 1.5])
    assert read(weights, [0, 3], 0) == pytest.approx([0.5, 1.5])


def test_released_bpa_refreshes_every_ten_steps_and_at_the_end_of_an_epoch() -> None:
    released = ClusterWeights.bpa_released()
    released.start(torch.tensor([0, 1]))
    start = read(released, [0, 1], 0)
    assert start == pytest.approx([1.0, 1.0])
    for number in range(9):
        step(released, [0, 1], [1.0, 3.0], None, epoch=0)
        assert read(released, [0, 1], 0) == pytest.approx([1.0, 1.0]), number
    step(released, [0, 1], [1.0, 3.0], None, epoch=0)
    tenth = pytest.approx(blended([0.25, 0.75]))
    assert read(released, [0, 1], 0) == tenth
    step(released, [0, 1], [3.0, 1.0], None, epoch=0)
    assert read(released, [0, 1], 0) == tenth
    released.end_epoch(0)
    assert read(released, [0, 1], 1) == pytest.approx(blended([0.75, 0.25]))
    for _ in range(9):
        step(released, [0, 1], [1.0, 1.0], None, epoch=1)
    assert read(released, [0, 1], 1) == pytest.approx(blended([0.75, 0.25]))
    step(released, [0, 1], [1.0, 1.0], None, epoch=1)
    assert read(released, [0, 1], 1) == pytest.approx([1.0, 1.0])


# pure functions


def test_error_and_raw_weights_by_hand() -> None:
    sums, counts = np.array([[6.0, 8.0], [1e-17, 0.0]]), np.array([[3.0, 2.0], [0.0, 0.0]])
    assert cluster_error(sums, counts, 0.5).tolist() == [4.0, 0.0]
    assert raw_weights(np.array([4.0, 2.0]), np.array([3.0, 1.0])).tolist() == [3.0, 0.5]
    assert raw_weights(np.array([4.0, 2.0]), np.zeros(2)).tolist() == [4.0, 2.0]


def test_the_exponential_blend_by_hand() -> None:
    assert exponential_blend(np.array([1.0, 3.0])).tolist() == pytest.approx(
        [2 / (1 + 3 * math.exp(0.1)), 6 * math.exp(0.1) / (1 + 3 * math.exp(0.1))]
    )
    assert over_batch_mean(np.array([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert over_batch_mean(np.zeros(2)).tolist() == [1.0, 1.0]


# state and input


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(rule: Callable[[], ClusterWeights]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randperm(20, generator=generator)[:6], torch.rand(2, 6, generator=generator)) for _ in range(30)]
    straight, resumed = rule(), rule()
    straight.start(torch.arange(20) % 3)
    for number, (index, losses) in enumerate(batches):
        straight.update(index, losses[0], losses[1], number // 10)
        if number == 12:
            file = io.BytesIO()
            torch.save(straight.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        elif number > 12:
            resumed.update(index, losses[0], losses[1], number // 10)
    assert torch.equal(straight.of(torch.arange(20), 3), resumed.of(torch.arange(20), 3))


def test_a_start_forgets() -> None:
    weights = made([0, 1])
    step(weights, [0, 1], [1.0, 5.0], [1.0, 1.0], epoch=0)
    weights.start(torch.tensor([0, 1, 1]))
    assert read(weights, [0, 1, 2], 0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "knobs",
    [{"gamma": -1.0}, {"momentum": 0.0}, {"momentum": 1.1}, {"refresh_every": 0}, {"state": "both"}, {"applied": "later"}],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        ClusterWeights(**knobs)


@pytest.mark.parametrize(
    "cluster", [torch.zeros(0, dtype=torch.int64), torch.tensor([0, -1]), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_clusters_that_are_not_ids_are_refused(cluster: Tensor) -> None:
    with pytest.raises(InputError, match="cluster ids"):
        ClusterWeights().start(cluster)
