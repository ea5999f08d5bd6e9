"""Backbones that ship with the harness. More come from plugins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftproof.benchmark.contracts import BackboneSpec
from shiftproof.benchmark.hookspecs import hookimpl


class SmallConvNet(nn.Module):
    """Three convolutions of stride 2, then the flattened map: the digits' backbone, without running statistics.

    Args:
        input_shape: (channels, height, width); height and width are divisible by 8.
        channels: Maps of the three convolutions.
    """

    def __init__(self, input_shape: tuple[int, ...], channels: tuple[int, int, int] = (8, 16, 32)) -> None:
        super().__init__()
        inputs, height, width = input_shape
        layers: list[nn.Module] = []
        for before, after in zip((inputs, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.features = channels[-1] * (height // 8) * (width // 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) features of (B, C, H, W) float32 in [0, 1]."""
        features: Tensor = self.layers(x - 0.5)
        return features


class ResNet18(nn.Module):
    """torchvision's ResNet-18 without its classifier, inputs normalized with ImageNet's constants."""

    mean: Tensor
    std: Tensor

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        from torchvision.models import resnet18  # half a second, only for those who use it

        self.net = resnet18(weights=None)
        self.features = self.net.fc.in_features
        self.net.fc = nn.Identity()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 512) features of (B, 3, H, W) float32 in [0, 1]."""
        features: Tensor = self.net((x - self.mean) / self.std)
        return features


@hookimpl
def shiftproof_backbones() -> list[BackboneSpec]:
    """The built-in backbones."""
    return [
        BackboneSpec(
            "digits-cnn",
            SmallConvNet,
            "three convolutions of stride 2, 8, 16 and 32 maps, no running statistics",
            "Springenberg et al., Striving for Simplicity, ICLR 2015 workshop, arXiv:1412.6806",
        ),
        BackboneSpec(
            "resnet18", ResNet18, "ResNet-18 of torchvision without its classifier", "He et al., CVPR 2016, arXiv:1512.03385"
        ),
    ]
