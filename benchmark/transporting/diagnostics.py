"""What an alignment can be told by before anything is paid for: how alike both models are with it and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.alignment import STATISTICS, Alignment, inner_product
from shiftproof.benchmark.transporting.specification import Permutations

DRAWS = 3  # random permutations that a matched similarity is compared with
WHOLE = "all"


@dataclass(frozen=True)
class LayerMatch:
    """Cosine similarity of a layer's tensors in both models.

    Attributes:
        layer: Its name; `WHOLE` for all layers together.
        parameters: In tensors with an axis that is permuted.
        before: With the source as it is.
        matched: With the aligned source.
        random: With random permutations that preserve the function, mean over draws.
    """

    layer: str
    parameters: int
    before: float
    matched: float
    random: float


@dataclass(frozen=True)
class Moved:
    """How far a permutation is from the identity.

    Attributes:
        units: Share of its units that change their place; of a random one 1 - 1/n do in the mean.
        heads: Share of its attention heads that do; None where it has none.
    """

    permutation: str
    size: int
    units: float
    heads: float | None


def matches(alignment: Alignment, source: StateDict, target: StateDict, seed: int = 0) -> list[LayerMatch]:
    """A row for all layers together, then one a layer in the order of depth.

    Args:
        seed: Of the random permutations.
    """
    specification = alignment.specification
    generator = torch.Generator().manual_seed(seed)
    draws = [specification.random(generator) for _ in range(DRAWS)]
    candidates: list[Permutations] = [{}, alignment.permutations, *draws]
    sums: dict[str, Tensor] = {}
    for name, axes in specification.axes.items():
        if not any(axes) or name.endswith(STATISTICS):
            continue
        ours, theirs = target[name], source[name]
        products = [inner_product(ours, specification.apply_to(name, theirs, one)) for one in candidates]
        norms = [inner_product(tensor, tensor) for tensor in (ours, theirs)]
        found = torch.tensor([*products, *norms, ours.numel()], dtype=torch.float64)
        for layer in (WHOLE, name.rpartition(".")[0] or name):
            sums[layer] = sums.get(layer, torch.zeros(len(found), dtype=torch.float64)) + found
    return [_row(layer, found) for layer, found in sums.items()]


def moves(alignment: Alignment) -> list[Moved]:
    """How far each permutation is from the identity, in the order of depth."""
    return [_moved(alignment, name, units) for name, units in alignment.permutations.items()]


def _row(layer: str, sums: Tensor) -> LayerMatch:
    products, (ours, theirs, count) = sums[:-3], sums[-3:]
    cosines: Sequence[float] = (products / (ours * theirs).sqrt().clamp(min=torch.finfo(torch.float64).tiny)).tolist()
    return LayerMatch(layer, int(count), cosines[0], cosines[1], sum(cosines[2:]) / DRAWS)


def _moved(alignment: Alignment, name: str, units: Tensor) -> Moved:
    size = len(units)
    share = float((units != torch.arange(size)).double().mean())
    heads = alignment.specification.heads.get(name)
    if heads is None:
        return Moved(name, size, share, None)
    own = torch.arange(size) // (size // heads)
    stays = (units // (size // heads) == own).view(heads, -1).all(1)
    return Moved(name, size, share, float((~stays).double().mean()))
