"""Debiasing without group labels from before the thesis: George and Learning from Failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, RunContext, StrategySpec, hookimpl
from shiftproof.strategies import (
    GroupWeights,
    RelativeDifficulty,
    TrainingStrategy,
    amplified_cross_entropy,
    extract_features,
    overcluster_per_class,
)


@dataclass(frozen=True)
class GeorgeConfig:
    """K-means instead of a Gaussian mixture on a UMAP embedding; otherwise as in the paper."""

    largest_k: Annotated[int, Ge(2)] = 10  # k is searched from 2 to this, per class, by silhouette
    factor: Annotated[int, Ge(1)] = 5  # over-clustering, times the best k
    step: Annotated[float, Gt(0)] = 0.01  # of the group weights
    adjustment: Annotated[float, Ge(0)] = 3.0  # C, added as C / sqrt(n_c)
    adjust_loss: bool = False  # it enters the loss as well, which no gradient sees; released: True
    uniform: bool = True  # draw clusters with the same probability
    features: Literal["erm", "base"] = "erm"  # what is clustered


class George(TrainingStrategy[GeorgeConfig]):
    """Clusters of a plainly trained network's features stand in for the groups of GroupDRO, Eq. 4.3."""

    def __init__(self, config: GeorgeConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.weights = GroupWeights(step=config.step, adjustment=config.adjustment, adjust_loss=config.adjust_loss)
        self.clusters = torch.zeros(0, dtype=torch.int64)  # (N,)

    def before_experience(self, experience: DataExperience) -> None:
        """Cluster the features within each class."""
        features = extract_features(self.context, experience, self.config.features)
        seed = self.generator("clusters").initial_seed()
        candidates = range(2, self.config.largest_k + 1)
        found = overcluster_per_class(features, experience.train.y, candidates, self.config.factor, seed)
        self.clusters = found.ids.to(self.device)
        self.weights.start(self.clusters.bincount())

    def order(self, experience: DataExperience, generator: torch.Generator) -> Tensor:
        """As many draws as there are samples, each cluster as likely as any other."""
        if not self.config.uniform:
            return super().order(experience, generator)
        clusters = self.clusters.cpu()
        likelihood = 1 / clusters.bincount().float()[clusters]
        return torch.multinomial(likelihood, len(clusters), replacement=True, generator=generator)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over clusters of q_c times the cluster's mean loss."""
        losses = F.cross_entropy(self.logits(batch), batch.y, reduction="none")
        return self.weights.loss(losses, self.clusters[batch.index])


@dataclass(frozen=True)
class LffConfig:
    """Defaults of the paper and its released code."""

    q: Annotated[float, Gt(0), Le(1)] = 0.7  # of the generalized cross-entropy
    alpha: Annotated[float, Ge(0), Lt(1)] = 0.7  # of the running mean of a sample's losses
    corrected: bool = True  # the first loss of a sample is taken as it is


class LearningFromFailure(TrainingStrategy[LffConfig]):
    """A biased model finds what is easy; the other one is trained on what that model fails at."""

    def __init__(self, config: LffConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.biased = context.new_model()
        self.difficulty = RelativeDifficulty(alpha=config.alpha, corrected=config.corrected)

    def before_experience(self, experience: DataExperience) -> None:
        """Forget the losses of the previous experience."""
        self.difficulty.start(experience.train.y)

    def loss(self, batch: Batch) -> Tensor:
        """Amplified cross-entropy of the biased model plus weighted cross-entropy of the debiased one."""
        biased = self.biased(batch.x, batch.task)
        losses = F.cross_entropy(self.logits(batch), batch.y, reduction="none")
        self.difficulty.update(batch.index, F.cross_entropy(biased, batch.y, reduction="none"), losses)
        weight = self.difficulty.of(batch.index)
        return amplified_cross_entropy(biased, batch.y, self.config.q).mean() + (weight * losses).mean()


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`george` and `lff`."""
    return [
        StrategySpec(
            "george",
            George,
            GeorgeConfig,
            DataExperience,
            reference="Sohoni et al., No Subclass Left Behind, NeurIPS 2020, arXiv:2011.12945",
            presets={"released": GeorgeConfig(adjust_loss=True)},
        ),
        StrategySpec(
            "lff",
            LearningFromFailure,
            LffConfig,
            DataExperience,
            reference="Nam et al., Learning from Failure, NeurIPS 2020, arXiv:2007.02561",
        ),
    ]
