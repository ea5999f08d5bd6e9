"""Two published text encoders, aligned: opt-in, since they come from the user.

SHIFTPROOF_TEXT_ENCODERS names two safetensors files of BERT-type encoders of 12 heads with the names of `transformers`, put
together as paths on a PATH are. What both have in the same shape is compared, so that one may be deeper than the other.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.equivalence import check_equivalence
from shiftproof.plugins.transfusion import TransFusion, TransFusionConfig

FILES = [path for path in os.environ.get("SHIFTPROOF_TEXT_ENCODERS", "").split(os.pathsep) if path]
HEADS = 12
State = dict[str, Tensor]


def read_pair() -> tuple[State, State]:
    left, right = (load_file(path) for path in FILES)
    both = [name for name in left if name in right and left[name].shape == right[name].shape]
    encoder = [name for name in both if not name.endswith("position_ids") and "pooler" not in name]
    return {name: left[name] for name in encoder}, {name: right[name] for name in encoder}


def encoder_of(state: State) -> nn.Module:
    from transformers import BertConfig, BertModel

    words, width = state["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("attention.self.query.weight") for name in state),
        num_attention_heads=HEADS,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(state)
    return model


if FILES:

    @pytest.mark.xdist_group("slow-imports")
    def test_an_aligned_encoder_computes_what_it_did_and_is_nearer_to_the_other() -> None:
        source, target = read_pair()
        model, tokens = encoder_of(source), torch.arange(1000, 1032).view(2, 16)
        spec = derive_model(model)
        assert check_equivalence(model, spec, (tokens,)) < 1e-5
        found = TransFusion(TransFusionConfig(residual="shared")).align(source, target, spec)
        assert found.search.converged
        assert found.search.objective[-1] > found.search.objective[0]
        aligned, units = encoder_of(found.apply(source)), found.permutations[spec.output]
        with torch.no_grad():
            before, after = model(tokens).last_hidden_state, aligned(tokens).last_hidden_state
        assert (after - before[..., units]).abs().max() / before.abs().max() < 1e-5
        moved = [name for name, order in found.permutations.items() if not order.equal(torch.arange(len(order)))]
        assert any("hidden" in name for name in moved)

    @pytest.mark.xdist_group("slow-imports")
    def test_a_renumbered_encoder_is_brought_to_the_same_place() -> None:
        source, target = read_pair()
        spec, method = derive_model(encoder_of(source)), TransFusion(TransFusionConfig(residual="shared"))
        planted = spec.shared().random(torch.Generator().manual_seed(0))
        renumbered = spec.shared().apply(source, planted)
        expected = method.align(source, target, spec).apply(source)
        found = method.align(renumbered, target, spec).apply(renumbered)
        assert not renumbered["embeddings.LayerNorm.weight"].equal(source["embeddings.LayerNorm.weight"])
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
