"""A backbone plus one head per task id."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

HEADS = "heads."  # what names of heads in a state dict begin with


class Model(nn.Module):
    """Features of the backbone, then the linear head of each sample's task.

    Args:
        backbone: Maps (B, ...) inputs to (B, `backbone.features`) features.
        heads: Classes of each task id.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[int, int]) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.features
        assert isinstance(width, int)
        self.width = width
        self.heads = nn.ModuleDict({str(task): nn.Linear(width, classes) for task, classes in heads.items()})

    def head(self, task: int) -> nn.Linear:
        """The head of a task."""
        head = self.heads[str(task)]
        assert isinstance(head, nn.Linear)
        return head

    def head_keys(self, task: int) -> frozenset[str]:
        """Names in the state dict that are private to a task."""
        return frozenset(f"heads.{task}.{name}" for name in self.head(task).state_dict())

    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        """Take over a backbone's weights, and those of the heads it brings ("heads.0.weight") that this model has."""
        heads = {name: tensor for name, tensor in weights.items() if name.startswith(HEADS)}
        self.backbone.load_state_dict({name: tensor for name, tensor in weights.items() if name not in heads})
        self.load_state_dict(heads, strict=False)

    def features(self, x: Tensor) -> Tensor:
        """(B, D) float32 features of (B, ...) float32 inputs."""
        features: Tensor = self.backbone(x)
        return features

    def classify(self, features: Tensor, task: int | Tensor) -> Tensor:
        """Logits of (B, D) features by the head of each sample's task.

        Args:
            task: One task id, or (B,) int64.

        Returns:
            (B, C) float32. Where a batch mixes heads of different widths, C is the largest and the missing classes of a
            narrower head get the lowest finite value.
        """
        if isinstance(task, int):
            logits: Tensor = self.head(task)(features)
            return logits
        # Only heads that are present take part, so that no other head receives a gradient; one product serves them all.
        present = sorted(set(task.tolist()))
        if len(present) == 1:
            return self.classify(features, present[0])
        heads = [self.head(one) for one in present]
        weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        every = nn.functional.linear(features, weight, bias)  # (B, classes of all heads present)
        widths = [head.out_features for head in heads]
        if min(widths) < max(widths):
            every = torch.cat([_padded(part, max(widths)) for part in every.split(widths, dim=1)], dim=1)
        return by_task(every, task, present)

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """(B, C) logits of (B, ...) inputs; `task` is one task id or (B,) int64."""
        return self.classify(self.features(x), task)


def by_task(every: Tensor, task: Tensor, present: list[int]) -> Tensor:
    """Of each sample's logits those of its own task.

    Args:
        every: (B, H * C) by H heads of C classes each, side by side.
        task: (B,) int64.
        present: The H tasks in `task`, in ascending order.

    Returns:
        (B, C).
    """
    has_gaps = present[-1] >= len(present)  # ids count from 0
    position = torch.searchsorted(torch.tensor(present, device=task.device), task) if has_gaps else task
    columns = _columns(len(present), every.shape[1] // len(present), task.device).index_select(0, position)
    return every.gather(1, columns)  # backwards quicker than indexing


@lru_cache(maxsize=64)
def _columns(heads: int, classes: int, device: torch.device) -> Tensor:
    """(H, C) int64, which columns are those of each head."""
    return torch.arange(heads * classes, device=device).view(heads, classes)


def _padded(logits: Tensor, width: int) -> Tensor:
    if logits.shape[1] == width:
        return logits
    return nn.functional.pad(logits, (0, width - logits.shape[1]), value=torch.finfo(logits.dtype).min)
