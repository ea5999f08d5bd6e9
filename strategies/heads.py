"""Linear heads that are born during training, such as cluster heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shiftproof.benchmark import RunContext


class Heads(nn.Module):
    """Named linear heads on the backbone's features. A checkpoint rebuilds heads that did not exist at construction.

    Args:
        context: Gives each head its own initialization, whatever was drawn before.
        purpose: Keeps the draws of two containers apart.
    """

    def __init__(self, context: RunContext, purpose: str = "heads") -> None:
        super().__init__()
        self._context = context
        self._purpose = purpose
        self.heads = nn.ModuleDict()

    def add(self, name: str, features: int, classes: int) -> None:
        """A new (classes, features) head; a head of that name must not exist."""
        if name in self.heads:
            raise ValueError(f"expected a new name, got {name!r}, which exists; heads: {', '.join(self.heads)}")
        with self._context.global_rng(self._purpose, name):
            self.heads[name] = nn.Linear(features, classes).to(self._context.device)

    def __contains__(self, name: str) -> bool:
        return name in self.heads

    def forward(self, features: Tensor, name: str) -> Tensor:
        """(B, classes) logits of (B, features) by one head."""
        logits: Tensor = self.heads[name](features)
        return logits

    def every(self, features: Tensor) -> Tensor:
        """(B, classes of all heads) logits by all heads, in order of birth."""
        return torch.cat([self(features, name) for name in self.heads], dim=1)

    def sizes(self) -> dict[str, list[int]]:
        """(classes, features) of each head, in order of birth: what a checkpoint needs to rebuild them."""
        return {name: list(_weight(head).shape) for name, head in self.heads.items()}

    def rebuild(self, sizes: dict[str, list[int]], state: dict[str, Any]) -> None:
        """Make the heads of a checkpoint, in their order, and load their weights."""
        kept = dict(self.heads.items())
        self.heads = nn.ModuleDict()
        for name, (classes, features) in sizes.items():
            if name in kept and list(_weight(kept[name]).shape) == [classes, features]:
                self.heads[name] = kept[name]
            else:
                self.add(name, features, classes)
        self.load_state_dict(state)


def _weight(head: nn.Module) -> Tensor:
    assert isinstance(head, nn.Linear)
    return head.weight
