"""Fine-tuning and joint training: the two ends between which continual learning lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, JointExperience, StrategySpec, hookimpl
from shiftproof.strategies import TrainingStrategy, fuses_heads


@dataclass(frozen=True)
class FineTuningConfig:
    """No knobs: everything is in the stream's recipe."""


class FineTuning(TrainingStrategy[FineTuningConfig]):
    """Cross-entropy on whatever comes, nothing against forgetting or shortcuts."""

    @fuses_heads
    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(batch), batch.y)


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`sgd` and `joint`."""
    return [
        StrategySpec(
            "sgd",
            FineTuning,
            FineTuningConfig,
            DataExperience,
            reference="Goodfellow et al., An Empirical Investigation of Catastrophic Forgetting, ICLR 2014, arXiv:1312.6211",
        ),
        StrategySpec(
            "joint",
            FineTuning,
            FineTuningConfig,
            JointExperience,
            reference="Caruana, Multitask Learning, Machine Learning 28, 1997",
        ),
    ]
