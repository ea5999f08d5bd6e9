"""Residual maps: what a residual stream needs where its permutation changes from segment to segment (thesis section 8.5.3).

Where the stream before a block carries P_in and behind it P_out, the skip has to apply I = P_out P_in^T (eq. 8.6). All maps are
permutations, so that a network with maps computes what the plain one does whose segments were renumbered back along them:
no architecture has to be rewritten to run one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.specification import Permutations, PermutationSpec

ResidualMaps = Mapping[str, Tensor]
"""Name of a segment to (n,) int64 r: unit i behind the skip is unit r[i] before it."""


def residual_maps(specification: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    """The maps that keep the function of a network whose segments were permuted, eq. 8.6."""
    found = {}
    for chain in specification.chains:
        for before, after in pairwise(chain):
            found[after] = torch.argsort(permutations[before])[permutations[after]]
    return found


def settled(specification: PermutationSpec, state: StateDict, maps: ResidualMaps) -> StateDict:
    """The plain network that computes what `state` does with these residual maps.

    Args:
        maps: Segments that are missing have the identity.
    """
    back = {}
    for chain in specification.chains:
        position = torch.arange(specification.sizes[chain[0]])  # of each unit of the segment in the first one
        for name in chain[1:]:
            if name in maps:
                position = position[maps[name]]
            back[name] = torch.argsort(position)
    return specification.apply(state, back)


def rounded(maps: ResidualMaps, share: float) -> dict[str, Tensor]:
    """The permutations next to (1 - share) I + share * identity, as an assignment problem would round it.

    In every cycle of I either I or the identity has the greater weight, the same in all of them; at a half both are next,
    and I is taken.

    Args:
        share: Of the way to a network without maps, in [0, 1].
    """
    return {name: r if share <= 0.5 else torch.arange(len(r)) for name, r in maps.items()}


def interpolated(
    specification: PermutationSpec, aligned: StateDict, target: StateDict, maps: ResidualMaps, share: float
) -> StateDict:
    """The plain network for the model at `share` of the way from pi(theta_A) with its maps to theta_B without.

    Args:
        aligned: pi(theta_A).
        target: theta_B.
        maps: Of pi(theta_A); {} leaves the maps out.
    """
    mixed = {
        name: torch.lerp(tensor, target[name], share) if tensor.is_floating_point() else target[name]
        for name, tensor in aligned.items()
    }
    return settled(specification, mixed, rounded(maps, share))
