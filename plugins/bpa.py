"""BPA: debiased representations with pseudo-attributes (thesis 4.1.2, Eqs. 4.4-4.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, RunContext, StrategySpec, hookimpl
from shiftproof.strategies import ClusterWeights, ReservoirBuffer, TrainingStrategy, cluster_per_class, extract_features, joined


@dataclass(frozen=True)
class BpaConfig:
    """Defaults from thesis 4.3; in the released code the momentum has no effect and an exponential blend takes its place."""

    clusters: Annotated[int, Ge(1)] = 8  # per class, at most
    momentum: Annotated[float, Gt(0), Le(1)] = 0.3  # m, of the new weight; 1 = off
    state: Literal["sample", "cluster"] = "sample"  # what has momentum; as in the released LwS, or as the text words it
    features: Literal["erm", "base"] = "erm"  # what is clustered: BPA trains a network by cross-entropy first
    applied: Literal["stored", "current"] = "stored"  # weights of the last visit, or from the losses so far; state="sample"
    refresh_every: Annotated[int, Ge(1)] = 1  # steps; released: 10
    sizes_until_seen: bool = False  # N / N_c alone until every sample was seen; released: True
    zero_is_unseen: bool = True  # a recorded loss of exactly 0 does not count; released: False
    exponential: bool = False  # released: w exp(0.05 w)


RELEASED = BpaConfig(
    momentum=1.0, applied="current", refresh_every=10, sizes_until_seen=True, zero_is_unseen=False, exponential=True
)


@dataclass(frozen=True)
class BpaReplayConfig(BpaConfig):
    """BPA with a reservoir (thesis 5.4.2)."""

    buffer_size: Annotated[int, Ge(1)] = 1024  # samples


class Bpa(TrainingStrategy[Any]):
    """Cross-entropy weighted by size and mean loss of each sample's cluster."""

    def __init__(self, config: BpaConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.weights = ClusterWeights(
            gamma=0.0,
            momentum=config.momentum,
            state=config.state,
            applied=config.applied,
            refresh_every=config.refresh_every,
            sizes_until_seen=config.sizes_until_seen,
            zero_is_unseen=config.zero_is_unseen,
            exponential=config.exponential,
        )

    def before_experience(self, experience: DataExperience) -> None:
        """Cluster within each class; the assignments stay as they are."""
        features = extract_features(self.context, experience, self.config.features)
        seed = self.generator("clusters").initial_seed()
        self.weights.start(cluster_per_class(features, experience.train.y, self.config.clusters, seed).ids)

    def before_epoch(self, epoch: int) -> None:
        """The clusters' losses are computed anew between epochs, too."""
        if epoch > 0:
            self.weights.end_epoch(epoch - 1)

    def loss(self, batch: Batch) -> Tensor:
        """Mean of w_c times cross-entropy, Eq. 4.4."""
        return self.weighted(F.cross_entropy(self.logits(batch), batch.y, reduction="none"), batch).mean()

    def weighted(self, losses: Tensor, batch: Batch) -> Tensor:
        """(B,) losses of the stream times their weights; records the losses."""
        weight = self.weights.of(batch.index, self.epoch)
        self.weights.update(batch.index, losses, None, self.epoch)
        return weight * losses


class BpaReplay(Bpa):
    """BPA with a reservoir, which is replayed without weights."""

    def __init__(self, config: BpaReplayConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.buffer = ReservoirBuffer(config.buffer_size)

    def loss(self, batch: Batch) -> Tensor:
        """Mean over stream (weighted) and memory, in one; the papers do not say how the two are put together."""
        if not len(self.buffer):
            return super().loss(batch)
        memory = self.buffer.sample(self.recipe.batch_size, self.generator("replay"))
        both = joined(batch, self.replayed(memory))
        losses = F.cross_entropy(self.logits(both), both.y, reduction="none")
        size = len(batch)
        return (self.weighted(losses[:size], batch).sum() + losses[size:].sum()) / len(both)

    def after_step(self, batch: Batch) -> None:
        """Offer the batch to the reservoir."""
        self.buffer.add(self.stored(batch), batch.y, batch.task, self.generator("reservoir"))


REFERENCE = "Seo et al., Unsupervised Learning of Debiased Representations with Pseudo-Attributes, CVPR 2022, arXiv:2108.02943"


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`bpa` and `bpa-replay`."""
    released_replay = BpaReplayConfig(**vars(RELEASED))
    return [
        StrategySpec("bpa", Bpa, BpaConfig, DataExperience, REFERENCE, presets={"released": RELEASED}),
        StrategySpec(
            "bpa-replay", BpaReplay, BpaReplayConfig, DataExperience, REFERENCE, presets={"released": released_replay}
        ),
    ]
