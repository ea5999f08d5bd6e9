"""Accuracy and cross-entropy of a model on eval sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.benchmark.evaluation import evaluate
from shiftproof.benchmark.experiences import EvalSet


@dataclass(frozen=True)
class Measured:
    """What a model reaches on each eval set; NaN where its logits are not finite.

    Attributes:
        accuracies: Mean over the groups of an eval set, as on a board.
        losses: Cross-entropy, mean over samples.
    """

    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Mean over eval sets."""
        return math.fsum(self.accuracies) / len(self.accuracies)

    @property
    def loss(self) -> float:
        """Mean over eval sets."""
        return math.fsum(self.losses) / len(self.losses)


def measure(model: nn.Module, evals: Sequence[EvalSet], device: torch.device) -> Measured:
    """Accuracy and loss on each eval set, out of one pass over it."""
    pairs = [_measure(model, eval_set, device) for eval_set in evals]
    return Measured(*zip(*pairs, strict=True))


def _measure(model: nn.Module, eval_set: EvalSet, device: torch.device) -> tuple[float, float]:
    logits: list[Tensor] = []
    listener = model.register_forward_hook(lambda module, inputs, output: logits.append(output.double().cpu()))
    try:
        (counts,) = evaluate(model, [eval_set], device)
    except NotFiniteError:
        return math.nan, math.nan
    finally:
        listener.remove()
    targets = torch.cat([data.y for _, data in eval_set.parts]).split([len(batch) for batch in logits])
    losses = [float(F.cross_entropy(batch, y, reduction="sum")) for batch, y in zip(logits, targets, strict=True)]
    accuracies = [correct / total for correct, total in counts.groups if total]
    return math.fsum(accuracies) / len(accuracies), math.fsum(losses) / len(eval_set.groups)
