"""The plane through a base and two experts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import EvalSet, ExpertExperience, state_sha256
from shiftproof.benchmark.merging.driver import STATISTICS
from shiftproof.benchmark.models import Model


@dataclass(frozen=True, eq=False)
class Plane:
    """Models base + l1 (first - base) + l2 (second - base).

    Floating-point tensors that both experts have in common move. Running statistics are no parameters: they take the mean of
    the experts' with l1 and l2 as weights, so that a variance stays positive, the ends of the line l1 + l2 = 1 are the experts,
    and (1, 1) has the plain mean as every merge does. A head that is private to one expert stays as this expert left it.

    Raises:
        InputError: If both are the same.
    """

    first: ExpertExperience
    second: ExpertExperience

    def __post_init__(self) -> None:
        if state_sha256(self.first.expert.state_dict()) == state_sha256(self.second.expert.state_dict()):
            raise InputError(
                f"expected two different models, got {self.first.name!r} and {self.second.name!r} with equal weights"
            )

    @property
    def names(self) -> tuple[str, str]:
        """Of the two experts."""
        return self.first.name, self.second.name

    def model_at(self, l1: float, l2: float) -> Model:
        """The model at a point, on the device of the base."""
        ours, theirs = self.first.expert.state_dict(), self.second.expert.state_dict()
        state = {}
        for name, base in self.first.base.state_dict().items():
            if name in self._common and base.is_floating_point():
                weights = (l1, l2) if name.rpartition(".")[2] not in STATISTICS else _normalized(l1, l2)
                state[name] = _moved(base, ours[name], theirs[name], weights)
            else:
                state[name] = _owned(name, base, (self.first, ours), (self.second, theirs))
        model = deepcopy(self.first.base)
        model.load_state_dict(state)
        return model

    def answerable(self, evals: tuple[EvalSet, ...]) -> tuple[EvalSet, ...]:
        """The eval sets whose tasks have a head that one of the experts has learned or that all share.

        Raises:
            InputError: If there is none.
        """
        known = self._common | self.first.private | self.second.private
        kept = tuple(one for one in evals if all(self.first.base.head_keys(task) <= known for task, _ in one.parts))
        if not kept:
            asked = ", ".join(one.name for one in evals)
            raise InputError(f"expected an eval set with a task of {' or '.join(self.names)}, got {asked}; choose others")
        return kept

    @property
    def _common(self) -> frozenset[str]:
        return self.first.shared | (self.first.private & self.second.private)


def base_as_expert(like: ExpertExperience) -> ExpertExperience:
    """The base in the place of an expert, as one end of a line."""
    return replace(like, name="base", expert=like.base)


def _moved(base: Tensor, ours: Tensor, theirs: Tensor, weights: tuple[float, float]) -> Tensor:
    wide = base.double()
    moved = wide + weights[0] * (ours.double() - wide) + weights[1] * (theirs.double() - wide)
    return moved.to(base.dtype)


def _normalized(l1: float, l2: float) -> tuple[float, float]:
    total = abs(l1) + abs(l2)
    return (abs(l1) / total, abs(l2) / total) if total else (0.0, 0.0)


def _owned(name: str, base: Tensor, *ends: tuple[ExpertExperience, dict[str, Tensor]]) -> Tensor:
    """What the expert to which a tensor is private has, or else the base."""
    for expert, state in ends:
        if name in expert.private:
            return state[name]
    return base


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the parameters of a model lie."""
    return next(model.parameters()).device
