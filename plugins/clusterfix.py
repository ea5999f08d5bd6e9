"""ClusterFix: pseudo-label errors as a proxy for bias (thesis ch. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, RunContext, StrategySpec, hookimpl
from shiftproof.strategies import (
    ClusterHeads,
    ClusterWeights,
    ReservoirBuffer,
    TrainingStrategy,
    cluster_per_class,
    extract_features,
    joined,
)


@dataclass(frozen=True)
class ClusterFixConfig:
    """Defaults from thesis 4.3. The text gives no gamma; "lambda" in 4.3.1 is taken for it (0.5 CelebA, 0.01 Waterbirds)."""

    clusters: Annotated[int, Ge(1)] = 8  # K, per class, at most
    gamma: Annotated[float, Ge(0)] = 0.5  # of the pseudo loss, in the weights (Eq. 4.8) and in the objective (Eq. 4.9)
    momentum: Annotated[float, Gt(0), Le(1)] = 0.3  # m, of the new weight; 1 = off
    state: Literal["sample", "cluster"] = "sample"  # what has momentum; as in the released LwS, or as the text words it
    features: Literal["base", "erm"] = "base"  # what is clustered: the self-supervised base (thesis 4.2.1)
    weighted: bool = True  # False: w_c = 1


@dataclass(frozen=True)
class ClusterFixReplayConfig(ClusterFixConfig):
    """ClusterFix with a reservoir (thesis 5.4.2)."""

    buffer_size: Annotated[int, Ge(1)] = 1024  # samples


class ClusterFix(TrainingStrategy[Any]):
    """Target loss weighted by the error of each sample's cluster, plus classification of the pseudo-labels."""

    def __init__(self, config: ClusterFixConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.heads = ClusterHeads(context)
        self.weights = ClusterWeights(gamma=config.gamma, momentum=config.momentum, state=config.state)
        self.address = torch.zeros(0, 2, dtype=torch.int64)  # (N, 2), which columns of the heads answer for a sample
        self.pseudo = torch.zeros(0, dtype=torch.int64)  # (N,), c within the class

    def before_experience(self, experience: DataExperience) -> None:
        """Step 1, cluster assignment (4.2.1)."""
        features = extract_features(self.context, experience, self.config.features)
        seed = self.generator("clusters").initial_seed()
        clusters = cluster_per_class(features, experience.train.y, self.config.clusters, seed)
        self.address = self.heads.start(str(experience.index), self.net.width, clusters, experience.train.y).to(self.device)
        self.pseudo = clusters.local.to(self.device)
        self.weights.start(clusters.ids)

    def loss(self, batch: Batch) -> Tensor:
        """L_t + gamma L_s, Eq. 4.9."""
        features = self.features(batch.x)
        target = F.cross_entropy(self.net.classify(features, batch.task), batch.y, reduction="none")
        return self.stream_loss(features, target, batch).mean()

    def stream_loss(self, features: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """(B,) w_c times the target loss (Eq. 4.7) plus gamma times the loss of the pseudo-label (Eq. 4.6)."""
        logits, _ = self.heads.own(features, self.address[batch.index], self.config.clusters)
        pseudo = F.cross_entropy(logits, self.pseudo[batch.index], reduction="none")
        weight = self.weights.of(batch.index, self.epoch) if self.config.weighted else torch.ones_like(target)
        self.weights.update(batch.index, target, pseudo, self.epoch)
        return torch.add(weight * target, pseudo, alpha=self.config.gamma)


class ClusterFixReplay(ClusterFix):
    """ClusterFix with a reservoir, which is replayed with its target labels and without weights."""

    def __init__(self, config: ClusterFixReplayConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.buffer = ReservoirBuffer(config.buffer_size)

    def loss(self, batch: Batch) -> Tensor:
        """Mean over stream (Eq. 4.9) and memory, in one; the thesis does not say how the two are put together (5.4.2)."""
        if not len(self.buffer):
            return super().loss(batch)
        memory = self.buffer.sample(self.recipe.batch_size, self.generator("replay"))
        both, size = joined(batch, self.replayed(memory)), len(batch)
        features = self.features(both.x)
        target = F.cross_entropy(self.net.classify(features, both.task), both.y, reduction="none")
        stream = self.stream_loss(features[:size], target[:size], batch)
        return (stream.sum() + target[size:].sum()) / len(both)

    def after_step(self, batch: Batch) -> None:
        """Offer the batch to the reservoir."""
        self.buffer.add(self.stored(batch), batch.y, batch.task, self.generator("reservoir"))


REFERENCE = "ClusterFix: Capitani et al., A Cluster-Based Debiasing Approach without Protected-Group Supervision, WACV 2024"


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`clusterfix` and `clusterfix-replay`."""
    return [
        StrategySpec("clusterfix", ClusterFix, ClusterFixConfig, DataExperience, REFERENCE),
        StrategySpec("clusterfix-replay", ClusterFixReplay, ClusterFixReplayConfig, DataExperience, REFERENCE),
    ]
