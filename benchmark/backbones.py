"""Backbones that ship with the harness. More come from plugins."""

from __future__ import annotations

from collections import OrderedDict

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


class Attention(nn.Module):
    """Multi-head self-attention with one linear map for queries, keys and values, in that order along the output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).view(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D / H) each
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(count, tokens, width))
        return mixed


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallViT(nn.Module):
    """A Vision Transformer for pictures of 16 pixels a side: patches of 4, class token, learned positions.

    Args:
        input_shape: (channels, height, width); height and width are divisible by 4.
    """

    def __init__(self, input_shape: tuple[int, ...], width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        self.patch_embed = nn.Conv2d(channels, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (rows // 4) * (columns // 4), width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.features = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) features of (B, C, H, W) float32 in [0, 1]."""
        patches = self.patch_embed(2 * x - 1).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        features: Tensor = self.norm(self.blocks(tokens))[:, 0]
        return features


class SmallResNet(nn.Module):
    """Three residual stages of one block each, 16, 32 and 64 maps, with batch normalization."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, conv1x1  # half a second, only for those who use it

        def stage(before: int, after: int) -> nn.Module:
            shortcut = nn.Sequential(conv1x1(before, after, 2), nn.BatchNorm2d(after))
            block: nn.Module = BasicBlock(before, after, 2, shortcut)
            return block

        self.stem = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(stage(16, 16), stage(16, 32), stage(32, 64))
        self.features = 64

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) features of (B, C, H, W) float32 in [0, 1]."""
        maps: Tensor = self.stages(torch.relu(self.norm(self.stem(2 * x - 1))))
        return maps.mean(dim=(2, 3))


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
            "digits-vit",
            SmallViT,
            "Vision Transformer of 3 blocks, width 64, 4 heads, patches of 4 pixels",
            "Dosovitskiy et al., ICLR 2021, arXiv:2010.11929",
        ),
        BackboneSpec(
            "digits-resnet",
            SmallResNet,
            "residual net of 3 blocks with batch normalization",
            "He et al., CVPR 2016, arXiv:1512.03385",
        ),
        BackboneSpec(
            "resnet18", ResNet18, "ResNet-18 of torchvision without its classifier", "He et al., CVPR 2016, arXiv:1512.03385"
        ),
    ]
