"""Two releases of a small Transformer, one of them a renumbered copy of the other, or both drawn on their own."""

from __future__ import annotations

import torch

from shiftproof.benchmark import Model, TransportExperience
from shiftproof.benchmark.backbones import SmallViT
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.specification import PermutationSpec

SHAPE = (3, 8, 8)
TASK = 1


def network() -> Model:
    """Two blocks of width 16 with 4 heads; head 0 of five classes, head 1 of two."""
    return Model(SmallViT(SHAPE, width=16, depth=2, heads=4), {0: 5, TASK: 2})


def drawn(seed: int, scale: float = 0.5) -> StateDict:
    """Every tensor at random, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(t.shape, generator=generator) for name, t in network().state_dict().items()}


def whole() -> PermutationSpec:
    """Of the network, one permutation a segment."""
    return derive_model(network())


def noisy(state: StateDict, noise: float, seed: int = 9) -> StateDict:
    """With noise upon every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + noise * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def renumbered(state: StateDict, seed: int, noise: float = 0.0) -> tuple[StateDict, dict[str, torch.Tensor]]:
    """The same function with units in another order, and that order under the names of all segments."""
    shared = whole().shared()
    order = shared.random(torch.Generator().manual_seed(seed))
    return noisy(shared.apply(state, order), noise), whole().spread(order)


def loaded(state: StateDict) -> Model:
    """The network with these tensors."""
    model = network()
    model.load_state_dict(state)
    return model.eval()


def experience(base: StateDict, tuned: StateDict, target: StateDict) -> TransportExperience:
    """With head 0 shared and head 1 the task's own."""
    own = network().head_keys(TASK)
    shared = frozenset(base) - own
    return TransportExperience(0, "task", TASK, loaded(base), loaded(tuned), shared, target_base=loaded(target))


def pictures(count: int = 6, seed: int = 3) -> torch.Tensor:
    """(count, 3, 8, 8) float32."""
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answers(state: StateDict, task: int = TASK) -> torch.Tensor:
    """(6, C) logits of the pictures."""
    logits: torch.Tensor = loaded(state)(pictures(), task)
    return logits


def alike(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two outputs differ by less than this share of the largest."""
    return bool((one - other).abs().max() <= tolerance * one.abs().max())
