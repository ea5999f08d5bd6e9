"""Which architecture a state dict belongs to, and its specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures import clip, convolutional, text, vision
from shiftproof.benchmark.transporting.architectures.modules import check_module, heads_of, shapes_of
from shiftproof.benchmark.transporting.drafting import Draft, HeadCount
from shiftproof.benchmark.transporting.specification import PermutationSpec, Shapes


@dataclass(frozen=True)
class Family:
    """An architecture that is told by its names.

    Attributes:
        marks: Tensors that all of them have, below a common prefix.
        draft: Adds its tensors.
    """

    name: str
    marks: tuple[str, ...]
    draft: Callable[[Draft], None]

    def prefixes(self, shapes: Shapes) -> list[str]:
        """Where there is one of the family."""
        mark = self.marks[0]
        found = [name[: -len(mark)] for name in shapes if name == mark or name.endswith(f".{mark}")]
        return [prefix for prefix in found if all(prefix + other in shapes for other in self.marks)]


BLOCK = "transformer.resblocks.0.attn.in_proj_weight"
WORDS = "embeddings.word_embeddings.weight"
PATCHES = "embeddings.patch_embeddings.projection.weight"
FAMILIES = (
    Family("timm's Vision Transformer", ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"), vision.timm_vit),
    Family(
        "torchvision's Vision Transformer",
        ("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "conv_proj.weight"),
        vision.torchvision_vit,
    ),
    Family("a Hugging Face ViT", (PATCHES, "encoder.layer.0.attention.attention.query.weight"), vision.hugging_face_vit),
    Family("a Hugging Face ViT", (PATCHES, "layers.0.attention.q_proj.weight"), vision.hugging_face_vit),
    Family("a visual tower of open_clip", ("class_embedding", "conv1.weight", BLOCK), clip.visual_tower),
    Family("a text tower of open_clip", ("token_embedding.weight", BLOCK), clip.text_tower),
    Family("a BERT-type encoder", (WORDS, "encoder.layer.0.attention.self.query.weight"), text.bert),
    Family("a DistilBERT", (WORDS, "transformer.layer.0.attention.q_lin.weight"), text.distilbert),
    Family("nn.TransformerEncoder", ("layers.0.self_attn.out_proj.weight", "layers.0.linear1.weight"), text.torch_encoder),
    Family("a ResNet", ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight"), convolutional.resnet),
    Family("a small ResNet", ("stem.weight", "norm.weight", "stages.0.conv1.weight"), convolutional.small_resnet),
)


def derive(shapes: Shapes, heads: int = 0) -> PermutationSpec:
    """The specification of a state dict of a known architecture, whatever prefix its names begin with.

    Of open_clip's towers of up to 1024 units the heads are 64 units wide unless their number is given. In a checkpoint with
    both towers a given number is that of the visual tower.

    Args:
        shapes: Of its tensors.
        heads: Attention heads; shapes do not tell them.

    Raises:
        InputError: If no family is known by these names, tensors are left over, or the heads are not given or do not fit.
    """
    towers = any("visual." in name for name in shapes)
    return _derive(shapes, lambda block: 0 if towers and "visual." not in block else heads)


def derive_model(model: nn.Module) -> PermutationSpec:
    """The specification of a module, whose numbers of heads are read off it.

    Raises:
        InputError: As `derive`; also where weights are tied, or a layer is none that a specification can be derived for.
    """
    check_module(model)
    return _derive(shapes_of(model), lambda block: heads_of(model.get_submodule(block.removesuffix("."))))


def _derive(shapes: Shapes, heads: HeadCount) -> PermutationSpec:
    draft = Draft(shapes, heads)
    drafters = [(family.draft, prefix) for family in FAMILIES for prefix in family.prefixes(shapes)]
    numbered = [] if drafters else convolutional.stacks(list(shapes))
    if len(numbered) == 1:
        drafters = [(convolutional.stack, numbered[0])]
    if not drafters:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
        some = ", ".join(list(shapes)[:3])
        raise InputError(f"expected the tensors of {known} or one nn.Sequential, got {some} and so on; give a specification")
    for add, prefix in drafters:
        part = draft.at(prefix)
        add(part)
        draft.output = part.output
        if draft.output and len(drafters) > 1:
            raise InputError(
                f"expected one network or two towers with a joint embedding, got {len(drafters)} networks; give a specification"
            )
    return draft.finish()
