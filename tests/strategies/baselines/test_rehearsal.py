"""Replay against forgetting, ER-ACE against interference, DER++ against drifting logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, Recipe
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.baselines.rehearsal import (
    AsymmetricReplay,
    DarkReplay,
    DarkReplayConfig,
    ExperienceReplay,
    ReplayConfig,
)
from tests.planted import QUICK, SEEDS, Split, accuracy, contradiction, directions, surroundings, trained

STILL = Recipe(epochs=1, batch_size=20, lr=1e-30, momentum=0.0, schedule="constant")  # learns nothing, buffers everything
GENTLE = Recipe(epochs=2, batch_size=10, lr=0.1, momentum=0.0, schedule="constant")


def after_contradiction(kind: Any, config: Any, folder: Path, seed: int) -> tuple[Any, Split]:
    """The strategy after two tasks that contradict each other, and the first of them."""
    first, second = contradiction(seed)
    context = surroundings(folder, QUICK, hidden=32, seed=seed)
    return trained(kind, config, context, [first.experience(0), second.experience(1)]), first


def batch_of(split: Split, rows: Tensor) -> Batch:
    return Batch(split.x[rows], split.y[rows], rows, torch.zeros_like(rows))


# er


@pytest.mark.parametrize("seed", SEEDS)
def test_replay_remembers_a_contradicted_task(seed: int, tmp_path: Path) -> None:
    strategy, first = after_contradiction(ExperienceReplay, ReplayConfig(buffer_size=40), tmp_path, seed)
    assert accuracy(strategy.model(), first) > 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_a_buffer_of_one_sample_does_not_remember(seed: int, tmp_path: Path) -> None:
    strategy, first = after_contradiction(ExperienceReplay, ReplayConfig(buffer_size=1), tmp_path, seed)
    assert accuracy(strategy.model(), first) < 0.7


def test_the_buffer_holds_inputs_as_the_experience_stores_them(tmp_path: Path) -> None:
    strategy, first = after_contradiction(ExperienceReplay, ReplayConfig(buffer_size=400), tmp_path, 0)
    memory = strategy.buffer.contents()
    stored = memory.x[memory.x[:, 1] < 0]
    assert len(stored) > 0
    assert (stored[:, None] == first.x).all(dim=2).any(dim=1).all()


@pytest.mark.parametrize(("replay_size", "drawn"), [(0, 20), (3, 3)])
def test_replay_size_is_what_a_step_draws_and_0_is_the_batch_size(replay_size: int, drawn: int, tmp_path: Path) -> None:
    config = ReplayConfig(buffer_size=40, replay_size=replay_size)
    strategy, _ = after_contradiction(ExperienceReplay, config, tmp_path, 0)
    assert len(strategy.draw("replay")) == drawn


# er-ace


def test_only_the_classes_of_the_batch_compete_on_the_stream(tmp_path: Path) -> None:
    split, rows = directions(0, (2, 5)), torch.arange(0, 100, 10)
    strategy = AsymmetricReplay(ReplayConfig(), surroundings(tmp_path, STILL, inputs=8, heads={0: 8}))
    logits = strategy.net(split.x[rows], 0)[:, [2, 5]].detach()
    expected = log_loss(split.y[rows], logits.double().softmax(1), labels=[2, 5])
    assert strategy.loss(batch_of(split, rows)).item() == pytest.approx(expected, rel=1e-5)


def test_rows_of_absent_classes_get_no_gradient_from_the_stream_and_with_plain_replay_they_do(tmp_path: Path) -> None:
    split, rows = directions(0, (2, 3)), torch.arange(0, 100, 10)
    reached = {}
    for kind in (AsymmetricReplay, ExperienceReplay):
        strategy = kind(ReplayConfig(), surroundings(tmp_path, STILL, inputs=8, heads={0: 4}))
        strategy.loss(batch_of(split, rows)).backward()
        gradient = strategy.net.head(0).weight.grad
        assert gradient is not None
        reached[kind] = gradient.abs().sum(dim=1) > 0
    assert reached[AsymmetricReplay].tolist() == [False, False, True, True]
    assert reached[ExperienceReplay].tolist() == [True, True, True, True]


def test_old_classes_of_a_shared_head_suffer_less_than_under_plain_replay(tmp_path: Path) -> None:
    """The first steps on new classes, with one sample a class in memory: the scores of the old ones are not pushed down."""
    lost: dict[Any, list[float]] = {ExperienceReplay: [], AsymmetricReplay: []}
    for kind in lost:
        for seed in range(3):
            old, new = directions(seed, (0, 1), inputs=4, spread=0.8), directions(seed, (2, 3), inputs=4, spread=0.8)
            held_out = directions(seed + 100, (0, 1), inputs=4, spread=0.8)
            context = surroundings(tmp_path, GENTLE, inputs=4, hidden=32, heads={0: 4}, seed=seed)
            strategy = trained(kind, ReplayConfig(buffer_size=4), context, [old.experience(0)])
            before = accuracy(strategy.model(), held_out)
            strategy.learn(new.experience(1))
            lost[kind].append(before - accuracy(strategy.model(), held_out))
    assert sum(lost[ExperienceReplay]) / 3 > 0.12
    assert sum(lost[AsymmetricReplay]) < 0.5 * sum(lost[ExperienceReplay])


def test_with_a_head_for_each_task_nothing_is_masked(tmp_path: Path) -> None:
    """A batch of one class would otherwise have a loss of 0."""
    split, rows = directions(0, (0, 1), inputs=4), torch.arange(10)
    strategy = AsymmetricReplay(ReplayConfig(), surroundings(tmp_path, STILL, inputs=4, heads={0: 2, 1: 2}))
    batch = batch_of(split, rows)
    assert batch.y.unique().tolist() == [0]
    assert torch.equal(strategy.loss(batch), F.cross_entropy(strategy.logits(batch), batch.y))


# der++


def test_logits_are_stored_as_they_were_at_insertion(tmp_path: Path) -> None:
    first, _ = contradiction(0)
    strategy = trained(DarkReplay, DarkReplayConfig(), surroundings(tmp_path, STILL, hidden=8), [first.experience()])
    memory = strategy.buffer.contents()
    assert len(memory) == len(first.y)
    torch.testing.assert_close(memory.extras["logits"], strategy.net(memory.x, 0).detach())


@pytest.mark.parametrize("seed", SEEDS)
def test_alpha_keeps_logits_close_to_what_they_were(seed: int, tmp_path: Path) -> None:
    moved = {}
    for alpha in (0.0, 0.3):
        strategy, _ = after_contradiction(DarkReplay, DarkReplayConfig(buffer_size=40, alpha=alpha), tmp_path, seed)
        memory = strategy.buffer.contents()
        moved[alpha] = float(F.mse_loss(strategy.net(memory.x, 0).detach(), memory.extras["logits"]))
    assert moved[0.3] < 0.2 * moved[0.0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("alpha", "beta", "remembers"), [(0.3, 0.0, True), (0.0, 0.5, True), (0.0, 0.0, False)])
def test_either_term_remembers_and_neither_forgets(
    alpha: float, beta: float, remembers: bool, seed: int, tmp_path: Path
) -> None:
    config = DarkReplayConfig(buffer_size=40, alpha=alpha, beta=beta)
    strategy, first = after_contradiction(DarkReplay, config, tmp_path, seed)
    assert (accuracy(strategy.model(), first) > 0.9) == remembers
    assert remembers or accuracy(strategy.model(), first) < 0.2


def test_without_its_terms_der_is_fine_tuning(tmp_path: Path) -> None:
    plain, _ = after_contradiction(FineTuning, FineTuningConfig(), tmp_path, 0)
    dark, _ = after_contradiction(DarkReplay, DarkReplayConfig(alpha=0.0, beta=0.0), tmp_path, 0)
    for ours, theirs in zip(dark.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_heads_of_different_widths_share_the_buffer(tmp_path: Path) -> None:
    """The narrower head's logits are stored with a zero behind them; the class it lacks adds nothing to the distance."""
    narrow, wide = directions(0, (0, 1), inputs=4), directions(1, (0, 1, 2), inputs=4)
    context = surroundings(tmp_path, STILL, inputs=4, heads={0: 2, 1: 3})
    strategy = trained(DarkReplay, DarkReplayConfig(beta=0.0), context, [narrow.experience(0, 0), wide.experience(1, 1)])
    memory = strategy.buffer.contents()
    assert set(memory.task.tolist()) == {0, 1}
    assert not memory.extras["logits"][memory.task == 0, 2].any()
    batch = Batch(wide.x, wide.y, torch.arange(len(wide.y)), torch.ones_like(wide.y))
    assert strategy.loss(batch).item() == pytest.approx(F.cross_entropy(strategy.logits(batch), batch.y).item(), rel=1e-5)
