"""Augmentation of training inputs. It belongs to the recipe, is drawn for each sample, and never touches colour."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(x: Tensor, kind: Literal["none", "shift", "crop-flip"], generator: torch.Generator) -> Tensor:
    """(B, C, H, W) float32 inputs, altered.

    Args:
        kind: "shift" moves by up to an eighth of the side, edges repeated; "crop-flip" cuts a random part of 8 to 100 % of the
            area and mirrors half of the pictures (torchvision's RandomResizedCrop and RandomHorizontalFlip).
    """
    if kind == "none":
        return x
    count, _, height, width = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    if kind == "shift":
        rows = _moved(height, torch.randint(-(height // 8), height // 8 + 1, (count,), generator=generator))
        columns = _moved(width, torch.randint(-(width // 8), width // 8 + 1, (count,), generator=generator))
        return x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    area, ratio = uniform(0.08, 1.0), uniform(-0.2877, 0.2877).exp()  # log of 3/4 and 4/3
    x_scale, y_scale = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x_move, y_move = uniform(-1, 1) * (1 - x_scale), uniform(-1, 1) * (1 - y_scale)
    x_scale = x_scale * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)
    zero = torch.zeros(count)
    matrix = torch.stack([torch.stack([x_scale, zero, x_move], 1), torch.stack([zero, y_scale, y_move], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _moved(side: int, pixels: Tensor) -> Tensor:
    """(B, side) int64, which row (or column) each one of a moved picture is taken from."""
    return (torch.arange(side) - pixels[:, None]).clamp(0, side - 1)
