"""Frozen features of an experience, by content: a second strategy on the same stream and seed makes no encoder pass."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, Model, RunContext
from shiftproof.benchmark.codehash import code_sha256
from shiftproof.benchmark.evaluation import EVAL_BATCH, evaluating
from shiftproof.benchmark.records import PROTOCOL_VERSION
from shiftproof.strategies.training import TrainingStrategy

Source = Literal["base", "erm"]
"""Which network to take features of: the stream's base, or one trained on the experience by plain cross-entropy."""


@dataclass(frozen=True)
class _NoKnobs:
    pass


class _Erm(TrainingStrategy[_NoKnobs]):
    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.y)


def extract_features(context: RunContext, experience: DataExperience, source: Source = "base") -> Tensor:
    """(N, D) float32 features of the training inputs, un-augmented, in evaluation mode, on the CPU.

    Args:
        source: "base" is what ClusterFix and LwS cluster (thesis 4.2.1, 5.3.1: self-supervised and frozen), "erm" what BPA and
            George cluster: the base fine-tuned on this experience with the stream's recipe.
    """
    key: dict[str, str | int] = {
        "source": source,
        "base": context.base_sha256,
        "data": experience.train.sha256(),
        "device": context.device.type,
        "torch": torch.__version__,
        "protocol": PROTOCOL_VERSION,
    }
    if source == "erm":
        tasks = experience.tasks(torch.arange(len(experience.train)))
        key |= {
            "seed": context.seed,
            "recipe": repr(context.recipe),
            "experience": experience.index,
            "tasks": hashlib.sha256(tasks.numpy().data).hexdigest(),
            "code": code_sha256(__name__),  # what trains is not of the harness, so the protocol's version does not cover it
        }

    def make() -> dict[str, Tensor]:
        model = context.new_model() if source == "base" else _erm(context, experience)
        return {"features": encode(model, experience, context.device)}

    if source == "erm":
        # Counted whether or not the cache had it: the cost of a method does not depend on who ran before.
        context.cost.optimizer_steps += context.recipe.epochs * -(-len(experience.train) // context.recipe.batch_size)
        context.cost.samples_seen += context.recipe.epochs * len(experience.train)
    return context.cache.tensors("features", key, make)["features"]


def encode(model: Model, experience: DataExperience, device: torch.device) -> Tensor:
    """(N, D) float32 features of an experience's training inputs by one model."""
    with evaluating(model), torch.no_grad():
        starts = range(0, len(experience.train), EVAL_BATCH)
        parts = [model.features(experience.train.inputs(slice(i, i + EVAL_BATCH)).to(device)).float().cpu() for i in starts]
    return torch.cat(parts)


def _erm(context: RunContext, experience: DataExperience) -> Model:
    own = copy.copy(context)
    own.cost = copy.copy(context.cost)
    own._checkpointer = None  # the surrounding strategy's checkpoints are not about this training
    strategy = _Erm(_NoKnobs(), own)
    strategy.learn(experience)
    return strategy.net
