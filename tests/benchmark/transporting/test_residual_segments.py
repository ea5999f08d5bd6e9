"""Each segment of a residual stream under its own permutation, in the libraries' modules with the maps in their skips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.residuals import residual_maps
from tests.benchmark.transporting.zoo import Net, filled, hugging_face, picture, torchvision_vit, words

Maps = dict[str, Tensor]


class Gather(nn.Module):
    """Channels in another order."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class PreNorm(nn.Module):
    """A block of torchvision's ViT with a map in each of its skips."""

    def __init__(self, block: nn.Module, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.block, self.first, self.second = block, first, second

    def forward(self, x: Tensor) -> Tensor:
        normed = self.block.ln_1(x)
        x = x[..., self.first] + self.block.self_attention(normed, normed, normed, need_weights=False)[0]
        return x[..., self.second] + self.block.mlp(self.block.ln_2(x))


def map_vit(model: nn.Module, maps: Maps) -> None:
    layers = model.encoder.layers
    for name, block in list(layers.named_children()):
        found = (maps[f"encoder.layers.{name}.{part}"] for part in ("middle", "stream"))
        setattr(layers, name, PreNorm(block, *found))


def map_bert(model: nn.Module, maps: Maps) -> None:
    def mapped(order: Tensor) -> Callable[[nn.Module, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        return lambda _, inputs: (inputs[0], inputs[1][..., order])

    for number, layer in enumerate(model.bert.encoder.layer):
        layer.attention.output.register_forward_pre_hook(mapped(maps[f"bert.encoder.layer.{number}.middle"]))
        layer.output.register_forward_pre_hook(mapped(maps[f"bert.encoder.layer.{number}.stream"]))


def map_resnet(model: nn.Module, maps: Maps) -> None:
    for name, module in model.named_modules():
        if f"{name}.stream" in maps:
            module.downsample = Gather(maps[f"{name}.stream"])


NETS = {
    "pre-norm": (Net(torchvision_vit, lambda: (picture(),), 9, 5), map_vit),
    "post-norm": (
        Net(lambda: hugging_face("BertForSequenceClassification", "BertConfig"), lambda: (words(),), 10, 6),
        map_bert,
    ),
    "convolutional": (Net(lambda: tv.resnet18(num_classes=5), lambda: (picture(32),), 17, 12), map_resnet),
}


def logits(model: nn.Module, net: Net) -> Tensor:
    with torch.no_grad():
        output = model(*net.inputs())
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", NETS)
def test_segments_need_their_residual_maps_and_no_more(name: str) -> None:
    net, put = NETS[name]
    model, permuted, mapped = filled(net.build()), filled(net.build()), filled(net.build())
    spec = derive_model(model)
    permutations = spec.random(torch.Generator().manual_seed(3))
    state = spec.apply(model.state_dict(), permutations)
    permuted.load_state_dict(state)
    mapped.load_state_dict(state)
    maps = residual_maps(spec, permutations)
    assert len(maps) == net.segments - net.shared
    put(mapped, maps)
    assert torch.allclose(logits(mapped, net), logits(model, net), rtol=0, atol=1e-9)
    assert (logits(permuted, net) - logits(model, net)).abs().max() > 1e-3
