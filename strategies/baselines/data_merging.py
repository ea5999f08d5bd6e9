"""Merges that look at data: Fisher-weighted averaging and regression mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, ExpertExperience, InputError, Model, RunContext, StrategySpec, evaluating, hookimpl
from shiftproof.strategies.merging import MergeConfig, MergeStrategy

BATCH = 256


@dataclass(frozen=True)
class FisherConfig(MergeConfig):
    """The paper uses as many samples as the training set has; 256 give the same weights to within noise."""

    samples: Annotated[int, Ge(1)] = 256  # of each expert's training data
    floor: Annotated[float, Gt(0)] = 1e-6  # added to the Fisher information: where nobody has any, the mean


@dataclass(frozen=True)
class RegressionMeanConfig(MergeConfig):
    """Knobs of the paper, section 3.3 and 4."""

    samples: Annotated[int, Ge(1)] = 1000  # of each expert's training data
    keep: Annotated[float, Ge(0), Le(1)] = 0.9  # factor of the off-diagonal of a Gram matrix; 0.1 for T5


class FisherMerge(MergeStrategy[FisherConfig]):
    """Mean of the experts weighted by the diagonal of their Fisher information (Matena & Raffel, Eq. 4)."""

    def __init__(self, config: FisherConfig, context: RunContext | None = None) -> None:
        super().__init__(config, context)
        self.information: list[dict[str, Tensor]] = []

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Take in an expert and its Fisher information."""
        logs = super().learn(experience)
        data, context = _data(experience), _context(self.context)
        generator = context.generator("fisher", experience.name)
        chosen = torch.randperm(len(data), generator=generator)[: self.config.samples]
        inputs = data.inputs(chosen).to(context.device)
        self.information.append(fisher_diagonal(experience.expert, experience.task, inputs, generator))
        return logs

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """Sum F_d theta_d / sum F_d; a buffer, which has no Fisher information, is averaged."""
        none = torch.zeros_like(base)
        weights = [known.get(name, none).to(base) + self.config.floor for known in self.information]
        total = sum(weights[1:], weights[0])
        merged = torch.zeros_like(base)
        for weight, expert in zip(weights, experts, strict=True):
            merged += weight / total * expert
        return merged


def fisher_diagonal(model: Model, task: int, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean over samples of squared gradients of log p(y | x), y drawn from the model (Matena & Raffel, Eq. 3).

    Args:
        x: (N, ...) float32 inputs.

    Returns:
        For every parameter a tensor of its shape on the CPU.
    """
    parameters = dict(model.named_parameters())
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            for sample in x.split(1):
                log_probabilities = F.log_softmax(model(sample, task)[0], dim=0)
                drawn = int(torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=generator))
                gradients = torch.autograd.grad(log_probabilities[drawn], list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient.square()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {name: (value / len(x)).cpu() for name, value in total.items()}


class RegressionMean(MergeStrategy[RegressionMeanConfig]):
    """Linear maps in closed form: nearest to every expert's outputs on its own inputs (Jin et al., Eq. 2); else the mean."""

    def __init__(self, config: RegressionMeanConfig, context: RunContext | None = None) -> None:
        super().__init__(config, context)
        self.grams: list[dict[str, Tensor]] = []

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Take in an expert and the Gram matrices of what its linear maps are given."""
        logs = super().learn(experience)
        data, context = _data(experience), _context(self.context)
        generator = context.generator("regmean", experience.name)
        chosen = torch.randperm(len(data), generator=generator)[: self.config.samples]
        self.grams.append(gram_matrices(experience.expert, experience.task, data.inputs(chosen).to(context.device)))
        return logs

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """(sum G_d)^-1 sum G_d W_d^T, transposed, where the inputs' Gram matrices G_d are known."""
        if not all(name in known for known in self.grams):
            return sum(experts[1:], experts[0]) / len(experts)
        total = torch.zeros(base.shape[1], base.shape[1], dtype=torch.float64)
        right = torch.zeros(base.shape[1], base.shape[0], dtype=torch.float64)
        for known, expert in zip(self.grams, experts, strict=True):
            gram = known[name]
            shrunk = self.config.keep * gram + (1 - self.config.keep) * gram.diagonal().diag()
            total += shrunk
            right += shrunk @ expert.double().T.cpu()
        # An input that is never active leaves a row of zeros: there the least-norm step from the mean.
        centre = (sum(experts[1:], experts[0]) / len(experts)).double().T.cpu()
        solution = centre + torch.linalg.lstsq(total, right - total @ centre, driver="gelsd").solution
        merged: Tensor = solution.T.to(base)
        return merged


def gram_matrices(model: Model, task: int, x: Tensor) -> dict[str, Tensor]:
    """X^T X / n of the inputs of every `nn.Linear`, by the name of its weight: (in, in) float64 on the CPU."""
    grams: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            grams[name] = grams.get(name, torch.zeros((), dtype=torch.float64)) + (flat.T @ flat).cpu()
            rows[name] = rows.get(name, 0) + len(flat)

        return hook

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(watch(f"{name}.weight")) for name, module in linear.items()]
    try:
        with evaluating(model), torch.no_grad():
            for part in x.split(BATCH):
                model(part, task)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram / rows[name] for name, gram in grams.items()}


def _data(experience: ExpertExperience) -> ArrayData:
    assert experience.data is not None  # the harness gives it to whoever declares `needs_data`
    return experience.data.train


def _context(context: RunContext | None) -> RunContext:
    if context is None:
        raise InputError("expected a run with data, got checkpoints alone; this method needs data: run it on a stream")
    return context


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`fisher` and `regmean`."""
    return [
        StrategySpec(
            "fisher",
            FisherMerge,
            FisherConfig,
            ExpertExperience,
            reference="Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv:2111.09832",
            needs_data=True,
        ),
        StrategySpec(
            "regmean",
            RegressionMean,
            RegressionMeanConfig,
            ExpertExperience,
            reference="Jin et al., Dataless Knowledge Fusion by Merging Weights, ICLR 2023, arXiv:2212.09849",
            needs_data=True,
        ),
    ]
