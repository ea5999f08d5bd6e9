"""Our data as Avalanche reads it. Group labels never get here."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shiftproof.benchmark import ArrayData, DataExperience, EvalSet, InputError, Recipe, Stream, as_float
from shiftproof.strategies.augmentation import augment

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario, DatasetExperience
    from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset


def to_avalanche(stream: Stream, fold: str = "all") -> CLScenario:
    """A fold as an Avalanche benchmark, on which Avalanche's own loop trains and evaluates.

    `train_stream` has an experience for each of the fold's, `test_stream` one for each eval set, both with task labels: models
    need a head for each task id, such as Avalanche's multi-head classifiers. Training inputs are augmented as the stream's
    recipe says; the rest of the recipe is up to whoever makes the Avalanche strategy.

    Raises:
        InputError: If there is no such fold, or its experiences carry no data.
    """
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels

    names = [one.name for one in stream.folds]
    if fold not in names:
        raise InputError(f"stream {stream.name!r}: expected a fold among {', '.join(names)}, got {fold!r}")
    chosen = stream.fold(fold)
    train = [_training_set(one, stream.recipe) for one in chosen.train if isinstance(one, DataExperience)]
    if len(train) < len(chosen.train):
        raise InputError(f"stream {stream.name!r}: expected experiences with data, got experts; choose a data stream")
    test = [_test_set(eval_set) for eval_set in chosen.evals]
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(train=train, test=test)))


def to_experience(experience: DataExperience, recipe: Recipe, seen: AbstractSet[int]) -> DatasetExperience:
    """One experience, alone in its stream: what comes later is not known.

    Args:
        seen: Classes of earlier experiences.
    """
    from avalanche.benchmarks import CLStream, DatasetExperience, with_task_labels

    dataset = _training_set(experience, recipe)
    one = with_task_labels(DatasetExperience(dataset=dataset, current_experience=experience.index))
    one.origin_stream = CLStream("train", [one], set_stream_info=False)
    one.classes_in_this_experience = set(dataset.targets.uniques)
    one.previous_classes = set(seen)
    one.classes_seen_so_far = one.classes_in_this_experience | seen
    return one


class _Samples(Dataset[tuple[Tensor, int]]):
    """Pairs of a float32 input and a target."""

    def __init__(self, data: ArrayData) -> None:
        self.x = data.x
        self.targets = data.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return as_float(self.x[index]), self.targets[index]


def _training_set(experience: DataExperience, recipe: Recipe) -> TaskAwareSupervisedClassificationDataset:
    def altered(x: Tensor) -> Tensor:
        # Drawn from the global generator like everything that Avalanche draws.
        return augment(x[None], recipe.augment, torch.default_generator)[0]

    tasks = experience.tasks(torch.arange(len(experience.train)))
    # Where there is nothing to transform, a dataset without transforms is several times faster to read.
    return _dataset([experience.train], tasks, {"train": altered, "eval": None} if recipe.augment != "none" else None)


def _test_set(eval_set: EvalSet) -> TaskAwareSupervisedClassificationDataset:
    parts = [data for _, data in eval_set.parts]
    return _dataset(parts, torch.cat([torch.full_like(data.y, task) for task, data in eval_set.parts]), None)


def _dataset(parts: list[ArrayData], tasks: Tensor, transforms: Any) -> TaskAwareSupervisedClassificationDataset:
    from avalanche.benchmarks.utils import (
        ConstantSequence,
        DataAttribute,
        TaskAwareSupervisedClassificationDataset,
        TaskLabels,
        TransformGroups,
    )

    samples = [_Samples(data) for data in parts]
    targets = [target for one in samples for target in one.targets]
    one_task = int(tasks[0]) if bool((tasks == tasks[0]).all()) else None
    labels = tasks.tolist() if one_task is None else ConstantSequence(one_task, len(tasks))
    return TaskAwareSupervisedClassificationDataset(
        samples,
        data_attributes=[DataAttribute(targets, "targets"), TaskLabels(labels)],
        transform_groups=None if transforms is None else TransformGroups(transforms),
    )
