"""What a strategy learns from and what it is measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from shiftproof.benchmark.errors import ContractError
from shiftproof.benchmark.models import Model

StateDict = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """A mini-batch.

    Attributes:
        x: (B, ...) float32, inputs after augmentation.
        y: (B,) int64, targets, counted from 0 within the task.
        index: (B,) int64, position in the training set of the experience.
        task: (B,) int64, which head answers.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    task: Tensor

    def __len__(self) -> int:
        return len(self.y)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            where = "; groups are experience.groups[batch.index], where they are declared" if name == "groups" else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{where}")


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Inputs and targets, and nothing else: a strategy that holds one cannot see groups.

    Attributes:
        x: (N, ...) uint8 (read as value / 255) or float32.
        y: (N,) int64.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or self.y.ndim != 1:
            raise ValueError(f"expected N inputs and N targets, got {tuple(self.x.shape)} and {tuple(self.y.shape)}")
        if self.x.dtype not in (torch.uint8, torch.float32) or self.y.dtype != torch.int64:
            raise TypeError(f"expected uint8 or float32 inputs and int64 targets, got {self.x.dtype} and {self.y.dtype}")

    def __len__(self) -> int:
        return len(self.y)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """(B, ...) float32 inputs at `index`, a copy that may be altered; uint8 is scaled to [0, 1]."""
        # A slice is a view of what is stored.
        chosen = self.x[index] if isinstance(index, slice) else self.x.index_select(0, index)
        return as_float(chosen) if chosen.dtype == torch.uint8 or not isinstance(index, slice) else chosen.clone()

    def sha256(self) -> str:
        """Hash over shapes, dtypes and bytes of inputs and targets."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def as_float(x: Tensor) -> Tensor:
    """Stored inputs as float32: uint8 is scaled to [0, 1], float32 passes."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def state_sha256(state: StateDict) -> str:
    """Hash over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, because numpy has no bfloat16."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, eq=False)
class DataExperience:
    """One step of a stream: a training set for one task id."""

    index: int
    name: str
    task: int
    train: ArrayData

    def tasks(self, index: Tensor) -> Tensor:
        """(B,) int64, the task id of each sample at `index`."""
        return torch.full((len(index),), self.task, dtype=torch.int64)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name == "groups":
                raise ContractError(
                    "the strategy reads group labels without declaring it: "
                    "set uses_group_labels=True in its StrategySpec (it is then ranked apart)"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class GroupedExperience(DataExperience):
    """With the group of each training sample; only handed to strategies that declare `uses_group_labels`.

    Attributes:
        groups: (N,) int64.
    """

    groups: Tensor

    def __post_init__(self) -> None:
        if self.groups.shape != self.train.y.shape:
            raise ValueError(f"expected one group for each of {len(self.train)} samples, got {tuple(self.groups.shape)}")

    def without_groups(self) -> DataExperience:
        """The same experience as every other strategy sees it."""
        return DataExperience(self.index, self.name, self.task, self.train)


@dataclass(frozen=True, eq=False)
class JointExperience(DataExperience):
    """The union of a fold's experiences, for `joint`.

    Attributes:
        task_ids: (N,) int64, the task id of each sample; `task` is that of the last experience.
    """

    task_ids: Tensor

    def tasks(self, index: Tensor) -> Tensor:
        """(B,) int64, the task id of each sample at `index`."""
        return self.task_ids[index]


@dataclass(frozen=True, eq=False)
class ExpertExperience:
    """A fine-tuned expert beside the base it came from.

    Attributes:
        base: The model before fine-tuning.
        expert: The model after it.
        shared: Names of the tensors that all experts of the stream have in common; only these are merged.
        data: The training data, for strategies that declare `needs_data`.
        has_zero_shot_head: The base brings heads that answer before anything was learned.
    """

    index: int
    name: str
    task: int
    base: Model
    expert: Model
    shared: frozenset[str]
    data: DataExperience | None = None
    has_zero_shot_head: bool = False

    @property
    def private(self) -> frozenset[str]:
        """Names of the tensors that belong to this task alone: its head, unless all experts share it."""
        return self.expert.head_keys(self.task) - self.shared


@dataclass(frozen=True, eq=False)
class TransportExperience(ExpertExperience):
    """A task vector on one release, and the release it should go to."""

    target_base: Model | None = None


Experience = DataExperience | ExpertExperience


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A held-out set with its groups; a strategy never sees one.

    Attributes:
        name: Unique within the fold.
        parts: (task id, data) pairs, evaluated one after another.
        groups: (N,) int64 over the concatenated parts, values in [0, len(group_names)).
        group_names: One name a group.
    """

    name: str
    parts: tuple[tuple[int, ArrayData], ...]
    groups: Tensor
    group_names: tuple[str, ...]

    def __post_init__(self) -> None:
        total = sum(len(data) for _, data in self.parts)
        if len(self.groups) != total or total == 0:
            raise ValueError(f"eval set {self.name!r}: expected {total} (more than 0) group labels, got {len(self.groups)}")
        if int(self.groups.min()) < 0 or int(self.groups.max()) >= len(self.group_names):
            raise ValueError(f"eval set {self.name!r}: group labels must lie in [0, {len(self.group_names)})")
