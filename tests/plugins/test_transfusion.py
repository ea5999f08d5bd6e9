"""TransFusion on planted releases: each part on does what the thesis says, off it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark import ArrayData, DataExperience, TransportExperience
from shiftproof.plugins.transfusion import (
    FewShot,
    FewShotConfig,
    TransFusion,
    TransFusionConfig,
    few_shots,
    shiftproof_strategies,
)
from tests.planted import QUICK, surroundings
from tests.releases import TASK, alike, answers, drawn, experience, network, noisy, pictures, renumbered

PRESETS = dict(next(spec.presets for spec in shiftproof_strategies() if spec.name == "transfusion"))


def tuned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = noisy(state, 0.2)
    return {name: state[name] if name.startswith("heads.0") else tensor for name, tensor in moved.items()}


@torch.no_grad()
def transported(config: TransFusionConfig, noise: float = 0.0, task: int = TASK) -> torch.Tensor:
    base = drawn(0)
    target, _ = renumbered(base, 1, noise)
    strategy = TransFusion(config)
    strategy.learn(experience(base, tuned(base), target))
    logits: torch.Tensor = strategy.model().eval()(pictures(), task)
    return logits


@pytest.mark.parametrize("preset", ["paper", "released", "shared", "brute-force"])
@pytest.mark.parametrize("task", [0, TASK])
def test_a_renumbered_release_receives_the_whole_fine_tuning(preset: str, task: int) -> None:
    assert alike(answers(tuned(drawn(0)), task), transported(PRESETS[preset], task=task), 1e-4)


@pytest.mark.parametrize("preset", ["no-attention", "no-residual"])
def test_without_matched_heads_or_residuals_it_does_not(preset: str) -> None:
    assert not alike(answers(tuned(drawn(0))), transported(PRESETS[preset]), 0.05)


def test_the_head_alone_is_the_new_release_with_an_aligned_head() -> None:
    base = drawn(0)
    target, units = renumbered(base, 1)
    head = tuned(base)["heads.1.weight"][:, units["backbone.blocks.1.stream"]]
    expected = answers({**target, "heads.1.weight": head, "heads.1.bias": tuned(base)["heads.1.bias"]})
    assert alike(expected, transported(PRESETS["head-only"]))


def test_noise_upon_the_release_does_little_harm() -> None:
    assert alike(answers(tuned(drawn(0))), transported(PRESETS["paper"], noise=0.002), 0.1)


def test_one_alignment_serves_any_number_of_task_vectors() -> None:
    base = drawn(0)
    target, _ = renumbered(base, 1, 0.05)
    strategy = TransFusion(TransFusionConfig())
    strategy.learn(experience(base, tuned(base), target))
    assert strategy.alignment is not None
    first = dict(strategy.alignment.permutations)
    strategy.learn(experience(base, noisy(base, 0.1, seed=20), target))
    assert all(first[name].equal(units) for name, units in strategy.alignment.permutations.items())


def data(count: int = 40) -> DataExperience:
    """Pictures that the fine-tuned source has labelled."""
    x = pictures(count, seed=11)
    y = answers_on(x).argmax(1)
    return DataExperience(0, "task", TASK, ArrayData(x, y))


@torch.no_grad()
def answers_on(x: torch.Tensor) -> torch.Tensor:
    model = network()
    model.load_state_dict(tuned(drawn(0)))
    logits: torch.Tensor = model.eval()(x, TASK)
    return logits


def with_data(target: dict[str, torch.Tensor]) -> TransportExperience:
    base = drawn(0)
    return replace(experience(base, tuned(base), target), data=data())


def test_few_shots_move_coefficients_to_where_the_loss_is_lower(tmp_path: Path) -> None:
    target, _ = renumbered(drawn(0), 1)

    def loss(steps: int) -> float:
        strategy = FewShot(FewShotConfig(alpha=0.0, steps=steps, lr=0.05), surroundings(tmp_path, QUICK))
        strategy.learn(with_data(target))
        with torch.no_grad():
            logits = strategy.model().eval()(data().train.x, TASK)
        return float(torch.nn.functional.cross_entropy(logits, data().train.y))

    assert loss(40) < 0.7 * loss(1)


def test_few_shots_learn_one_coefficient_a_layer(tmp_path: Path) -> None:
    context = surroundings(tmp_path, QUICK)
    strategy = FewShot(FewShotConfig(steps=3), context)
    strategy.learn(with_data(renumbered(drawn(0), 1)[0]))
    assert "backbone.blocks.0.attn.qkv" in strategy.alpha
    assert len(set(strategy.alpha.values())) > 1
    assert context.cost.optimizer_steps == 3


def test_few_shots_without_permutation_scale_tau_as_it_is(tmp_path: Path) -> None:
    strategy = FewShot(FewShotConfig(permute=False, steps=1), surroundings(tmp_path, QUICK))
    strategy.learn(with_data(drawn(1)))
    name, base = "backbone.blocks.0.mlp.fc1.weight", drawn(0)
    part = strategy.alpha["backbone.blocks.0.mlp.fc1"] * (tuned(base)[name] - base[name])
    assert torch.allclose(strategy.model().state_dict()[name], drawn(1)[name] + part, atol=1e-6)


def test_shots_are_drawn_class_by_class_without_replacement() -> None:
    labels = torch.tensor([0] * 5 + [1] * 2 + [3] * 9)
    chosen = few_shots(ArrayData(torch.arange(16.0)[:, None], labels), 4, torch.Generator().manual_seed(0))
    assert torch.bincount(chosen.y).tolist() == [4, 2, 0, 4]
    assert len(chosen.x.unique()) == 10
