"""Vision Transformers: timm's, which the small one here follows."""

from __future__ import annotations

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


def timm_vit(draft: Draft, heads: int) -> None:
    """`timm.models.VisionTransformer`, and `SmallViT`."""
    patches = "patch_embed.proj" if draft.has("patch_embed.proj.weight") else "patch_embed"
    draft.layer(patches, "stream", FIXED)
    for name in ("cls_token", "reg_token", "pos_embed"):
        draft.tensor(name, FIXED, FIXED, "stream")
    draft.norm("norm_pre", "stream")
    draft.output = add_blocks(draft, TIMM, draft.numbered("blocks"), "stream", heads)
    draft.norm("norm", draft.output)
    draft.norm("fc_norm", draft.output)
