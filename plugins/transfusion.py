"""TransFusion: a fine-tuning is carried to a new release of a Transformer, without data and without training.

Rinaldi, Capitani et al., Update Your Transformer to the Latest Release: Re-Basin of Task Vectors, ICML 2025; thesis chapter 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, Model, RunContext, StrategySpec, TransportExperience, evaluating, hookimpl
from shiftproof.strategies.transport import (
    Alignment,
    MatchConfig,
    Matching,
    PermutationSpec,
    Progress,
    RebasinStrategy,
    StateDict,
    TransportConfig,
    added,
    silent,
)


@dataclass(frozen=True)
class TransFusionConfig(TransportConfig, MatchConfig):
    """Defaults as the thesis has it; beside these, the knobs of the search."""

    # Permutations of the residual stream: one a segment (thesis section 8.2.1, step 3), one for all of it, or none.
    residual: Literal["segments", "shared", "none"] = "segments"


class TransFusion(RebasinStrategy[TransFusionConfig]):
    """Heads by their singular values, units within heads, hidden units and the residual stream by inner products.

    With one permutation a segment the aligned source needs residual maps (eq. 8.6) to compute what it did. Transport adds
    pi(tau) to theta_B, whose residuals stay the identity: as published.
    """

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """Algorithm 1."""
        forms = {
            "segments": lambda: specification,
            "shared": specification.shared,
            "none": specification.without_streams,
        }
        found = Matching(source, target, forms[self.config.residual](), self.config, progress).run()
        return Alignment(specification, specification.spread(found.permutations), found.search)


@dataclass(frozen=True)
class FewShotConfig(TransFusionConfig):
    """Thesis section 8.3.3; the optimizer is not published."""

    permute: bool = True  # False learns the coefficients of tau as it is
    shots: Annotated[int, Ge(1)] = 10  # of each class
    steps: Annotated[int, Ge(1)] = 100  # of Adam, on all shots at once
    lr: Annotated[float, Gt(0)] = 0.01


class FewShot(TransFusion):
    """theta_B + sum over layers of alpha_l pi(tau)_l, the coefficients learned on a few samples of the task (Table 8.3)."""

    config: FewShotConfig

    def __init__(self, config: FewShotConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.experience: TransportExperience | None = None
        self.alpha: dict[str, float] = {}

    def prepare(self, experience: TransportExperience) -> None:
        """Keep the data, which it declares that it needs."""
        super().prepare(experience)
        self.experience = experience

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """As TransFusion, or nothing is moved."""
        if self.config.permute:
            return super().align(source, target, specification, progress)
        return Alignment(specification, specification.identity())

    def transport(self, source_base: StateDict, task_vector: StateDict, target_base: StateDict) -> StateDict:
        """The target with every layer's part of pi(tau) scaled on its own."""
        super().transport(source_base, task_vector, target_base)
        assert self.alignment is not None
        assert self.experience is not None
        moved = self.alignment.apply(task_vector)
        expert = self.experience.expert.state_dict()
        heads = {name: self.carry(name, expert[name].detach().cpu()) for name in sorted(self.experience.private)}
        layers = sorted({_layer(name) for name in moved})
        learned = self._learn(moved, {**target_base, **heads}, layers)
        self.alpha = {layer: float(learned[i]) for i, layer in enumerate(layers)}
        return added(target_base, {name: self.alpha[_layer(name)] * delta for name, delta in moved.items()})

    def logs(self) -> Mapping[str, float]:
        """What the search took, and the mean coefficient."""
        return {**super().logs(), "mean_alpha": sum(self.alpha.values()) / len(self.alpha)}

    def _learn(self, moved: StateDict, start: StateDict, layers: list[str]) -> Tensor:
        """(L,) float32, the coefficients."""
        assert self.experience is not None
        assert self.experience.target_base is not None
        assert self.experience.data is not None
        assert self.context is not None
        net: Model = self.experience.target_base
        device = self.context.device
        shots = few_shots(self.experience.data.train, self.config.shots, self.context.generator("shots"))
        x, y = shots.inputs(slice(None)).to(device), shots.y.to(device)
        start = {name: tensor.to(device) for name, tensor in start.items()}
        moved = {name: delta.to(device) for name, delta in moved.items()}
        alpha = torch.full((len(layers),), self.config.alpha, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([alpha], self.config.lr)
        place = {layer: i for i, layer in enumerate(layers)}
        with evaluating(net):
            for _ in range(self.config.steps):
                scaled = {name: start[name] + alpha[place[_layer(name)]] * delta for name, delta in moved.items()}
                loss = F.cross_entropy(functional_call(net, {**start, **scaled}, (x, self.experience.task)), y)
                (alpha.grad,) = torch.autograd.grad(loss, [alpha])
                optimizer.step()
                self.context.cost.optimizer_steps += 1
                self.context.cost.samples_seen += len(y)
        return alpha.detach().cpu()


def few_shots(data: ArrayData, shots: int, generator: torch.Generator) -> ArrayData:
    """So many samples of each class, or all that there are; drawn without replacement."""
    chosen = []
    for label in data.y.unique():
        members = (data.y == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    index = torch.cat(chosen)
    return ArrayData(data.x[index], data.y[index])


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


REFERENCE = (
    "Rinaldi, Capitani et al., Update Your Transformer to the Latest Release: Re-Basin of Task Vectors, ICML 2025; "
    "thesis chapter 8"
)
RELEASED = TransFusionConfig(include_out_proj=True, order="random", schedule="released")


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`transfusion` and `transfusion-few-shot`."""
    return [
        StrategySpec(
            "transfusion",
            TransFusion,
            TransFusionConfig,
            TransportExperience,
            REFERENCE,
            presets={
                "paper": TransFusionConfig(),
                "released": RELEASED,
                "shared": TransFusionConfig(residual="shared"),
                # The rows of Table 8.4, and the variant without residuals of Fig. 8.4.
                "brute-force": TransFusionConfig(heads="brute-force"),
                "no-attention": TransFusionConfig(heads="identity"),
                "no-residual": TransFusionConfig(residual="none"),
                # theta_B with the aligned head alone: what gains are measured against.
                "head-only": TransFusionConfig(alpha=0.0),
            },
        ),
        StrategySpec(
            "transfusion-few-shot",
            FewShot,
            FewShotConfig,
            TransportExperience,
            REFERENCE,
            presets={"not-permuted": FewShotConfig(permute=False)},
            needs_data=True,
        ),
    ]
