"""Accuracy and loss. Oracles: scikit-learn, the harness's own counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import log_loss

from shiftproof.benchmark import EvalSet, ExpertExperience
from shiftproof.benchmark.analysis.measuring import measure

CPU = torch.device("cpu")
Product = Callable[[str, float, float], ExpertExperience]


def test_loss_is_scikit_learns_and_accuracy_the_share_of_right_answers(
    product_expert: Product, evals: tuple[EvalSet, ...]
) -> None:
    model = product_expert("a", 1.0, 0.7).expert
    found = measure(model, evals, CPU)
    for eval_set, loss in zip(evals, found.losses, strict=True):
        ((_, data),) = eval_set.parts
        probabilities = model(data.x, 0).detach().double().softmax(1).numpy()
        assert loss == pytest.approx(log_loss(data.y.numpy(), probabilities), abs=1e-6)
    assert found.accuracies == (1.0, 0.75)
    assert found.accuracy == pytest.approx(0.875)
    assert found.loss == pytest.approx(sum(found.losses) / 2)


def test_accuracy_is_the_mean_over_groups_as_on_a_board(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    groups = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])  # the two that are wrong, and the rest
    noisy = replace(evals[1], groups=groups, group_names=("wrong", "right", "nobody"))
    assert measure(product_expert("a", 1.0, 1.0).expert, [noisy], CPU).accuracies == (0.5,)


def test_parts_and_batches_belong_to_one_set(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    """A set of two parts, one of them longer than a batch, has the loss of the samples together."""
    data = evals[1].parts[0][1]
    long = replace(data, x=data.x.repeat(100, 1), y=data.y.repeat(100))
    joined = EvalSet("both", ((0, evals[0].parts[0][1]), (0, long)), torch.zeros(808, dtype=torch.int64), ("all",))
    model = product_expert("a", 1.0, 1.0).expert
    clean, noisy = measure(model, evals, CPU).losses
    assert measure(model, [joined], CPU).losses[0] == pytest.approx((8 * clean + 800 * noisy) / 808)


def test_logits_that_are_not_finite_give_nan_and_nothing_stays_behind(
    product_expert: Product, evals: tuple[EvalSet, ...]
) -> None:
    model = product_expert("a", float("inf"), 0.0).expert
    found = measure(model, evals, CPU)
    assert all(map(math.isnan, (*found.accuracies, *found.losses, found.accuracy)))
    assert not model._forward_hooks
