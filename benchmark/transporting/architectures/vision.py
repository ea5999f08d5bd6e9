"""Vision Transformers."""

from __future__ import annotations

from dataclasses import replace

from shiftproof.benchmark.transporting.architectures.readers import add_readers
from shiftproof.benchmark.transporting.architectures.transformers import Block, add_blocks
from shiftproof.benchmark.transporting.drafting import FIXED, Draft

TIMM = Block(
    out="attn.proj",
    first="mlp.fc1",
    second="mlp.fc2",
    fused=("attn.qkv.weight", "attn.qkv.bias"),
    entry=("norm1",),
    between=("ls1", "norm2"),
    exit=("ls2",),
)
TORCHVISION = Block(
    out="self_attention.out_proj",
    first="mlp.0",
    second="mlp.3",
    fused=("self_attention.in_proj_weight", "self_attention.in_proj_bias"),
    entry=("ln_1",),
    between=("ln_2",),
)
HUGGING_FACE = Block(
    out="attention.output.dense",
    first="intermediate.dense",
    second="output.dense",
    separate=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    entry=("layernorm_before",),
    between=("layernorm_after",),
)
# The same since version 5 of transformers.
RENAMED = replace(
    HUGGING_FACE,
    out="attention.o_proj",
    first="mlp.fc1",
    second="mlp.fc2",
    separate=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)


def timm_vit(draft: Draft) -> None:
    """`timm.models.VisionTransformer`, and `SmallViT`."""
    stream = draft.unit("stream")
    draft.layer("patch_embed.proj" if draft.has("patch_embed.proj.weight") else "patch_embed", stream, FIXED)
    for name in ("cls_token", "reg_token", "pos_embed"):
        draft.tensor(name, FIXED, FIXED, stream)
    draft.norm("norm_pre", stream)
    units = add_blocks(draft, TIMM, "blocks.", stream)
    draft.norm("norm", units)
    draft.norm("fc_norm", units)
    add_readers(draft, units)


def torchvision_vit(draft: Draft) -> None:
    """`torchvision.models.VisionTransformer`."""
    stream = draft.unit("stream")
    draft.layer("conv_proj", stream, FIXED)
    for name in ("class_token", "encoder.pos_embedding"):
        draft.tensor(name, FIXED, FIXED, stream)
    units = add_blocks(draft, TORCHVISION, "encoder.layers.encoder_layer_", stream)
    draft.norm("encoder.ln", units)
    add_readers(draft, units)


def hugging_face_vit(draft: Draft) -> None:
    """`transformers.ViTModel` and what stands on it."""
    stream = draft.unit("stream")
    draft.layer("embeddings.patch_embeddings.projection", stream, FIXED)
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        draft.tensor(name, FIXED, FIXED, stream)
    block, start = (RENAMED, "layers.") if draft.has("layers.0.attention.q_proj.weight") else (HUGGING_FACE, "encoder.layer.")
    units = add_blocks(draft, block, start, stream)
    draft.norm("layernorm", units)
    add_readers(draft, units, pooler="pooler.dense")
