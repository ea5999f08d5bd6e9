"""LwS: learning without shortcuts, a continual learner with a loss-binned buffer (thesis ch. 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, RunContext, StrategySpec, as_float, evaluating, hookimpl
from shiftproof.strategies import (
    ClusterHeads,
    ClusterWeights,
    LossBinnedBuffer,
    TrainingStrategy,
    augment,
    cluster_per_class,
    extract_features,
)


@dataclass(frozen=True)
class LwsConfig:
    """Defaults from thesis 5.4 and, where the text is silent, from the released code."""

    clusters: Annotated[int, Ge(1)] = 8  # k, per label, at most
    gamma: Annotated[float, Ge(0)] = 1.0  # of the cluster loss in w_c, Eq. 5.3
    cluster_coefficient: Annotated[float, Ge(0)] | None = None  # of L_cluster in Eq. 5.4; none = gamma (released)
    momentum: Annotated[float, Gt(0), Le(1)] = 0.3  # of the new weight; 1 = off
    state: Literal["sample", "cluster"] = "sample"  # what has momentum; as released, or the weight of each cluster
    weighted: bool = True  # False: w_c = 1, Table 5.5
    buffer_size: Annotated[int, Ge(1)] = 1024  # M, samples; thesis Table 5.1
    bins: Annotated[int, Ge(1)] = 4  # n, intervals of the loss
    warm_up: Annotated[int, Ge(0)] = 5  # epochs before the losses are taken; a shorter recipe takes them at its end
    redistribute: bool = False  # give the slots of bins without candidates to other bins; mode="population"
    target_coefficient: Annotated[float, Ge(0)] = 1.0  # of the replayed target loss, Eq. 5.5
    replay_cluster_coefficient: Annotated[float, Ge(0)] = 1.0  # of the replayed cluster loss, Eq. 5.5
    distillation: Annotated[float, Ge(0)] = 1.0  # of KD, Eq. 5.6
    distillation_reduction: Literal["mean", "sum"] = "mean"  # over the k logits; the text's squared norm is the sum
    trained_heads: Literal["all", "current"] = "all"  # cluster heads that go on learning; one reading of 5.3.1: current
    features: Literal["base", "erm"] = "base"  # what is clustered: a frozen pre-trained network (5.3.1)
    mode: Literal["population", "running"] = "population"  # fill the buffer from one pass (text), or at every step (released)
    insert_from: Annotated[int, Ge(0)] = 2  # epoch, mode="running"
    augmented_pass: bool = False  # take the losses on augmented inputs; released: True
    freeze_norm: bool = False  # stay in evaluation mode after the pass, a side effect of the released code


RELEASED = LwsConfig(mode="running", augmented_pass=True, freeze_norm=True)


class Lws(TrainingStrategy[LwsConfig]):
    """Cluster weights on the stream, a loss-binned buffer with labels and cluster logits: L_stream + L_buf + KD, Eq. 5.7."""

    def __init__(self, config: LwsConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.heads = ClusterHeads(context)
        self.weights = ClusterWeights(gamma=config.gamma, momentum=config.momentum, state=config.state)
        self.buffer = LossBinnedBuffer(config.buffer_size, config.bins, config.mode, config.redistribute)
        self.passed = False  # the losses of this experience have been taken
        self.address = torch.zeros(0, 2, dtype=torch.int64)  # (N, 2), which columns of the heads answer for a sample
        self.cluster = torch.zeros(0, dtype=torch.int64)  # (N,), c within the label
        self.recorded = torch.zeros(0)  # (N,), target losses after the warm-up; 0 before it

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, unless cluster heads of earlier tasks shall stay as they are; the buffer's losses reach those, too."""
        heads = self.heads.heads
        earlier = list(heads)[:-1] if self.config.trained_heads == "current" else []
        kept = {id(parameter) for name in earlier for parameter in heads[name].parameters()}
        yield from (parameter for parameter in super().parameters() if id(parameter) not in kept)

    def before_experience(self, experience: DataExperience) -> None:
        """Cluster assignment with a frozen network that is the same for all tasks (5.3.1)."""
        features = extract_features(self.context, experience, self.config.features)
        seed = self.generator("clusters").initial_seed()
        clusters = cluster_per_class(features, experience.train.y, self.config.clusters, seed)
        self.address = self.heads.start(str(experience.index), self.net.width, clusters, experience.train.y).to(self.device)
        self.cluster = clusters.local.to(self.device)
        self.weights.start(clusters.ids)
        self.recorded = torch.zeros(len(experience.train))
        self.passed = False

    def before_epoch(self, epoch: int) -> None:
        """Take the losses once the warm-up is over."""
        if epoch == self.config.warm_up:
            self._pass()

    def after_experience(self, experience: DataExperience) -> None:
        """A recipe shorter than the warm-up takes the losses here."""
        if self.config.mode == "running":
            self.buffer.end_task()
        elif not self.passed:
            self._pass()

    def loss(self, batch: Batch) -> Tensor:
        """L_stream (Eqs. 5.1-5.4), plus the two buffer objectives once there is something to replay."""
        if self.config.freeze_norm and self.passed:
            self.net.eval()
        features = self.features(batch.x)
        target = F.cross_entropy(self.net.classify(features, batch.task), batch.y, reduction="none")
        logits, _ = self._own(features, self.address[batch.index])
        cluster = F.cross_entropy(logits, self.cluster[batch.index], reduction="none")
        weight = self.weights.of(batch.index, self.epoch) if self.config.weighted else torch.ones_like(target)
        self.weights.update(batch.index, target, cluster, self.epoch)
        coefficient = self.config.gamma if self.config.cluster_coefficient is None else self.config.cluster_coefficient
        loss = (weight * target).mean() + coefficient * cluster.mean()
        if len(self.buffer):
            loss = loss + self._buffer_loss() + self._distillation_loss()
        return loss

    def after_step(self, batch: Batch) -> None:
        """The released code inserts at every step, with losses of 0 until they are taken.

        Which pass the stored cluster logits come from is not known; here it is one of their own, after the step and in
        evaluation mode.
        """
        if self.config.mode == "running" and self.epoch >= self.config.insert_from:
            losses = self.recorded[batch.index.cpu()]
            with torch.no_grad(), evaluating(self.net):
                extras = self._extras(self.features(batch.x), batch.index)
            self.buffer.offer(self.stored(batch), batch.y, batch.task, losses, self.generator("insert"), extras)

    def _buffer_loss(self) -> Tensor:
        """Replayed target and cluster labels, Eq. 5.5; its second term is printed as BCE, the clusters are k-way."""
        memory = self.buffer.sample(self.recipe.batch_size, self.generator("buffer"))
        replay = self.replayed(memory, "buffer")
        features = self.features(replay.x)
        target = F.cross_entropy(self.net.classify(features, replay.task), replay.y)
        logits, _ = self._own(features, memory.extras["address"].to(self.device))
        cluster = F.cross_entropy(logits, memory.extras["cluster"].to(self.device))
        return self.config.target_coefficient * target + self.config.replay_cluster_coefficient * cluster

    def _distillation_loss(self) -> Tensor:
        """Squared distance of cluster logits to those stored, on a draw of its own, Eq. 5.6."""
        memory = self.buffer.sample(self.recipe.batch_size, self.generator("distillation"))
        replay = self.replayed(memory, "distillation")
        logits, answered = self._own(self.features(replay.x), memory.extras["address"].to(self.device))
        distance = ((logits - memory.extras["logits"].to(self.device)) * answered).square().sum(dim=1)
        if self.config.distillation_reduction == "mean":
            distance = distance / answered.sum(dim=1)
        return self.config.distillation * distance.mean()

    def _own(self, features: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads.own(features, address, self.config.clusters)

    def _extras(self, features: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What the buffer keeps beside a sample: where its cluster head is, its cluster, and that head's logits."""
        address = self.address[index]
        logits, answered = self._own(features, address)
        kept = {"address": address, "cluster": self.cluster[index], "logits": logits * answered}
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def _pass(self) -> None:
        """Target losses of the whole training set in evaluation mode; in mode "population" the buffer is filled from them."""
        train, index = self.experience.train, torch.arange(len(self.experience.train))
        losses, extras = [], []
        with torch.no_grad(), evaluating(self.net):
            for rows in index.split(self.recipe.batch_size * 8):
                inputs = as_float(train.x[rows])
                if self.config.augmented_pass:
                    inputs = augment(inputs, self.recipe.augment, self.generator(f"pass {int(rows[0])}"))
                features = self.features(inputs.to(self.device))
                logits = self.net.classify(features, self.experience.tasks(rows).to(self.device))
                losses.append(F.cross_entropy(logits, train.y[rows].to(self.device), reduction="none").cpu())
                extras.append(self._extras(features, rows.to(self.device)))
        self.recorded = torch.cat(losses)
        self.passed = True
        if self.config.mode == "population":
            kept = {name: torch.cat([part[name] for part in extras]) for name in extras[0]}
            tasks = self.experience.tasks(index)
            self.buffer.populate(train.x, train.y, tasks, self.recorded, self.generator("populate"), kept)


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`lws`."""
    return [
        StrategySpec(
            "lws",
            Lws,
            LwsConfig,
            DataExperience,
            reference="Capitani et al., Learning without Shortcuts: thesis chapter 5, Avoiding Forgetting in the Presence of "
            "Spurious Correlations",
            presets={"released": RELEASED},
        ),
    ]
