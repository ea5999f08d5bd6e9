"""What every merge is measured against: the base, the experts themselves, and the ensemble of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftproof.benchmark import ExpertExperience, Model, RunContext, StrategySpec, evaluating, hookimpl


@dataclass(frozen=True)
class ReferenceConfig:
    """No knobs."""


class ZeroShot:
    """The base with the stream's zero-shot head, or with the class means of its features on the source experiences."""

    def __init__(self, config: ReferenceConfig, context: RunContext) -> None:
        self.net = context.new_model()

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Fit the head of a task where the base brings none; the expert is not looked at."""
        data = experience.data
        assert data is not None
        if not experience.has_zero_shot_head:
            features = self._features(data.train.inputs(slice(None)))
            set_class_means(self.net.head(experience.task), features, data.train.y)
        return {}

    def model(self) -> nn.Module:
        """The base."""
        return self.net

    def _features(self, x: Tensor) -> Tensor:
        device = next(self.net.parameters()).device
        with evaluating(self.net), torch.no_grad():
            return torch.cat([self.net.features(part.to(device)) for part in x.split(512)])


def set_class_means(head: nn.Linear, features: Tensor, y: Tensor) -> None:
    """Make a linear head answer with the nearest class mean: w_c = mean_c, b_c = -|mean_c|^2 / 2.

    Args:
        head: (C, D); a class without samples is never the answer.
        features: (N, D) float32.
        y: (N,) int64.
    """
    with torch.no_grad():
        for label in range(head.out_features):
            members = features[(y == label).to(features.device)]
            centre = members.mean(0) if len(members) else torch.zeros_like(head.weight[label])
            head.weight[label] = centre
            lowest = torch.finfo(centre.dtype).min / 2
            head.bias[label] = -centre.square().sum() / 2 if len(members) else lowest


class Routed(nn.Module):
    """Each sample is answered by the network of its own task.

    Args:
        networks: One a task id; a task without one is answered by `fallback`.
    """

    def __init__(self, networks: Mapping[int, nn.Module], fallback: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({str(task): network for task, network in networks.items()})
        self.fallback = fallback

    def forward(self, x: Tensor, task: int) -> Tensor:
        """(B, C) logits of (B, ...) inputs of one task."""
        known = str(task) in self.networks
        logits: Tensor = (self.networks[str(task)] if known else self.fallback)(x, task)
        return logits


class Averaged(nn.Module):
    """Mean of the logits of several networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor, task: int) -> Tensor:
        """(B, C) logits of (B, ...) inputs of one task."""
        logits: Tensor = self.networks[0](x, task)
        for network in list(self.networks)[1:]:
            logits = logits + network(x, task)
        return logits / len(self.networks)


class Experts:
    """Each task by its own expert; where a domain is held out, by the expert of that very domain."""

    def __init__(self, config: ReferenceConfig, context: RunContext) -> None:
        self.base = context.new_model()
        self.networks: dict[int, nn.Module] = {}

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Keep the expert."""
        self.networks[experience.task] = experience.expert
        return {}

    def model(self) -> nn.Module:
        """All experts; a task that has none yet is answered by the base."""
        return Routed(self.networks, self.base)


class Ensemble:
    """Mean logits of all experts, each with the private heads of every task."""

    def __init__(self, config: ReferenceConfig, context: RunContext) -> None:
        self.experts: list[Model] = []
        self.private: dict[str, Tensor] = {}

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Keep the expert and what is private to its task."""
        self.experts.append(experience.expert)
        state = experience.expert.state_dict()
        self.private.update({name: state[name] for name in experience.private})
        return {}

    def model(self) -> nn.Module:
        """All experts side by side."""
        networks = [deepcopy(expert) for expert in self.experts]
        for network in networks:
            network.load_state_dict(self.private, strict=False)
        return Averaged(networks)


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`zero-shot`, `experts` and `ensemble`."""
    return [
        StrategySpec(
            "zero-shot",
            ZeroShot,
            ReferenceConfig,
            ExpertExperience,
            reference="Radford et al., Learning Transferable Visual Models, ICML 2021, arXiv:2103.00020; "
            "nearest class mean: Mensink et al., TPAMI 2013",
            needs_data=True,
        ),
        StrategySpec(
            "experts",
            Experts,
            ReferenceConfig,
            ExpertExperience,
            reference="Chaves et al., Bridging Domains through Subspace-Aware Model Merging, Table 1",
            uses_target=True,
        ),
        StrategySpec(
            "ensemble",
            Ensemble,
            ReferenceConfig,
            ExpertExperience,
            reference="Chaves et al., Bridging Domains through Subspace-Aware Model Merging, Table 2",
        ),
    ]
