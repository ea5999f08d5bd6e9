"""Small networks of the architectures that specifications are derived for, with random weights and statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn

from shiftproof.benchmark.backbones import ResNet18, SmallConvNet, SmallResNet, SmallViT
from shiftproof.benchmark.models import Model

Inputs = tuple[Tensor, ...]
WORDS, SIDE = 30, 16


def filled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in another dtype, with random parameters and statistics, evaluated without dropout."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.to(dtype).state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                spread = 0.3 if tensor.dim() < 2 else 2 * tensor[0].numel() ** -0.5
                values = torch.randn(tensor.shape, generator=generator, dtype=dtype) * spread
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)


def picture(side: int = SIDE) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def words(length: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (2, length), generator=torch.Generator().manual_seed(1))


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Tasks(nn.Module):
    """All heads of a model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = Model(backbone, {0: 3, 1: 4})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model.head(task)(self.model.features(x)) for task in (0, 1)]


def bottlenecks() -> nn.Module:
    """As ResNet-50 and the deeper ones, with fewer blocks."""
    return tv.ResNet(tv.resnet.Bottleneck, [3, 2, 1, 1], num_classes=5)


def torchvision_vit(headless: bool = False, **facts: Any) -> nn.Module:
    model = tv.VisionTransformer(SIDE, 4, 2, 4, 16, 24, num_classes=5, **facts)
    if headless:
        model.heads = nn.Identity()
    return model


def timm_vit(**facts: Any) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=SIDE, patch_size=4, embed_dim=16, depth=2, num_heads=4, **facts)


def timm_resnet() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (2, 1, 1, 1), num_classes=5)


def clip(**facts: Any) -> nn.Module:
    from open_clip.model import CLIP

    visual = {"layers": 2, "width": 16, "head_width": 4, "patch_size": 4, "image_size": SIDE, "mlp_ratio": 2.0}
    text = {"context_length": 7, "vocab_size": WORDS, "width": 24, "heads": 6, "layers": 2}
    return CLIP(12, {**visual, **facts}, {**text, **facts})


def custom_clip() -> nn.Module:
    """With a tower of timm, and the text tower as a module of its own."""
    from open_clip.model import CustomTextCLIP

    visual = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "timm_pool": "token", "image_size": 224}
    text = {"context_length": 7, "vocab_size": WORDS, "width": 24, "heads": 6, "layers": 2, "proj_bias": True}
    model = CustomTextCLIP(12, visual, text, init_logit_bias=-10)
    del model.visual.trunk.blocks[2:]
    return model


def text_tower() -> nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(context_length=7, vocab_size=WORDS, width=24, heads=6, layers=2, output_dim=12)


def hugging_face(name: str, config: str, **facts: Any) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"vocab_size": WORDS, "max_position_embeddings": 12}
    vision = {"image_size": SIDE, "patch_size": 4}
    made = getattr(transformers, config)(**sizes, **(vision if config == "ViTConfig" else text), **facts)
    return getattr(transformers, name)(made)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": WORDS, "max_position_embeddings": 12}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


def torch_encoder(separate: bool = False, **facts: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **facts)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, norm=nn.LayerNorm(16))
    for each in model.layers if separate else ():
        _separate(each.self_attn)
    return model


def _separate(attention: nn.MultiheadAttention) -> None:
    """Queries, keys and values with a weight of their own, which PyTorch makes where keys have another width."""
    for name, weight in zip("qkv", attention.in_proj_weight.chunk(3), strict=True):
        setattr(attention, f"{name}_proj_weight", nn.Parameter(weight.clone()))
    attention.register_parameter("in_proj_weight", None)
    attention._qkv_same_embed_dim = False


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3))


def conv_stack() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.GroupNorm(1, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(6 * 16), nn.Linear(6 * 16, 10), nn.ReLU(), nn.Linear(10, 3))


@dataclass(frozen=True)
class Net:
    """A network, inputs for it, and how many permutations it has with segments of residual streams and with whole ones."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    segments: int
    shared: int
    heads: int = 0  # one number for all attention layers that a state dict alone needs; -1 where there are several


def _vit(build: Callable[[], nn.Module], extra: int = 0) -> Net:
    return Net(build, lambda: (picture(),), 9 + extra, 5 + extra, 4)


def _bert(build: Callable[[], nn.Module], extra: int = 0) -> Net:
    return Net(build, lambda: (words(),), 9 + extra, 5 + extra, 4)


NETS: Mapping[str, Net] = {
    "resnet18": Net(lambda: tv.resnet18(num_classes=5), lambda: (picture(32),), 17, 12),
    "resnet-bottleneck": Net(bottlenecks, lambda: (picture(32),), 22, 19),
    "torchvision-vit": _vit(torchvision_vit),
    "torchvision-vit-pre-logits": _vit(lambda: torchvision_vit(representation_size=8), 1),
    "torchvision-vit-headless": _vit(lambda: torchvision_vit(headless=True)),
    "encoder": Net(torch_encoder, lambda: (vectors(2, 5, 16),), 4, 4, 4),
    "encoder-pre-norm": Net(lambda: torch_encoder(norm_first=True), lambda: (vectors(2, 5, 16),), 4, 4, 4),
    "encoder-separate": Net(lambda: torch_encoder(separate=True), lambda: (vectors(2, 5, 16),), 4, 4, 4),
    "small-resnet": Net(lambda: SmallResNet((3, SIDE, SIDE)), lambda: (picture(),), 7, 7),
    "small-resnet-tasks": Net(lambda: Tasks(SmallResNet((3, SIDE, SIDE))), lambda: (picture(),), 7, 7),
    "small-convnet": Net(lambda: SmallConvNet((3, SIDE, SIDE)), lambda: (picture(),), 2, 2),
    "small-convnet-tasks": Net(lambda: Tasks(SmallConvNet((3, SIDE, SIDE))), lambda: (picture(),), 3, 3),
    "small-vit": _vit(lambda: SmallViT((3, SIDE, SIDE), 16, 2, 4)),
    "small-vit-tasks": _vit(lambda: Tasks(SmallViT((3, SIDE, SIDE), 16, 2, 4))),
    "resnet18-tasks": Net(lambda: Tasks(ResNet18((3, 32, 32))), lambda: (picture(32),), 17, 12),
    "mlp": Net(mlp, lambda: (vectors(4, 6),), 2, 2),
    "conv-stack": Net(conv_stack, lambda: (picture(),), 3, 3),
}
# Those whose libraries take seconds to import.
SLOW: Mapping[str, Net] = {
    "timm-resnet": Net(timm_resnet, lambda: (picture(32),), 16, 15),
    "timm-vit": _vit(lambda: timm_vit(num_classes=5)),
    "timm-vit-headless": _vit(lambda: timm_vit(num_classes=0, init_values=0.1, reg_tokens=2, pre_norm=True)),
    "timm-vit-mean": _vit(lambda: timm_vit(num_classes=5, init_values=0.1, fc_norm=True, global_pool="avg")),
    "clip": Net(clip, lambda: (picture(), words()), 18, 10, -1),
    "clip-scaled": Net(lambda: clip(ls_init_value=0.1), lambda: (picture(), words()), 18, 10, -1),
    "clip-custom": Net(custom_clip, lambda: (picture(224), words()), 18, 10, -1),
    "clip-visual": _vit(lambda: clip().visual),
    "clip-text": Net(text_tower, lambda: (words(),), 9, 5, 6),
    "bert": _bert(lambda: hugging_face("BertModel", "BertConfig")),
    "bert-classifier": _bert(lambda: hugging_face("BertForSequenceClassification", "BertConfig"), 1),
    "bert-tokens": _bert(lambda: hugging_face("BertForTokenClassification", "BertConfig")),
    "bert-spans": _bert(lambda: hugging_face("BertForQuestionAnswering", "BertConfig")),
    "roberta-classifier": _bert(lambda: hugging_face("RobertaForSequenceClassification", "RobertaConfig"), 1),
    "electra-classifier": _bert(lambda: hugging_face("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8), 2),
    "distilbert-classifier": _bert(distilbert, 1),
    "hugging-face-vit": _vit(lambda: hugging_face("ViTModel", "ViTConfig")),
    "hugging-face-vit-classifier": _vit(lambda: hugging_face("ViTForImageClassification", "ViTConfig")),
}
