"""Streams of experiences, and builders for the usual scenarios."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from shiftproof.benchmark.experiences import (
    ArrayData,
    DataExperience,
    EvalSet,
    Experience,
    GroupedExperience,
    JointExperience,
)
from shiftproof.benchmark.recipes import BaseRecipe, Recipe

Tier = Literal["digits", "full"]


class Scenario(StrEnum):
    """What the order of experiences means and what is known at test time."""

    TASK_INCREMENTAL = "task-incremental"
    CLASS_INCREMENTAL = "class-incremental"
    OFFLINE = "offline"
    LEAVE_ONE_DOMAIN_OUT = "leave-one-domain-out"
    TRANSPORT = "transport"

    @property
    def ordered(self) -> bool:
        """True where forgetting is defined."""
        return self in (Scenario.TASK_INCREMENTAL, Scenario.CLASS_INCREMENTAL)


@dataclass(frozen=True, eq=False)
class Fold:
    """What is learned in order, and what it is measured on.

    Attributes:
        target: Training set of a held-out domain; only strategies that declare `uses_target` learn it, in place of `train`.
    """

    name: str
    train: tuple[Experience, ...]
    evals: tuple[EvalSet, ...]
    target: DataExperience | None = None

    def __post_init__(self) -> None:
        for kind, parts in (("experiences", self.train), ("eval sets", self.evals)):
            names = [part.name for part in parts]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"fold {self.name!r}: expected {kind} with different names, got {names}")

    def joint(self) -> JointExperience:
        """The union of the data experiences, for strategies that see all tasks at once."""
        parts = [experience for experience in self.train if isinstance(experience, DataExperience)]
        data = ArrayData(torch.cat([part.train.x for part in parts]), torch.cat([part.train.y for part in parts]))
        tasks = torch.cat([part.tasks(torch.arange(len(part.train))) for part in parts])
        return JointExperience(0, "joint", parts[-1].task, data, tasks)


@dataclass(frozen=True, eq=False)
class Stream:
    """A standard benchmark: data, base, recipe, and how it is measured.

    Attributes:
        heads: Classes of each task id; a head has one logit per class.
        evaluate: "each" after every experience, or "last" where the order means nothing.
        split_sha256: Hash of the frozen split; boards refuse to rank across it.
        backbone_sha256: Hash of the backbone's code where a plugin brings it; the harness sets it.
        base_data: What only the base learns from; where there is none, a self-supervised base sees the training inputs.
        frozen_heads: The heads are the base's and stay as they are, like class embeddings of a text tower.
        release: A new release of the base, to which what was fine-tuned on the base is carried over; the same backbone.
        release_data: What only the release learns from, as `base_data`.
    """

    name: str
    version: str
    scenario: Scenario
    folds: tuple[Fold, ...]
    heads: Mapping[int, int]
    base: BaseRecipe
    recipe: Recipe
    split_sha256: str
    tier: Tier
    source: str
    licence: str
    evaluate: Literal["each", "last"] = "each"
    selection: str = "last epoch, no validation data"
    backbone_sha256: str = ""
    base_data: ArrayData | None = None
    frozen_heads: bool = False
    release: BaseRecipe | None = None
    release_data: ArrayData | None = None

    def __post_init__(self) -> None:
        names = [fold.name for fold in self.folds]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"stream {self.name!r}: expected folds with different names, got {names}")
        if self.release is not None and self.release.backbone != self.base.backbone:
            got = f"{self.base.backbone} and {self.release.backbone}"
            raise ValueError(f"stream {self.name!r}: expected one backbone for base and release, got {got}")

    def fold(self, name: str) -> Fold:
        """The fold of that name."""
        for fold in self.folds:
            if fold.name == name:
                return fold
        raise KeyError(name)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.unlabelled()[0].shape[1:])

    def unlabelled(self) -> tuple[torch.Tensor, ...]:
        """Inputs for self-supervised bases: the base's own, or else the training inputs of every experience in order."""
        return self._unlabelled(self.base_data)

    def unlabelled_release(self) -> tuple[torch.Tensor, ...]:
        """The same for the new release."""
        return self._unlabelled(self.release_data)

    def _unlabelled(self, own: ArrayData | None) -> tuple[torch.Tensor, ...]:
        if own is not None:
            return (own.x,)
        return tuple(e.train.x for fold in self.folds for e in fold.train if isinstance(e, DataExperience))

    @cached_property
    def data_sha256(self) -> str:
        """`content_sha256` when it was first asked for."""
        return self.content_sha256()

    def content_sha256(self) -> str:
        """Hash over every training and evaluation array, task id and group as they are now."""
        digest = hashlib.sha256()
        for fold in self.folds:
            for experience in fold.train:
                if isinstance(experience, DataExperience):
                    digest.update(f"{fold.name}/{experience.name}/{experience.task}/{experience.train.sha256()}".encode())
                if isinstance(experience, GroupedExperience):
                    digest.update(experience.groups.contiguous().numpy().data)
            for eval_set in fold.evals:
                digest.update(eval_set.groups.contiguous().numpy().data)
                for task, data in eval_set.parts:
                    digest.update(f"{eval_set.name}/{task}/{data.sha256()}".encode())
        return digest.hexdigest()

    @cached_property
    def base_sha256(self) -> str:
        """Identity of the base: its recipe and the inputs it may see, or the file's content."""
        return self._sha256(self.base, self.base_data)

    @cached_property
    def release_sha256(self) -> str:
        """Identity of the new release, like `base_sha256`; empty where there is none."""
        return "" if self.release is None else self._sha256(self.release, self.release_data)

    def _sha256(self, recipe: BaseRecipe, own: ArrayData | None) -> str:
        facts = {**asdict(recipe), "file": Path(recipe.file).name}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(self.backbone_sha256.encode())
        if recipe.has_head and own is not None:
            digest.update(own.sha256().encode())
        if recipe.kind == "barlow-twins":
            for x in self._unlabelled(own):
                digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
                digest.update(x.contiguous().numpy().data)
        if recipe.kind == "file" and Path(recipe.file).is_file():
            digest.update(Path(recipe.file).read_bytes())
        return digest.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Samples of each training experience and eval set."""
        train = {f"{f.name}/{e.name}": len(e.train) for f in self.folds for e in f.train if isinstance(e, DataExperience)}
        evaluation = {f"{f.name}/{e.name}": len(e.groups) for f in self.folds for e in f.evals}
        return {"train": train, "eval": evaluation}


def leave_one_domain_out(domains: Sequence[DataExperience], evals: Sequence[EvalSet]) -> tuple[Fold, ...]:
    """One fold a domain, named after it: all others are learned, and it is measured on.

    Args:
        domains: Training sets; their `index` is set to their position in each fold.
        evals: The test set of each.
    """
    return tuple(
        Fold(
            target.name,
            tuple(replace(one, index=i) for i, one in enumerate(o for o in domains if o is not target)),
            (evaluation,),
            target,
        )
        for target, evaluation in zip(domains, evals, strict=True)
    )


def sequential(train: Sequence[Experience], evals: Sequence[EvalSet]) -> tuple[Fold, ...]:
    """One fold that is learned in order."""
    return (Fold("all", tuple(train), tuple(evals)),)


def offline(train: DataExperience, evaluation: EvalSet) -> tuple[Fold, ...]:
    """One experience, one eval set: the setting of thesis ch. 4."""
    return sequential([train], [evaluation])
