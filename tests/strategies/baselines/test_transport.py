"""Transports on planted releases: what is the same function in another order receives the whole fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.strategies.baselines.transport import (
    GitRebasin,
    GitRebasinConfig,
    OptimalTransport,
    ReferenceConfig,
    SourceExpert,
    TargetBase,
    Vanilla,
)
from shiftproof.strategies.transport import TransportConfig
from tests.releases import TASK, alike, answers, drawn, experience, network, noisy, pictures, renumbered, whole


def tuned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fine-tuning that changes everything but head 0."""
    return {
        name: t if name.startswith("heads.0") else t + noise
        for (name, t), noise in zip(state.items(), noisy({n: 0 * t for n, t in state.items()}, 0.2).values(), strict=True)
    }


@torch.no_grad()
def after(strategy: Any, base: dict[str, torch.Tensor], target: dict[str, torch.Tensor], task: int = TASK) -> torch.Tensor:
    strategy.learn(experience(base, tuned(base), target))
    logits: torch.Tensor = strategy.model().eval()(pictures(), task)
    return logits


@pytest.mark.parametrize(
    "strategy", [GitRebasin(GitRebasinConfig()), OptimalTransport(TransportConfig())], ids=["git-rebasin", "ot"]
)
def test_a_renumbered_release_receives_the_whole_fine_tuning(strategy: Any) -> None:
    base = drawn(0)
    target, _ = renumbered(base, 1)
    for task in (0, TASK):
        assert alike(answers(tuned(base), task), after(strategy, base, target, task), 1e-4)


def test_tau_as_it_is_does_not_fit_a_renumbered_release_and_fits_the_same_one() -> None:
    base = drawn(0)
    target, _ = renumbered(base, 1)
    assert not alike(answers(tuned(base)), after(Vanilla(TransportConfig()), base, target), 0.05)
    assert alike(answers(tuned(base)), after(Vanilla(TransportConfig()), base, base), 1e-4)


def test_the_scale_is_that_of_the_task_vector() -> None:
    base, target = drawn(0), drawn(1)
    for alpha in (0.0, 0.5):
        strategy = Vanilla(TransportConfig(alpha=alpha))
        after(strategy, base, target)
        name = "backbone.blocks.1.mlp.fc1.weight"
        expected = target[name] + alpha * (tuned(base)[name] - base[name])
        assert torch.allclose(strategy.model().state_dict()[name], expected, atol=1e-6)


def test_git_rebasin_mixes_heads_of_releases_that_are_not_alike() -> None:
    own = whole().restricted(frozenset(n for n in drawn(0) if not n.startswith("heads.1")))
    found = GitRebasin(GitRebasinConfig()).align(drawn(0), drawn(1), own).permutations["backbone.blocks.0.attention"]
    owners = found.reshape(4, 4) // 4
    assert not bool((owners == owners[:, :1]).all())


def test_optimal_transport_is_the_plan_of_least_cost_between_normalized_rows() -> None:
    import scipy.optimize

    spec = derive_model(network())
    source, target = drawn(0), drawn(1)
    found = OptimalTransport(TransportConfig()).align(source, target, spec).permutations["backbone.stream"]
    cost = torch.zeros(16, 16)
    writers = ["patch_embed", *(f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.proj", "mlp.fc2"))]
    for name in writers:
        rows = [F.normalize(state[f"backbone.{name}.weight"].reshape(16, -1), dim=1) for state in (target, source)]
        cost += torch.cdist(*rows).square()  # what they read is not permuted yet: the stream comes first
    assert found.tolist() == scipy.optimize.linear_sum_assignment(cost.numpy())[1].tolist()


def test_references_are_the_new_release_with_the_tuned_head_and_the_tuned_old_one() -> None:
    base, target = drawn(0), drawn(1)
    head = {name: tensor for name, tensor in tuned(base).items() if name.startswith("heads.1")}
    assert alike(answers({**target, **head}), after(TargetBase(ReferenceConfig(), None), base, target))  # type: ignore[arg-type]
    assert alike(answers(tuned(base)), after(SourceExpert(ReferenceConfig(), None), base, target))  # type: ignore[arg-type]


def test_nothing_that_was_given_is_altered() -> None:
    given = experience(drawn(0), tuned(drawn(0)), drawn(1))
    models = (given.base, given.expert, given.target_base)
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models if model is not None]
    GitRebasin(GitRebasinConfig()).learn(given)
    for model, state in zip(models, before, strict=True):
        assert model is not None
        assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
