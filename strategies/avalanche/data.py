"""Our data as Avalanche reads it. Group labels never get here."""

from __future__ import annotations

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

    `train_stream` has an experience for each of the fold's, `test_stream` one for each eval set. Task labels are the stream's
    task ids, for models with a head for each, such as Avalanche's multi-head classifiers; where all tasks share one head they
    are 0, as in Avalanche's class-incremental benchmarks. Training inputs are augmented as the stream's recipe says; the rest
    of the recipe is up to whoever makes the Avalanche strategy.

    Raises:
        InputError: If there is no such fold, or its experiences carry no data.
    """
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels

    names = [one.name for one in stream.folds]
    if fold not in names:
        raise InputError(f"stream {stream.name!r}: expected a fold among {', '.join(names)}, got {fold!r}")
    chosen, shared = stream.fold(fold), len(stream.heads) == 1
    train = [_training_set(one, stream.recipe, shared) for one in chosen.train if isinstance(one, DataExperience)]
    if len(train) < len(chosen.train):
        raise InputError(f"stream {stream.name!r}: expected experiences with data, got experts; choose a data stream")
    test = [_test_set(eval_set, shared) for eval_set in chosen.evals]
    benchmark = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=train, test=test)))
    for one in (*benchmark.train_stream, *benchmark.test_stream):
        # A list, as Avalanche documents it: its own heads index with it, which they cannot with the set that it gives.
        one.classes_in_this_experience = sorted(one.classes_in_this_experience)
    return benchmark


def to_experience(experience: DataExperience, recipe: Recipe, shared: bool, seen: set[int]) -> DatasetExperience:
    """One experience, alone in its stream: what comes later is not known.

    Args:
        shared: All tasks share one head, and their label is 0.
        seen: Classes of earlier experiences.
    """
    from avalanche.benchmarks import CLStream, DatasetExperience, with_task_labels

    dataset = _training_set(experience, recipe, shared)
    one = with_task_labels(DatasetExperience(dataset=dataset, current_experience=experience.index))
    one.origin_stream = CLStream("train", [one], set_stream_info=False)
    one.classes_in_this_experience = sorted(dataset.targets.uniques)
    one.previous_classes = set(seen)
    one.classes_seen_so_far = seen.union(dataset.targets.uniques)
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


def _training_set(experience: DataExperience, recipe: Recipe, shared: bool) -> TaskAwareSupervisedClassificationDataset:
    def altered(x: Tensor) -> Tensor:
        # Drawn from the global generator like everything that Avalanche draws.
        return augment(x[None], recipe.augment, torch.default_generator)[0]

    tasks = experience.tasks(torch.arange(len(experience.train)))
    # Where there is nothing to alter, a dataset without transforms is faster to read.
    return _dataset([experience.train], tasks, shared, {"train": altered, "eval": None} if recipe.augment != "none" else None)


def _test_set(eval_set: EvalSet, shared: bool) -> TaskAwareSupervisedClassificationDataset:
    tasks = torch.cat([torch.full_like(data.y, task) for task, data in eval_set.parts])
    return _dataset([data for _, data in eval_set.parts], tasks, shared)


def _dataset(
    parts: list[ArrayData], tasks: Tensor, shared: bool, transforms: dict[str, Any] | None = None
) -> TaskAwareSupervisedClassificationDataset:
    from avalanche.benchmarks.utils import (
        ConstantSequence,
        DataAttribute,
        TaskAwareSupervisedClassificationDataset,
        TaskLabels,
        TransformGroups,
    )

    labels = torch.zeros_like(tasks) if shared else tasks
    is_constant = bool((labels == labels[0]).all())  # which Avalanche looks up faster
    samples = [_Samples(data) for data in parts]
    return TaskAwareSupervisedClassificationDataset(
        samples,
        data_attributes=[
            DataAttribute([target for one in samples for target in one.targets], "targets"),
            TaskLabels(ConstantSequence(int(labels[0]), len(labels)) if is_constant else labels.tolist()),
        ],
        transform_groups=None if transforms is None else TransformGroups(transforms),
    )
