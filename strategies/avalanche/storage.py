"""The loss-binned buffer inside Avalanche's replay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils import concat_datasets
from avalanche.models import avalanche_forward
from avalanche.training.storage_policy import ExemplarsBuffer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from shiftproof.benchmark import InputError, evaluating
from shiftproof.strategies.replay import LossBinnedBuffer
from shiftproof.strategies.selection import lower_fullest, within_quota


class LossBinnedStorage(ExemplarsBuffer):  # type: ignore[misc]
    """Storage policy for Avalanche's ReplayPlugin: of each experience as many samples of high loss as of low loss.

    `LossBinnedBuffer` decides who stays. It is asked after each experience, where Avalanche asks its own policies, with the
    cross-entropy of every training sample under the model as it is then, un-augmented and in evaluation mode. Draws come from
    torch's global generator, as in Avalanche's own policies.

        ReplayPlugin(mem_size=512, storage_policy=LossBinnedStorage(512))

    Args:
        max_size: Samples.
        bins: Intervals of the loss.
        redistribute: Hand slots that a bin has no samples for to the others; otherwise they stay empty.
    """

    def __init__(self, max_size: int, bins: int = 4, redistribute: bool = False) -> None:
        super().__init__(max_size)
        self.chosen = LossBinnedBuffer(max_size, bins, redistribute=redistribute)  # of positions, not of inputs
        self._experiences: list[Any] = []

    def update(self, strategy: Any, **_: Any) -> None:
        """Take in the strategy's experience; what ReplayPlugin calls."""
        self.post_adapt(strategy, strategy.experience)

    def post_adapt(self, agent_state: Any, exp: Any) -> None:
        """Make room and take samples of a new experience.

        Raises:
            InputError: If there are fewer slots than experiences x bins, or a loss is not finite.
        """
        losses, tasks = _losses(agent_state, exp.dataset.eval())
        position = torch.arange(len(losses))
        number = torch.full_like(position, len(self._experiences))
        targets = torch.tensor(list(exp.dataset.targets))
        self.chosen.populate(position, targets, tasks, losses, torch.default_generator, {"experience": number})
        self._experiences.append(exp.dataset)
        self._gather()

    def resize(self, strategy: Any, new_size: int) -> None:
        """Change the number of slots. With fewer of them, every experience is cut to its share, its fullest bins first.

        Raises:
            InputError: If there are fewer slots than experiences.
        """
        self.chosen = _resized(self.chosen, new_size)
        self.max_size = new_size
        if self._experiences:
            self._gather()

    def _gather(self) -> None:
        memory = self.chosen.contents()
        by_experience = [memory.x[memory.extras["experience"] == one].tolist() for one in range(len(self._experiences))]
        parts = zip(self._experiences, by_experience, strict=True)
        self.buffer = concat_datasets([dataset.subset(positions) for dataset, positions in parts])


def _losses(agent: Any, dataset: Any) -> tuple[Tensor, Tensor]:
    """(N,) float32 cross-entropy of each sample and (N,) int64 task labels, on the CPU."""
    losses, tasks = [], []
    with evaluating(agent.model), torch.no_grad():
        for x, y, *_, task in DataLoader(dataset, batch_size=512, collate_fn=dataset.collate_fn):
            logits = avalanche_forward(agent.model, x.to(agent.device), task.to(agent.device))
            losses.append(F.cross_entropy(logits, y.to(agent.device), reduction="none").cpu())
            tasks.append(task)
    return torch.cat(losses), torch.cat(tasks)


def _resized(buffer: LossBinnedBuffer, capacity: int) -> LossBinnedBuffer:
    """A buffer of another capacity with as much of the content as it may hold."""
    other = LossBinnedBuffer(capacity, buffer.bins, redistribute=buffer.redistribute)
    filled = buffer.composition().numpy()  # (experiences, bins)
    if len(filled) == 0:
        return other
    if capacity < len(filled):
        raise InputError(f"expected a size of at least one sample for each of {len(filled)} experiences, got {capacity}")
    state = buffer.state_dict()
    columns = state["columns"]
    cells = (columns["_origin"] * buffer.bins + columns["_bin"]).numpy()
    keep = np.stack([lower_fullest(row, capacity // len(filled)) for row in filled]).ravel()
    stays = torch.from_numpy(within_quota(cells, keep, torch.randperm(len(cells)).numpy()))
    other.load_state_dict({**state, "capacity": capacity, "columns": {name: one[stays] for name, one in columns.items()}})
    return other
