"""Rehearsal: experience replay, ER-ACE and dark experience replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, RunContext, StrategySpec, hookimpl
from shiftproof.strategies import ReservoirBuffer, TrainingStrategy, fuses_heads, joined


@dataclass(frozen=True)
class ReplayConfig:
    """Knobs of every reservoir."""

    buffer_size: Annotated[int, Ge(1)] = 1024  # samples; thesis Table 5.1
    replay_size: Annotated[int, Ge(0)] = 0  # samples a step; 0 = the recipe's batch size


@dataclass(frozen=True)
class DarkReplayConfig(ReplayConfig):
    """The values for this setting are not published; these are the ones printed for split CIFAR-100."""

    alpha: Annotated[float, Ge(0)] = 0.3  # of the distance to stored logits
    beta: Annotated[float, Ge(0)] = 0.5  # of the cross-entropy on replayed samples


class ExperienceReplay(TrainingStrategy[Any]):
    """Cross-entropy on the stream and on a reservoir, in one batch (Chaudhry et al., arXiv:1902.10486, Algorithm 1)."""

    def __init__(self, config: ReplayConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.buffer = ReservoirBuffer(config.buffer_size)
        self.replay_size = config.replay_size or context.recipe.batch_size

    @fuses_heads
    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over stream and memory."""
        if len(self.buffer):
            batch = joined(batch, self.draw("replay"))
        return F.cross_entropy(self.logits(batch), batch.y)

    def draw(self, purpose: str) -> Batch:
        """A batch from the buffer."""
        return self.replayed(self.buffer.sample(self.replay_size, self.generator(purpose)), purpose)

    def after_step(self, batch: Batch) -> None:
        """Offer the batch to the reservoir."""
        self.buffer.add(self.stored(batch), batch.y, batch.task, self.generator("reservoir"))


class AsymmetricReplay(ExperienceReplay):
    """ER-ACE (Caccia et al., ICLR 2022, arXiv:2104.05025): on the stream, only the classes of the batch compete.

    With a head of its own for each task there is nothing to mask; what remains is replay with separate losses. A single head
    is masked, one of two classes too.
    """

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy among present classes on the stream, plus cross-entropy on the memory."""
        logits = self.logits(batch)
        if len(self.net.heads) == 1:
            absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            absent[batch.y] = False
            logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        loss = F.cross_entropy(logits, batch.y)
        if len(self.buffer):
            replay = self.draw("replay")
            loss = loss + F.cross_entropy(self.logits(replay), replay.y)
        return loss


class DarkReplay(ExperienceReplay):
    """DER++ (Buzzega et al., NeurIPS 2020, arXiv:2004.07211, Eq. 6): distance to the logits of back then, and labels."""

    def __init__(self, config: DarkReplayConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.classes: int = max(self.net.head(int(task)).out_features for task in self.net.heads)
        self.last_logits = torch.zeros(0)

    def loss(self, batch: Batch) -> Tensor:
        """Stream cross-entropy + alpha * squared distance of logits + beta * cross-entropy, each on a draw of its own."""
        logits = self.logits(batch)
        self.last_logits = logits.detach()
        loss = F.cross_entropy(logits, batch.y)
        if len(self.buffer):
            memory = self.buffer.sample(self.replay_size, self.generator("logits"))
            now = self.logits(self.replayed(memory, "logits"))
            then = memory.extras["logits"][:, : now.shape[1]].to(self.device)
            answered = now > torch.finfo(now.dtype).min  # a narrower head leaves classes open
            loss = loss + self.config.alpha * F.mse_loss(now * answered, then * answered)
            replay = self.draw("labels")
            loss = loss + self.config.beta * F.cross_entropy(self.logits(replay), replay.y)
        return loss

    def after_step(self, batch: Batch) -> None:
        """Offer the batch with the logits of this step."""
        logits = F.pad(self.last_logits, (0, self.classes - self.last_logits.shape[1]))
        generator = self.generator("reservoir")
        self.buffer.add(self.stored(batch), batch.y, batch.task, generator, {"logits": logits.cpu()})


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`er`, `er-ace` and `der++`."""
    return [
        StrategySpec(
            "er",
            ExperienceReplay,
            ReplayConfig,
            DataExperience,
            reference="Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019, arXiv:1902.10486",
        ),
        StrategySpec(
            "er-ace",
            AsymmetricReplay,
            ReplayConfig,
            DataExperience,
            reference="Caccia et al., New Insights on Reducing Abrupt Representation Change, ICLR 2022, arXiv:2104.05025",
        ),
        StrategySpec(
            "der++",
            DarkReplay,
            DarkReplayConfig,
            DataExperience,
            reference="Buzzega et al., Dark Experience for General Continual Learning, NeurIPS 2020, arXiv:2004.07211",
        ),
    ]
