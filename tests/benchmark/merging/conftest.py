"""Methods as plain objects, and checkpoints of two small real architectures with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sum:
    """base + sum of the deltas, one element at a time."""

    blockwise: bool = True
    rounds: int = 0

    def path(self, name: str, shape: Sequence[int]) -> Literal["elementwise"]:
        return "elementwise"

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        return ""

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Any:
        return None

    def combine(self, partials: Mapping[str, Any], facts: Any) -> Any:
        return None

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        merged = base.clone()
        for expert in experts:
            merged += expert - base
        return merged


def _states(experts: int, dtype: torch.dtype = torch.float32, counter: bool = True) -> list[State]:
    """A base and experts: a matrix, a vector, a convolution, statistics and a counter."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (40, 30), "fc.bias": (40,), "conv.weight": (8, 3, 3, 3), "bn.running_var": (8,), "scale": ()}
    base = {name: torch.rand(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    made = [base]
    for _ in range(experts):
        made.append({name: (t + 0.1 * torch.rand(t.shape, generator=generator)).to(dtype) for name, t in base.items()})
    if counter:
        for position, state in enumerate(made):
            state["bn.num_batches_tracked"] = torch.tensor(position)
    return made


def _architecture(name: str) -> nn.Module:
    from torchvision.models import VisionTransformer, resnet18

    made: dict[str, Callable[[], nn.Module]] = {
        "resnet18": lambda: resnet18(weights=None),
        "vit": lambda: VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10),
    }
    return made[name]()


@pytest.fixture
def summing() -> Callable[..., Sum]:
    """`summing(blockwise=..., rounds=...)`: a method that is also its own oracle in one line."""
    return Sum


@pytest.fixture
def states() -> Callable[..., list[State]]:
    """`states(experts, dtype, counter)`: state dicts of a base and of experts."""
    return _states


@pytest.fixture
def real_states() -> Callable[[str, int], list[State]]:
    """`real_states("resnet18" or "vit", experts)`: a base with random weights and experts near it."""

    def make(name: str, experts: int) -> list[State]:
        torch.manual_seed(0)
        base = _architecture(name).state_dict()
        noisy = [
            {k: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t for k, t in base.items()} for _ in range(experts)
        ]
        return [base, *noisy]

    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., list[Path]]:
    """`saved(states, suffix)`: one file for each state dict: base, expert 1, expert 2 and so on."""

    def save(made: Sequence[State], suffix: str = ".safetensors") -> list[Path]:
        names = ["base", *(f"expert-{position}" for position in range(1, len(made)))]
        files = [tmp_path / f"{name}{suffix}" for name in names]
        for file, state in zip(files, made, strict=True):
            if suffix == ".safetensors":
                save_file(
                    {name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt", "who": file.stem}
                )
            else:
                torch.save(state, file)
        return files

    return save
