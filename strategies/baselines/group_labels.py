"""Strategies that are told the group of every training sample: bounds for those that are not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, GroupedExperience, RunContext, StrategySpec, hookimpl
from shiftproof.strategies import GroupBalancedBuffer, GroupWeights, TrainingStrategy, joined
from shiftproof.strategies.baselines.rehearsal import ReplayConfig


@dataclass(frozen=True)
class GroupBalancedReplayConfig(ReplayConfig):
    """Default: the buffer as replay, as the thesis uses it (5.4.2)."""

    mode: Literal["replay", "last-layer"] = "replay"  # last-layer: fine-tune, then retrain heads on the buffer (BGS paper)
    retrain_epochs: Annotated[int, Ge(1)] = 20  # over the buffer, mode="last-layer"
    retrain_lr: Annotated[float, Gt(0)] = 0.05  # mode="last-layer"


class GroupBalancedReplay(TrainingStrategy[GroupBalancedReplayConfig]):
    """A buffer balanced over (task, class, group): Lee et al., Continual Learning in the Presence of Spurious Correlation.

    arXiv:2303.11863. The stream itself is learned as it comes; only the memory is balanced.
    """

    def __init__(self, config: GroupBalancedReplayConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.buffer = GroupBalancedBuffer(config.buffer_size)
        self.replay_size = config.replay_size or context.recipe.batch_size
        self.cells = 0  # of earlier experiences

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over stream and memory."""
        if len(self.buffer) and self.config.mode == "replay":
            memory = self.buffer.sample(self.replay_size, self.generator("replay"))
            batch = joined(batch, self.replayed(memory))
        return F.cross_entropy(self.logits(batch), batch.y)

    def after_step(self, batch: Batch) -> None:
        """Offer each sample once, in the first epoch."""
        if self.epoch == 0:
            cell = self.cells + self._cell(batch)
            self.buffer.add(self.stored(batch), batch.y, batch.task, cell, self.generator("eviction"))

    def after_experience(self, experience: Any) -> None:
        """The next experience's cells come after these."""
        self.cells += _count(experience.groups) * _count(experience.train.y)

    def model(self) -> nn.Module:
        """The model; in mode "last-layer" with its heads retrained on the balanced buffer."""
        return self._retrained() if self.config.mode == "last-layer" and len(self.buffer) else self.net

    def _cell(self, batch: Batch) -> Tensor:
        experience = self.experience
        assert isinstance(experience, GroupedExperience)
        index = batch.index.cpu()
        return experience.train.y[index] * _count(experience.groups) + experience.groups[index]

    def _retrained(self) -> nn.Module:
        model = deepcopy(self.net).eval()
        memory = self.buffer.contents()
        batch = self.replayed(memory, "retrain")
        with torch.no_grad():
            features = torch.cat([model.features(x) for x in batch.x.split(self.recipe.batch_size * 8)])
        optimizer = torch.optim.SGD(model.heads.parameters(), self.config.retrain_lr, momentum=0.9)
        for epoch in range(self.config.retrain_epochs):
            generator = self.context.generator("retrain", self.experience.index, epoch)
            for index in torch.randperm(len(memory), generator=generator).split(self.recipe.batch_size):
                loss = F.cross_entropy(model.classify(features[index], batch.task[index]), batch.y[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                self.context.cost.optimizer_steps += 1
                self.context.cost.samples_seen += len(index)
        return model


@dataclass(frozen=True)
class GroupDroConfig:
    """Defaults of the paper; the released code adds the adjustment to the loss, too."""

    step: Annotated[float, Gt(0)] = 0.01  # of the group weights
    adjustment: Annotated[float, Ge(0)] = 0.0  # C, added as C / sqrt(n_g); 0 = off
    adjust_loss: bool = False  # the adjustment enters the loss as well, which no gradient sees; released: True
    uniform: bool = True  # draw groups with the same probability, Algorithm 1; False: every sample once an epoch


class GroupDro(TrainingStrategy[GroupDroConfig]):
    """Minimizes the loss of the worst group, Eq. 4.2, by exponentiated gradient."""

    def __init__(self, config: GroupDroConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.weights = GroupWeights(step=config.step, adjustment=config.adjustment, adjust_loss=config.adjust_loss)
        self.groups = torch.zeros(0, dtype=torch.int64)  # (N,)

    def before_experience(self, experience: Any) -> None:
        """Uniform weights over the groups that have samples."""
        self.groups = experience.groups.to(self.device)
        self.weights.start(self.groups.bincount())

    def order(self, experience: DataExperience, generator: torch.Generator) -> Tensor:
        """As many draws as there are samples, each group as likely as any other."""
        if not self.config.uniform:
            return super().order(experience, generator)
        groups = self.groups.cpu()
        likelihood = 1 / groups.bincount().float()[groups]
        return torch.multinomial(likelihood, len(groups), replacement=True, generator=generator)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over groups of q_g times the group's mean loss."""
        losses = F.cross_entropy(self.logits(batch), batch.y, reduction="none")
        return self.weights.loss(losses, self.groups[batch.index])


def _count(ids: Tensor) -> int:
    return int(ids.max()) + 1


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`gdro` and `bgs`."""
    return [
        StrategySpec(
            "gdro",
            GroupDro,
            GroupDroConfig,
            GroupedExperience,
            reference="Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv:1911.08731",
            presets={"released": GroupDroConfig(adjust_loss=True)},
            uses_group_labels=True,
        ),
        StrategySpec(
            "bgs",
            GroupBalancedReplay,
            GroupBalancedReplayConfig,
            GroupedExperience,
            reference="Lee et al., Continual Learning in the Presence of Spurious Correlation, 2023, arXiv:2303.11863",
            presets={"paper": GroupBalancedReplayConfig(mode="last-layer")},
            uses_group_labels=True,
        ),
    ]
