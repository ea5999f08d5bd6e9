"""The two towers of open_clip's models. Their joint embedding stays as it is."""

from __future__ import annotations

from shiftproof.benchmark.transporting.architectures.readers import add_readers
from shiftproof.benchmark.transporting.architectures.transformers import Block, add_blocks
from shiftproof.benchmark.transporting.drafting import FIXED, Draft

BLOCK = Block(
    out="attn.out_proj",
    first="mlp.c_fc",
    second="mlp.c_proj",
    fused=("attn.in_proj_weight", "attn.in_proj_bias"),
    entry=("ln_1",),
    between=("ls_1", "ln_2"),
    exit=("ls_2",),
)
HEAD_WIDTH = 64  # OpenAI's convention
NARROW = 1024  # up to this width all of open_clip's configurations follow it, beyond it few do


def visual_tower(draft: Draft) -> None:
    """`open_clip.transformer.VisionTransformer`."""
    stream = draft.unit("stream")
    draft.layer("conv1", stream, FIXED)
    draft.tensor("class_embedding", stream)
    draft.tensor("positional_embedding", FIXED, stream)
    draft.norm("ln_pre", stream)
    units = _blocks(draft, stream)
    draft.norm("ln_post", units)
    _project(draft, units, "proj")


def text_tower(draft: Draft) -> None:
    """`open_clip.transformer.TextTransformer`, and what `open_clip.CLIP` makes of it."""
    stream = draft.unit("stream")
    draft.tensor("token_embedding.weight", FIXED, stream)
    draft.tensor("positional_embedding", FIXED, stream)
    draft.tensor("attn_mask")
    units = _blocks(draft, stream)
    draft.norm("ln_final", units)
    _project(draft, units, "text_projection")


def _blocks(draft: Draft, stream: str) -> str:
    start = "transformer.resblocks."
    width = draft.shape(f"{start}0.attn.out_proj.weight")[0]
    return add_blocks(draft, BLOCK, start, stream, width // HEAD_WIDTH if width <= NARROW else 0)


def _project(draft: Draft, units: str, name: str) -> None:
    draft.tensor(name, units, FIXED)
    draft.layer(name, FIXED, units)
    projected = draft.has(name) or draft.has(f"{name}.weight")
    add_readers(draft, FIXED if projected else units)
