"""Text encoders of Hugging Face, and PyTorch's own encoder."""

from __future__ import annotations

import re

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures.readers import add_readers
from shiftproof.benchmark.transporting.architectures.transformers import Block, add_blocks
from shiftproof.benchmark.transporting.drafting import FIXED, Draft

BERT = Block(
    out="attention.output.dense",
    first="intermediate.dense",
    second="output.dense",
    separate=("attention.self.query", "attention.self.key", "attention.self.value"),
    between=("attention.output.LayerNorm",),
    exit=("output.LayerNorm",),
)
DISTILBERT = Block(
    out="attention.out_lin",
    first="ffn.lin1",
    second="ffn.lin2",
    separate=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    between=("sa_layer_norm",),
    exit=("output_layer_norm",),
)
TORCH = Block(
    out="self_attn.out_proj",
    first="linear1",
    second="linear2",
    fused=("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    entry=("norm1", "norm2"),
)
# Heads that predict words, whose weights are those of the embedding.
TIED = re.compile(
    r"(?:.*\.)?(?:cls\.predictions|lm_head|vocab_transform|vocab_projector|generator_(?:predictions|lm_head))\..*"
)


def bert(draft: Draft) -> None:
    """`transformers.BertModel`, `RobertaModel`, `ElectraModel` and what stands on them."""
    units = add_blocks(draft, BERT, "encoder.layer.", _embeddings(draft))
    add_readers(draft, units, pooler="pooler.dense")


def distilbert(draft: Draft) -> None:
    """`transformers.DistilBertModel` and what stands on it."""
    units = add_blocks(draft, DISTILBERT, "transformer.layer.", _embeddings(draft))
    add_readers(draft, units)


def torch_encoder(draft: Draft) -> None:
    """`nn.TransformerEncoder`: what it reads and returns is the residual stream, so that the stream stays as it is."""
    add_blocks(draft, TORCH, "layers.", FIXED)
    for prefix in draft.numbered("layers."):
        for part in ("q", "k", "v"):
            draft.tensor(f"{prefix}self_attn.{part}_proj_weight", draft.unit(f"{prefix}attention"), FIXED)
    draft.norm("norm", FIXED)
    add_readers(draft, FIXED)


def _embeddings(draft: Draft) -> str:
    """The embeddings of words, positions and types, which are added up.

    Returns:
        The permutation of the stream behind them.
    """
    tied = [name for name in draft.shapes if TIED.fullmatch(name)]
    if tied:
        raise InputError(f"{tied[0]}: expected a model without tied weights, got a head that shares the embedding's; remove it")
    stream = draft.unit("stream")
    units = draft.unit("embeddings") if draft.has("embeddings_project.weight") else stream
    for name in ("word", "position", "token_type"):
        draft.tensor(f"embeddings.{name}_embeddings.weight", FIXED, units)
    for name in ("position_ids", "token_type_ids"):
        draft.tensor(f"embeddings.{name}")
    draft.norm("embeddings.LayerNorm", units)
    draft.layer("embeddings_project", stream, units)
    return stream
