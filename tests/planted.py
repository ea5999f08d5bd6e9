"""Planted data on which the claim of a method shows within a second, and what it takes to train on it.

A sample is a vector: the first coordinate carries the label, weakly, the second one the latent attribute, strongly. The
attribute goes with the label in a share `p_corr` of the training samples, so that it is the shortcut.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, DataExperience, EvalSet, GroupedExperience, Model, Recipe, RunContext, evaluating
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import Checkpointer
from shiftproof.benchmark.contracts import State

SEEDS = (0, 1)
QUICK = Recipe(name="quick", epochs=10, batch_size=20, lr=0.1, momentum=0.9, schedule="constant")
SHORT = Recipe(name="short", epochs=8, batch_size=32, lr=0.05, momentum=0.0, schedule="constant")  # stops at the shortcut


@dataclass(frozen=True)
class Split:
    """(N, D) float32 inputs with (N,) int64 labels y and attributes z."""

    x: Tensor
    y: Tensor
    z: Tensor

    @property
    def conflicting(self) -> Tensor:
        """(N,) bool, True where the attribute misleads."""
        return self.y != self.z

    def experience(self, index: int = 0, task: int = 0) -> GroupedExperience:
        """A training set with groups 2 y + z."""
        return GroupedExperience(index, f"step-{index}", task, ArrayData(self.x, self.y), 2 * self.y + self.z)

    def evaluation(self, name: str = "held-out", task: int = 0) -> EvalSet:
        """An eval set with groups 2 y + z."""
        return EvalSet(name, ((task, ArrayData(self.x, self.y)),), 2 * self.y + self.z, ("y0-z0", "y0-z1", "y1-z0", "y1-z1"))


def biased(
    seed: int,
    count: int = 400,
    p_corr: float = 0.95,
    core: float = 1.0,
    shortcut: float = 2.0,
    spread: float = 0.5,
    noise: int = 0,
) -> Split:
    """As many samples of either label, `p_corr` of them aligned, in random order.

    Args:
        core: Distance of the labels from 0 in coordinate 0, whose noise is `spread`.
        shortcut: Distance of the attributes from 0 in coordinate 1, whose noise is `spread`.
        noise: Further coordinates of unit noise.
    """
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    z = np.where(np.arange(count) // 2 < p_corr * (count // 2), y, 1 - y)
    order = rng.permutation(count)
    y, z = y[order], z[order]
    signal = np.stack([core * (2 * y - 1), shortcut * (2 * z - 1)], axis=1)
    x = np.concatenate([signal + spread * rng.standard_normal((count, 2)), rng.standard_normal((count, noise))], axis=1)
    return Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), torch.from_numpy(z))


def two_biased(seed: int, count: int = 400, p_corr: float = 0.95) -> tuple[Split, Split]:
    """Two tasks with one shortcut; what carries the label in the first one carries its opposite in the second."""
    first, second = biased(seed, count, p_corr), biased(seed + 1000, count, p_corr)
    return first, Split(second.x * torch.tensor([-1.0, 1.0]), second.y, second.z)


def contradiction(seed: int, count: int = 200, context: bool = True) -> tuple[Split, Split]:
    """Two tasks on the same coordinate 0 with opposite answers; coordinate 1 says which task it is, or nothing.

    The hint is weak, so that whoever sees the second task alone answers the first one in reverse.
    """
    splits = []
    for task, sign in enumerate((1, -1)):
        rng = np.random.default_rng([seed, task])
        y = np.arange(count) % 2
        x = np.stack([sign * (2 * y - 1) + 0.3 * rng.standard_normal(count), np.full(count, -sign * context / 2)], axis=1)
        splits.append(Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), torch.zeros(count, dtype=torch.int64)))
    return splits[0], splits[1]


def directions(seed: int, classes: tuple[int, ...], inputs: int = 8, spread: float = 0.5) -> Split:
    """50 samples of each class around 2 e_y, class after class."""
    rng = np.random.default_rng([seed, *classes])
    y = np.repeat(classes, 50)
    x = 2 * np.eye(inputs)[y] + spread * rng.standard_normal((len(y), inputs))
    return Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), torch.zeros(len(y), dtype=torch.int64))


class Perceptron(nn.Module):
    """A backbone: one hidden layer of rectified units, or, without one, the inputs themselves."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.features = hidden or inputs

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features


class NormalizedPerceptron(nn.Module):
    """A backbone with running statistics."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.features = hidden

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features


def surroundings(
    folder: Path,
    recipe: Recipe,
    *,
    inputs: int = 2,
    hidden: int = 0,
    heads: dict[int, int] | None = None,
    seed: int = 0,
    backbone: Callable[[], nn.Module] | None = None,
    write: Callable[[State | None], None] | None = None,
) -> RunContext:
    """What the runner would hand a strategy; `write` receives a checkpoint after every step."""

    def base() -> tuple[Model, dict[str, Tensor]]:
        make = backbone or (lambda: Perceptron(inputs, hidden))
        return Model(make(), heads or {0: 2}), make().state_dict()

    checkpointer = Checkpointer(write, seconds=0) if write else None
    name = f"{inputs}-{hidden}-{seed}"
    return RunContext(seed, recipe, base, name, Cache(folder / "cache"), folder / "work", checkpointer=checkpointer)


def trained(kind: Any, config: Any, context: RunContext, experiences: Sequence[DataExperience]) -> Any:
    """The strategy after the experiences."""
    strategy = kind(config, context)
    for experience in experiences:
        strategy.learn(experience)
    return strategy


def predictions(model: nn.Module, x: Tensor, task: int = 0) -> Tensor:
    """(N,) int64 classes."""
    with torch.no_grad(), evaluating(model):
        return torch.as_tensor(model(x, task)).argmax(dim=1)


def accuracy(model: nn.Module, split: Split, task: int = 0) -> float:
    """Share of right answers."""
    return float((predictions(model, split.x, task) == split.y).float().mean())


def worst_group(model: nn.Module, split: Split, task: int = 0) -> float:
    """Accuracy on the worst of the four groups (y, z)."""
    right = (predictions(model, split.x, task) == split.y).float()
    groups = 2 * split.y + split.z
    return min(float(right[groups == group].mean()) for group in groups.unique())


class Killed(BaseException):
    """Stands for SIGKILL: nothing between the strategy and the test catches it."""


def resumed(kind: Any, config: Any, make: Callable[..., RunContext], experiences: Sequence[DataExperience], after: int) -> Any:
    """The strategy after the experiences, killed at checkpoint number `after` and made anew from that checkpoint."""
    saved = io.BytesIO()
    count, learned = 0, 0

    def write(state: State | None) -> None:
        nonlocal count
        count += 1
        if count == after:
            torch.save({"state": state, "learned": learned}, saved)
            raise Killed

    first = kind(config, make(write=write))
    try:
        for experience in experiences:
            first.learn(experience)
            learned += 1
    except Killed:
        pass
    assert count == after, f"expected at least {after} checkpoints, got {count}"
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    second = kind(config, make())
    second.load(checkpoint["state"])
    for experience in experiences[checkpoint["learned"] :]:
        second.learn(experience)
    return second
