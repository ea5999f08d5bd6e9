"""Heads that are trained as two tensors end where heads of their own end, bit for bit, and keep their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, Batch, DataExperience, JointExperience, Model, Recipe
from shiftproof.strategies import fuses_heads
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.baselines.rehearsal import ExperienceReplay, ReplayConfig
from shiftproof.strategies.fused_heads import FusedHeads, may_fuse
from shiftproof.strategies.training import TrainingStrategy
from tests.planted import surroundings

RECIPE = Recipe(epochs=2, batch_size=12, lr=0.1, momentum=0.9, schedule="constant", clip_norm=0.5)
HEADS = dict.fromkeys(range(5), 2)
GAPS = {0: 3, 4: 3, 9: 3}


def experience(index: int, task: int, classes: int = 2) -> DataExperience:
    """Thirty samples of eight numbers."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(30, 8, generator=generator)
    return DataExperience(index, f"task-{task}", task, ArrayData(x, torch.randint(classes, (30,), generator=generator)))


def joint(heads: dict[int, int]) -> JointExperience:
    """All tasks at once."""
    parts = [experience(index, task, heads[task]) for index, task in enumerate(heads)]
    data = ArrayData(torch.cat([one.train.x for one in parts]), torch.cat([one.train.y for one in parts]))
    return JointExperience(0, "joint", max(heads), data, torch.cat([one.tasks(torch.arange(30)) for one in parts]))


class Apart(ExperienceReplay):
    """The same without the mark, which is not inherited."""


class Watched(ExperienceReplay):
    """Writes down, after each step, which tasks were fused and what their heads hold."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.steps: list[list[int]] = []

    @fuses_heads
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch)

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        fused = self._fused
        has_moved = fused is not None and fused.weight.grad is not None
        self.steps.append(fused.tasks if fused is not None and has_moved else [])
        if fused is not None:
            heads = [self.net.head(task) for task in fused.tasks]
            assert torch.equal(torch.cat([head.weight for head in heads]), fused.weight)
            assert torch.equal(torch.cat([head.bias for head in heads]), fused.bias)
            assert all((head.weight.grad is None) == has_moved for head in heads if head.weight.grad is not None or has_moved)


def replay(
    folder: Path, kind: type[ExperienceReplay], recipe: Recipe, heads: dict[int, int], size: int = 0
) -> tuple[ExperienceReplay, dict[str, Tensor]]:
    """A strategy after every task, and its weights."""
    run = surroundings(folder, recipe, inputs=8, hidden=6, heads=heads)
    strategy = kind(ReplayConfig(buffer_size=40, replay_size=size), run)
    for index, task in enumerate(heads):
        strategy.learn(experience(index, task, heads[task]))
    return strategy, strategy.net.state_dict()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


RECIPES = {
    "clipped": RECIPE,
    "unclipped": replace(RECIPE, clip_norm=0.0),
    "without-momentum": replace(RECIPE, momentum=0.0),
    "decayed": replace(RECIPE, weight_decay=0.01),
    "bfloat16": replace(RECIPE, precision="bfloat16"),
}


@pytest.mark.parametrize("heads", [HEADS, GAPS], ids=["all-ids", "gaps"])
@pytest.mark.parametrize("kind", list(RECIPES))
def test_replay_with_fused_heads_equals_replay_with_heads_of_their_own(
    tmp_path: Path, kind: str, heads: dict[int, int]
) -> None:
    recipe = RECIPES[kind]
    watched, ours = replay(tmp_path, Watched, recipe, heads)
    assert isinstance(watched, Watched)
    assert {len(tasks) for tasks in watched.steps} >= {0, 2, len(heads)}
    assert_equal(ours, replay(tmp_path, Apart, recipe, heads)[1])
    assert_equal(ours, replay(tmp_path, ExperienceReplay, recipe, heads)[1])


def test_a_head_that_is_absent_from_a_batch_does_not_move(tmp_path: Path) -> None:
    # Three replayed samples of five tasks: most batches lack a head, and its momentum must not carry it on.
    watched, ours = replay(tmp_path, Watched, RECIPE, HEADS, size=3)
    assert isinstance(watched, Watched)
    last = watched.steps[-5:]
    assert any(last)
    assert not all(last)
    assert_equal(ours, replay(tmp_path, Apart, RECIPE, HEADS, size=3)[1])


def bare_loop(net: Model, data: JointExperience, orders: Sequence[Tensor], recipe: Recipe) -> None:
    """PyTorch as its tutorial has it, a head at a time."""
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, foreach=False)
    for order in orders:
        for index in order.split(recipe.batch_size):
            features, tasks = net.backbone(data.train.x[index]), data.task_ids[index]
            logits = torch.stack([net.head(int(task))(one) for one, task in zip(features, tasks, strict=True)])
            optimizer.zero_grad()
            F.cross_entropy(logits, data.train.y[index]).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm, foreach=False)
            optimizer.step()


def test_joint_training_equals_a_bare_pytorch_loop_that_asks_one_head_a_sample(tmp_path: Path) -> None:
    recipe, data = replace(RECIPE, batch_size=50), joint(GAPS)
    run = surroundings(tmp_path, recipe, inputs=8, hidden=6, heads=GAPS)
    strategy, net = FineTuning(FineTuningConfig(), run), run.new_model()
    strategy.learn(data)
    orders = [torch.randperm(90, generator=run.generator("order", 0, epoch)) for epoch in range(recipe.epochs)]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    bare_loop(net, data, orders, recipe)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(strategy.net.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(tensor, before[name])


def test_parameters_stay_the_same_objects_and_end_in_memory_of_their_own(tmp_path: Path) -> None:
    run = surroundings(tmp_path, RECIPE, inputs=8, hidden=6, heads=HEADS)
    strategy = FineTuning(FineTuningConfig(), run)
    before = dict(strategy.net.named_parameters())
    strategy.learn(joint(HEADS))
    after = dict(strategy.net.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert len({tensor.untyped_storage().data_ptr() for tensor in after.values()}) == len(after)


def test_a_head_that_is_given_other_memory_in_the_middle_is_trained_there(tmp_path: Path) -> None:
    class Moved(Watched):
        @fuses_heads
        def loss(self, batch: Batch) -> Tensor:
            if self.step == 1:
                self.net.head(0).weight.data = self.net.head(0).weight.data.clone()
            return ExperienceReplay.loss(self, batch)

    moved, ours = replay(tmp_path, Moved, RECIPE, HEADS)
    assert isinstance(moved, Watched)
    assert list(HEADS) in moved.steps[-5:]
    assert_equal(ours, replay(tmp_path, Apart, RECIPE, HEADS)[1])


APART: dict[str, tuple[Recipe, dict[int, int], int]] = {
    "heads of two widths": (RECIPE, {0: 2, 1: 3, 2: 2}, -1),
    "a frozen head": (RECIPE, {0: 2, 1: 2, 2: 2}, 1),
    "adam": (replace(RECIPE, optimizer="adam", lr=0.01), HEADS, -1),
}


@pytest.mark.parametrize("why", list(APART))
def test_heads_stay_apart(tmp_path: Path, why: str) -> None:
    recipe, heads, frozen = APART[why]

    class Some(Watched):
        def before_experience(self, experience: DataExperience) -> None:
            if frozen >= 0:
                self.net.head(frozen).requires_grad_(False)

        loss = Watched.loss

    class Others(Apart):
        before_experience = Some.before_experience

    strategy, ours = replay(tmp_path, Some, recipe, heads)
    assert isinstance(strategy, Watched)
    assert not any(set(heads) == set(tasks) for tasks in strategy.steps)
    assert_equal(ours, replay(tmp_path, Others, recipe, heads)[1])


def test_a_derived_class_sees_gradients_of_single_heads(tmp_path: Path) -> None:
    class Curious(ExperienceReplay):
        norms: list[float]

        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            (gradient,) = torch.autograd.grad(loss, self.net.head(self.experience.task).weight, retain_graph=True)
            self.norms = [float(gradient.norm())]
            return loss

        def after_step(self, batch: Batch) -> None:
            super().after_step(batch)
            gradient = self.net.head(self.experience.task).weight.grad
            assert gradient is not None
            self.norms.append(float(gradient.norm()))

    strategy, _ = replay(tmp_path, Curious, replace(RECIPE, clip_norm=0.0), HEADS)
    assert isinstance(strategy, Curious)
    assert strategy.norms[0] == strategy.norms[1] > 0
    assert may_fuse(ExperienceReplay)
    assert may_fuse(FineTuning)
    assert not may_fuse(Curious)
    assert not may_fuse(Apart)
    assert not may_fuse(TrainingStrategy)


def test_a_marked_loss_that_also_asks_single_heads_is_an_error(tmp_path: Path) -> None:
    class Twice(ExperienceReplay):
        @fuses_heads
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) + F.cross_entropy(self.logits(batch), batch.y)

    with pytest.raises(RuntimeError, match="expected a loss that fuses heads to call logits once"):
        replay(tmp_path, Twice, RECIPE, HEADS)


def test_gradient_norms_are_those_of_the_heads(tmp_path: Path) -> None:
    net = surroundings(tmp_path, RECIPE, inputs=8, hidden=6, heads=GAPS).new_model()
    fused = FusedHeads(net, list(GAPS))
    features, task = torch.randn(20, 6), torch.tensor([0, 4, 9, 4] * 5)
    fused(features, task).square().sum().backward()
    single = surroundings(tmp_path, RECIPE, inputs=8, hidden=6, heads=GAPS).new_model()
    single.classify(features, task).square().sum().backward()
    expected = [
        torch.linalg.vector_norm(parameter.grad) for parameter in single.heads.parameters() if parameter.grad is not None
    ]
    assert torch.equal(fused.gradient_norms(), torch.stack(expected))
    fused.drop_gradients()
    assert all(leaf.grad is None for leaf, _ in fused.leaves())
