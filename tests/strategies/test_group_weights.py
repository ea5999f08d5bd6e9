"""GroupDRO and LfF against closed forms, scipy and autograd."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.signal import lfilter
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies.group_weights import (
    GroupWeights,
    RelativeDifficulty,
    amplified_cross_entropy,
    generalized_cross_entropy,
    group_means,
    relative_difficulty,
)

fast = settings(deadline=None, max_examples=50, derandomize=True)


def started(sizes: list[int], **knobs: Any) -> GroupWeights:
    weights = GroupWeights(**knobs)
    weights.start(torch.tensor(sizes))
    return weights


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    return values.requires_grad_(), torch.randint(0, 4, (20,), generator=generator)


# GroupDRO


def test_group_means_by_hand() -> None:
    means = group_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 2]), 4)
    assert means.tolist() == [1.5, 0.0, 6.0, 0.0]


def test_q_is_the_softmax_of_the_summed_losses() -> None:
    weights = started([5, 5, 5], step=0.3)
    generator = torch.Generator().manual_seed(0)
    total = np.zeros(3)
    for _ in range(20):
        losses, groups = torch.rand(8, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        weights.loss(losses, groups)
        total += [float(losses[groups == group].mean()) if (groups == group).any() else 0.0 for group in range(3)]
    assert weights.q.tolist() == pytest.approx(softmax(0.3 * total).tolist(), rel=1e-5)


def test_the_loss_is_weighted_with_the_q_that_the_batch_has_moved() -> None:
    weights = started([2, 2], step=math.log(2))
    loss = weights.loss(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 0, 1]))
    assert weights.q.tolist() == pytest.approx([1 / 3, 2 / 3])  # 2^1 : 2^2
    assert loss.item() == pytest.approx(1 / 3 + 4 / 3)


def test_the_gradient_is_q_over_the_group_size_in_the_batch() -> None:
    weights = started([4, 4, 4], step=0.5)
    losses = torch.tensor([1.0, 3.0, 2.0, 5.0], requires_grad=True)
    groups = torch.tensor([0, 0, 1, 0])
    weights.loss(losses, groups).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx((weights.q[groups] / torch.tensor([3, 3, 1, 3])).tolist())


@fast
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=12), step=st.floats(1e-4, 10), adjustment=st.floats(0, 10))
def test_q_stays_a_distribution_whatever_the_losses(values: list[float], step: float, adjustment: float) -> None:
    weights = started([7, 1, 30], step=step, adjustment=adjustment)
    for _ in range(3):
        weights.loss(torch.tensor(values), torch.arange(len(values)) % 3)
    assert bool((weights.q >= 0).all())
    assert weights.q.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_worst_group_takes_over() -> None:
    weights = started([90, 10], step=0.05)
    for _ in range(200):
        weights.loss(torch.tensor([0.2, 0.2, 1.5]), torch.tensor([0, 0, 1]))
    assert weights.q[1] > 0.99


def test_a_group_without_samples_in_the_training_set_has_no_weight() -> None:
    weights = started([3, 0, 3], adjustment=2.0)
    assert weights.q.tolist() == pytest.approx([0.5, 0.0, 0.5])
    weights.loss(torch.tensor([1.0, 1.0]), torch.tensor([0, 2]))
    assert weights.q.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_the_adjustment_moves_q_towards_small_groups_and_stays_out_of_the_loss() -> None:
    weights = started([4, 16], step=1.0, adjustment=2.0)
    loss = weights.loss(torch.tensor([1.0, 1.0]), torch.tensor([0, 1]))
    assert weights.q.tolist() == pytest.approx(softmax([1 + 2 / 2, 1 + 2 / 4]).tolist())
    assert loss.item() == pytest.approx(1.0)


def test_the_released_adjustment_changes_the_value_of_the_loss_and_not_its_gradient() -> None:
    gradients, values = [], []
    for adjust_loss in (False, True):
        weights = started([4, 16], step=1.0, adjustment=2.0, adjust_loss=adjust_loss)
        losses = torch.tensor([1.0, 3.0], requires_grad=True)
        loss = weights.loss(losses, torch.tensor([0, 1]))
        loss.backward()
        assert losses.grad is not None
        gradients.append(losses.grad)
        values.append(loss.item())
    assert torch.equal(gradients[0], gradients[1])
    q = softmax([1 + 1, 3 + 0.5])
    assert values[1] - values[0] == pytest.approx(q[0] * 1 + q[1] * 0.5, rel=1e-5)


def test_equal_groups_are_plain_risk_minimization() -> None:
    weights = started([10, 10], step=1e-9)
    losses = torch.rand(8, generator=torch.Generator().manual_seed(0))
    assert weights.loss(losses, torch.arange(8) % 2).item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1]])
def test_group_sizes_without_a_sample_are_refused(sizes: list[int]) -> None:
    with pytest.raises(InputError, match="group sizes"):
        started(sizes)


@pytest.mark.parametrize("knobs", [{"step": 0.0}, {"adjustment": -1.0}])
def test_knobs_of_groups_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected step"):
        GroupWeights(**knobs)  # type: ignore[arg-type]


# generalized cross-entropy


def test_generalized_cross_entropy_is_its_closed_form() -> None:
    values, y = logits()
    p = softmax(values.detach().numpy(), axis=1)[np.arange(20), y.numpy()]
    assert generalized_cross_entropy(values, y, 0.7).tolist() == pytest.approx(((1 - p**0.7) / 0.7).tolist())


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_its_gradient_is_p_to_the_q_times_that_of_cross_entropy(q: float) -> None:
    values, y = logits()
    (general,) = torch.autograd.grad(generalized_cross_entropy(values, y, q).sum(), values)
    (plain,) = torch.autograd.grad(F.cross_entropy(values, y, reduction="sum"), values)
    p = values.detach().softmax(1).gather(1, y[:, None])
    assert torch.allclose(general, p**q * plain)


def test_the_released_gradient_is_q_times_as_large() -> None:
    values, y = logits()
    (released,) = torch.autograd.grad(amplified_cross_entropy(values, y, 0.7).sum(), values)
    (general,) = torch.autograd.grad(generalized_cross_entropy(values, y, 0.7).sum(), values)
    assert torch.allclose(released, 0.7 * general)
    assert not torch.allclose(amplified_cross_entropy(values, y), generalized_cross_entropy(values, y))


def test_it_goes_from_cross_entropy_to_absolute_error() -> None:
    values, y = logits()
    assert torch.allclose(generalized_cross_entropy(values, y, 1e-7), F.cross_entropy(values, y, reduction="none"), rtol=1e-5)
    p = values.softmax(1).gather(1, y[:, None]).squeeze(1)
    assert torch.allclose(generalized_cross_entropy(values, y, 1.0), 1 - p)


def test_extreme_logits_keep_loss_and_gradient_finite() -> None:
    values = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    losses = generalized_cross_entropy(values, torch.tensor([0, 0]))
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert losses.tolist() == pytest.approx([0.0, 1 / 0.7])
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("q", [0.0, 1.5])
def test_q_out_of_range_is_refused(q: float) -> None:
    values, y = logits()
    for loss in (generalized_cross_entropy, amplified_cross_entropy):
        with pytest.raises(InputError, match="q in"):
            loss(values, y, q)


# relative difficulty


def test_difficulty_is_high_where_only_the_biased_model_fails() -> None:
    weight = relative_difficulty(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 0.0]))
    assert weight.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("corrected", [True, False])
def test_running_means_are_those_of_a_recursive_filter(corrected: bool) -> None:
    losses = np.random.default_rng(0).random((2, 15))
    difficulty = RelativeDifficulty(alpha=0.7, corrected=corrected)
    difficulty.start(torch.tensor([0, 1]))
    for biased, debiased in losses.T:
        difficulty.update(torch.tensor([1]), torch.tensor([biased]), torch.tensor([debiased]))
    # The first loss itself where corrected: the filter starts as if it had been there forever.
    begin = 0.7 * losses[:, :1] if corrected else np.zeros((2, 1))
    expected = lfilter([0.3], [1, -0.7], losses, zi=begin)[0][:, -1]
    assert difficulty.state_dict()["means"][:, 1].tolist() == pytest.approx(expected.tolist())
    assert difficulty.state_dict()["means"][:, 0].tolist() == [0.0, 0.0]


def test_weights_by_hand_with_each_mean_over_the_largest_of_its_class() -> None:
    difficulty = RelativeDifficulty()
    difficulty.start(torch.tensor([0, 0, 1, 1]))
    biased, debiased = torch.tensor([4.0, 1.0, 0.2, 0.1]), torch.tensor([1.0, 2.0, 10.0, 40.0])
    difficulty.update(torch.arange(4), biased, debiased)
    relative = [(1.0, 0.5), (0.25, 1.0), (1.0, 0.25), (0.5, 1.0)]
    assert difficulty.of(torch.arange(4)).tolist() == pytest.approx([b / (b + d) for b, d in relative])


def test_the_scale_of_losses_of_a_class_does_not_matter() -> None:
    y = torch.arange(30) % 3
    losses = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1e-2, 1.0, 30.0], [5.0, 0.3, 1.0]])[:, y]
    plain, scaled = RelativeDifficulty(), RelativeDifficulty()
    for difficulty, values in ((plain, losses), (scaled, scale * losses)):
        difficulty.start(y)
        difficulty.update(torch.arange(30), values[0], values[1])
    assert torch.allclose(plain.of(torch.arange(30)), scaled.of(torch.arange(30)), atol=1e-5)


def test_weights_lie_between_zero_and_one_also_before_any_loss() -> None:
    difficulty = RelativeDifficulty()
    difficulty.start(torch.tensor([0, 2, 2]))
    assert difficulty.of(torch.arange(3)).tolist() == [0.0, 0.0, 0.0]
    difficulty.update(torch.tensor([1]), torch.tensor([3.0], requires_grad=True), torch.tensor([0.0]))
    weight = difficulty.of(torch.arange(3))
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        RelativeDifficulty(alpha=alpha)


@pytest.mark.parametrize("y", [torch.zeros(0, dtype=torch.int64), torch.tensor([-1])])
def test_targets_that_are_not_classes_are_refused(y: Tensor) -> None:
    with pytest.raises(InputError, match="targets"):
        RelativeDifficulty().start(y)


# state


def test_loaded_states_go_on_as_if_nothing_had_happened() -> None:
    groups, difficulty = started([3, 7], adjustment=1.0), RelativeDifficulty()
    difficulty.start(torch.arange(10) % 2)
    twins = GroupWeights(adjustment=1.0), RelativeDifficulty()
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        index = torch.randperm(10, generator=generator)[:4]
        losses = torch.rand(2, 4, generator=generator)
        active = [(groups, difficulty)] + ([twins] if number > 2 else [])
        values = [one.loss(losses[0], index % 2).item() for one, _ in active]
        for _, two in active:
            two.update(index, losses[0], losses[1])
        assert len(set(values)) == 1
        if number == 2:
            file = io.BytesIO()
            torch.save([groups.state_dict(), difficulty.state_dict()], file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            twins[0].load_state_dict(states[0])
            twins[1].load_state_dict(states[1])
    assert torch.equal(groups.q, twins[0].q)
    assert torch.equal(difficulty.of(torch.arange(10)), twins[1].of(torch.arange(10)))
