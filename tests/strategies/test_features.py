"""Frozen features: one encoder pass for all who ask, and a cost that does not depend on who asked before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, DataExperience, JointExperience, Model, Recipe, RunContext, Stream
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.strategies import extract_features
from shiftproof.strategies.training import TrainingStrategy

RECIPE = Recipe(epochs=2, batch_size=20, lr=0.05)


class Counting(SmallConvNet):
    """Counts how many inputs it has encoded, over all copies."""

    encoded = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.encoded += len(x)
        return super().forward(x)


def base() -> tuple[Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Counting((3, 8, 8), (4, 4, 4))
    return Model(net, {0: 2, 1: 2}), net.state_dict()


Make = Callable[..., RunContext]


@pytest.fixture
def context(tmp_path: Path) -> Make:
    def make(seed: int = 0, recipe: Recipe = RECIPE, folder: str = "cache", base_sha256: str = "base") -> RunContext:
        return RunContext(seed, recipe, base, base_sha256, Cache(tmp_path / folder), tmp_path)

    return make


@pytest.fixture
def data(registry: Registry) -> DataExperience:
    spec = registry.stream("tiny")
    stream: Stream = spec.build(spec.config(), None)
    experience = stream.folds[0].train[0]
    assert isinstance(experience, DataExperience)
    return experience


def passes(action: Callable[[], Any]) -> int:
    before = Counting.encoded
    action()
    return Counting.encoded - before


def test_features_of_the_base_are_its_answers_in_evaluation_mode_and_in_order(context: Make, data: DataExperience) -> None:
    net = base()[0].backbone.eval()
    wanted = net(data.train.x.float() / 255)
    torch.testing.assert_close(extract_features(context(), data), wanted.detach())


def test_a_second_call_makes_no_encoder_pass_whatever_seed_and_recipe(context: Make, data: DataExperience) -> None:
    first = context()
    assert passes(lambda: extract_features(first, data)) == len(data.train)
    assert first.cache.made["features"] == 1
    for other in (context(), context(seed=3), context(recipe=replace(RECIPE, epochs=9))):
        assert passes(lambda other=other: extract_features(other, replace(data, index=5, name="other"))) == 0  # type: ignore[misc]
        assert other.cache.made["features"] == 0


def test_other_data_and_another_base_are_encoded(context: Make, data: DataExperience) -> None:
    extract_features(context(), data)
    other = replace(data, train=ArrayData(data.train.x.flip(0), data.train.y))
    assert passes(lambda: extract_features(context(), other)) == len(data.train)
    assert passes(lambda: extract_features(context(base_sha256="other"), data)) == len(data.train)


def test_trained_features_are_kept_for_the_same_seed_recipe_and_experience_and_no_others(
    context: Make, data: DataExperience
) -> None:
    first = extract_features(context(), data, "erm")
    assert passes(lambda: extract_features(context(), data, "erm")) == 0
    others = [
        (context(seed=1), data),
        (context(recipe=replace(RECIPE, lr=0.01)), data),
        (context(), replace(data, index=1)),  # its position decides about the order of batches
        (context(), replace(data, task=1)),
        (context(), JointExperience(0, "joint", 0, data.train, torch.arange(len(data.train)) % 2)),
    ]
    for run, experience in others:
        assert passes(lambda run=run, experience=experience: extract_features(run, experience, "erm")) > 0  # type: ignore[misc]
        assert not torch.equal(extract_features(run, experience, "erm"), first)


class Erm(TrainingStrategy[Any]):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch), batch.y)


def test_trained_features_are_those_of_plain_fine_tuning_with_the_recipe(context: Make, data: DataExperience) -> None:
    strategy = Erm(None, context())
    strategy.learn(data)
    wanted = strategy.net.eval().features(data.train.x.float() / 255)
    torch.testing.assert_close(extract_features(context(), data, "erm"), wanted.detach())


def test_the_cost_of_training_is_counted_whether_or_not_it_was_in_the_cache(context: Make, data: DataExperience) -> None:
    fresh, kept, trained = context(), context(), context(folder="elsewhere")
    for run in (fresh, kept):
        extract_features(run, data, "erm")
    assert (fresh.cache.made["features"], kept.cache.made["features"]) == (1, 0)
    Erm(None, trained).learn(data)
    assert fresh.cost == kept.cost == trained.cost
    extract_features(kept, data)
    assert kept.cost == fresh.cost


def test_the_cache_does_not_shift_the_generators_of_who_asks(context: Make, data: DataExperience) -> None:
    draws = []
    for _ in range(2):  # made, then read back
        with (run := context()).global_rng("asking"):
            extract_features(run, data, "erm")
            draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_training_for_features_writes_no_checkpoint_of_the_one_who_asks(context: Make, data: DataExperience) -> None:
    from shiftproof.benchmark.context import Checkpointer

    written: list[object] = []
    run = context()
    run._checkpointer = Checkpointer(written.append, seconds=0)
    extract_features(run, data, "erm")
    assert written == []
    assert run._checkpointer is not None
