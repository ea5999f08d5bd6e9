"""Task vectors made for a test, and a network in which two different weights are one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, EvalSet, ExpertExperience, Model
from shiftproof.benchmark.analysis.deltas import Deltas
from shiftproof.benchmark.merging.sources import InMemory


def _deltas(**experts: Mapping[str, Tensor]) -> Deltas:
    """Experts by name, each the changes of its tensors, upon a base of random numbers."""
    generator = torch.Generator().manual_seed(7)
    shapes = next(iter(experts.values()))
    base = {name: torch.rand(delta.shape, generator=generator, dtype=delta.dtype) for name, delta in shapes.items()}
    # Powers of two below the base's digits would be lost: numbers in tests are chosen so that base + delta - base is delta.
    states = [{name: base[name] + delta for name, delta in changes.items()} for changes in experts.values()]
    sources = [InMemory(state, name) for state, name in zip(states, experts, strict=True)]
    return Deltas(InMemory(base, "the base"), sources, tuple(experts))


@pytest.fixture
def deltas_of() -> Callable[..., Deltas]:
    """`deltas_of(a={"w": delta}, b={"w": delta})`."""
    return _deltas


class Product(nn.Module):
    """x -> w2 w1 x with scalars, so that (w1, w2) and (-w1, -w2) are one function."""

    features = 1

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([[first]]))
        self.second = nn.Parameter(torch.tensor([[second]]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1) of (B, 1)."""
        return x @ self.first @ self.second


def _product(first: float, second: float) -> Model:
    """Two classes with logits (w1 w2 x, -w1 w2 x)."""
    model = Model(Product(first, second), {0: 2})
    with torch.no_grad():
        model.head(0).weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.head(0).bias.zero_()
    return model


@pytest.fixture
def product_expert() -> Callable[[str, float, float], ExpertExperience]:
    """`product_expert(name, w1, w2)`: upon a base with weights of zero and a head that all share."""

    def make(name: str, first: float, second: float) -> ExpertExperience:
        base = _product(0.0, 0.0)
        return ExpertExperience(0, name, 0, base, _product(first, second), frozenset(base.state_dict()))

    return make


@pytest.fixture
def evals() -> tuple[EvalSet, ...]:
    """Two sets of two classes: x of 1 or -1 says which, in the second set a quarter says the contrary."""
    sets = []
    for name, wrong in (("clean", 0), ("noisy", 2)):
        y = torch.arange(8) % 2
        x = (1.0 - 2.0 * y.float())[:, None].clone()
        x[:wrong] *= -1
        sets.append(EvalSet(name, ((0, ArrayData(x, y)),), torch.zeros(8, dtype=torch.int64), (name,)))
    return tuple(sets)


@pytest.fixture
def batch_norm_expert() -> Callable[[str, int, int], ExpertExperience]:
    """`batch_norm_expert(name, seed, task)`: running statistics, a counter and private heads of two tasks."""

    def make(name: str, seed: int, task: int) -> ExpertExperience:
        base = _normed(0)
        expert = ExpertExperience(0, name, task, base, _normed(seed), frozenset())
        shared = frozenset(key for key in base.state_dict() if not key.startswith("heads."))
        return replace(expert, shared=shared)

    return make


class Normed(nn.Sequential):
    """A layer with batch normalization."""

    features = 3


def _normed(seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(Normed(nn.Linear(4, 3), nn.BatchNorm1d(3)), {0: 2, 1: 2})
        for _ in range(seed + 1):
            model.backbone(torch.randn(16, 4))
    return model


@dataclass(frozen=True)
class Sum:
    """base + sum of the deltas: task arithmetic in a line."""

    rounds: int = 0

    def path(self, name: str, shape: Sequence[int]) -> Literal["elementwise"]:
        return "elementwise"

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Any:
        return None

    def combine(self, partials: Mapping[str, Any], facts: Any) -> Any:
        return None

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        return base + sum((expert - base for expert in experts), start=torch.zeros_like(base))


@pytest.fixture
def summing() -> Callable[[], Sum]:
    """`summing()`: a merge method that is its own oracle."""
    return Sum
