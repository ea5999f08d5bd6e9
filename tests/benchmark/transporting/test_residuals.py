"""Residual maps against a forward pass that has them written out, and their rounding against an assignment problem."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark.backbones import Block, SmallViT
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.residuals import interpolated, residual_maps, rounded, settled
from tests.releases import alike, answers, drawn, loaded, pictures, whole


@torch.no_grad()
def with_maps(state: StateDict, maps: dict[str, Tensor]) -> Tensor:
    """Logits of head 1, the skip of each half of a block multiplied by its matrix: thesis eq. 8.25."""
    model = loaded(state)
    backbone = model.backbone
    assert isinstance(backbone, SmallViT)
    patches = backbone.patch_embed(2 * pictures() - 1).flatten(2).transpose(1, 2)
    x = torch.cat([backbone.cls_token.expand(len(patches), -1, -1), patches], dim=1) + backbone.pos_embed
    for place, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        first, second = (F.one_hot(maps[f"backbone.blocks.{place}.{part}"], 16).float() for part in ("middle", "stream"))
        x = x @ first.T + block.attn(block.norm1(x))
        x = x @ second.T + block.mlp(block.norm2(x))
    features: Tensor = nn.functional.layer_norm(x, (16,), backbone.norm.weight, backbone.norm.bias)[:, 0]
    return model.head(1)(features)


def random_segments(seed: int) -> dict[str, Tensor]:
    return whole().random(torch.Generator().manual_seed(seed))


def test_a_network_of_random_segments_keeps_its_function_with_the_maps_written_out() -> None:
    source, units = drawn(0), random_segments(2)
    assert alike(answers(source), with_maps(whole().apply(source, units), residual_maps(whole(), units)))


def test_settling_gives_the_plain_network_that_computes_the_same() -> None:
    maps = {
        name: torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(whole().chains[0][1:])
    }
    state = drawn(3)
    assert alike(with_maps(state, maps), answers(settled(whole(), state, maps)))


def test_settling_without_maps_changes_nothing() -> None:
    state = drawn(3)
    assert all(tensor.equal(state[name]) for name, tensor in settled(whole(), state, {}).items())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.9, 1.0])
def test_a_map_on_its_way_to_the_identity_is_rounded_to_the_nearest_permutation(share: float) -> None:
    units = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mixed = (1 - share) * F.one_hot(units, 9).double() + share * torch.eye(9, dtype=torch.float64)
    nearest = linear_sum_assignment(mixed.numpy(), maximize=True)[1]
    assert rounded({"map": units}, share)["map"].tolist() == nearest.tolist()


def test_the_line_begins_at_the_function_of_the_source_and_ends_at_the_target() -> None:
    source, target, units = drawn(0), drawn(1), random_segments(2)
    moved, maps = whole().apply(source, units), residual_maps(whole(), units)
    assert alike(answers(source), answers(interpolated(whole(), moved, target, maps, 0.0)))
    assert alike(answers(target), answers(interpolated(whole(), moved, target, maps, 1.0)))


def test_one_permutation_for_the_whole_stream_needs_no_maps() -> None:
    shared = whole().shared()
    units = whole().spread(shared.random(torch.Generator().manual_seed(1)))
    assert all(r.equal(torch.arange(16)) for r in residual_maps(whole(), units).values())
