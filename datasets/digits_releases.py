"""Two releases of one small Vision Transformer on the digits: what was fine-tuned on A is to be carried over to B.

`digits-releases` has a head for every task (closed vocabulary), `digits-releases-open` fixed class embeddings that both
releases share (open vocabulary), `digits-vit-barrier` two networks that learned from the same digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from shiftproof.benchmark import (
    ArrayData,
    BaseRecipe,
    DataExperience,
    EvalSet,
    Fold,
    InputError,
    Recipe,
    Scenario,
    Stream,
    StreamSpec,
    hookimpl,
)
from shiftproof.datasets.digits import LICENCE, NAMES, SOURCE, TASKS
from shiftproof.datasets.domains import DOMAINS, Rendition, draw, plain
from shiftproof.datasets.renditions import renderer
from shiftproof.datasets.splits import ROWS, Array, digits, split

SIZE = 16  # pixels a side
# Of the split, no task's: its order says whose digits are whose, and what pre-training and support look like comes from it.
BASE_ROW = ROWS - 1
VERSION = "1"
CLOSED = ("even", "five-or-more", "closed-loop", "prime")  # of the questions of `b-digits`
OPEN = ("thick", "hatched", "textured", "slanted")  # of the renditions of `digits-domains`

# Calibrated on seed 100 of one split with both releases, the fine-tuned A and its task vector added to B as it is, before any
# alignment was looked at; README.md has the table.
A = BaseRecipe(backbone="digits-vit", kind="supervised", seed=0, epochs=500, batch_size=64, lr=1e-3)
B = BaseRecipe(backbone="digits-vit", kind="supervised", seed=2, epochs=150, batch_size=64, lr=1e-3)
A_OPEN, B_OPEN = replace(A, kind="class-embeddings"), replace(B, kind="class-embeddings", seed=1)
TWIN = replace(B, epochs=100)  # of `digits-vit-barrier`, which learn from the digits of A and of B
RECIPE = Recipe(
    name="standard", epochs=30, batch_size=64, optimizer="adamw", lr=1e-3, weight_decay=0.1, schedule="cosine", clip_norm=1.0
)


@dataclass(frozen=True)
class ReleasesConfig:
    """Knobs of the streams of releases."""

    split_seed: Annotated[int, Ge(0)] = 0  # 0 = the frozen file; another draws split, orders, shifts and noise anew
    noise: Annotated[int, Ge(0), Le(255)] = 13  # standard deviation in grey levels
    shift: Annotated[int, Ge(0), Le(8)] = 1  # at most so many pixels in each direction
    base_samples: Annotated[int, Ge(64), Le(1000)] = 180  # training digits that only release A sees
    release_samples: Annotated[int, Ge(64), Le(1000)] = 600  # training digits that only release B sees
    task_samples: Annotated[int, Ge(64), Le(1000)] = 470  # training digits of the tasks


class Parts(NamedTuple):
    """Positions in scikit-learn's file, ascending; no digit is in two of them."""

    base: Array
    release: Array
    tasks: Array
    held_out: Array


def parts(config: ReleasesConfig) -> Parts:
    """Which digits release A sees, which B, which the tasks, and which are held out.

    Raises:
        InputError: If the split has fewer training digits than the three samples want.
    """
    frozen = split(config.split_seed)
    order = frozen.order[BASE_ROW].astype(np.int64)
    train = order[~frozen.held_out[order]]
    ends = np.cumsum([config.base_samples, config.release_samples, config.task_samples])
    if ends[-1] > len(train):
        raise InputError(
            f"expected base_samples, release_samples and task_samples of at most {len(train)} in all, got {ends[-1]}; lower one"
        )
    base, release, tasks, _ = (np.sort(part) for part in np.split(train, ends))
    return Parts(base, release, tasks, np.flatnonzero(frozen.held_out))


def digits_releases(config: ReleasesConfig, root: str | None = None) -> Stream:
    """`digits-releases`: four binary questions, each with a head of its own; head 0 has the ten classes of pre-training."""
    folds = tuple(_closed_fold(NAMES.index(name), config) for name in CLOSED)
    heads = {0: 10, **{fold.train[0].task: 2 for fold in folds}}
    return _stream("digits-releases", folds, heads, (A, B), parts(config)[:2], config)


def digits_releases_open(config: ReleasesConfig, root: str | None = None) -> Stream:
    """`digits-releases-open`: four renditions, ten classes, and class embeddings that stay as they are."""
    folds = tuple(_open_fold(name, config) for name in OPEN)
    return _stream("digits-releases-open", folds, {0: 10}, (A_OPEN, B_OPEN), parts(config)[:2], config)


def digits_vit_barrier(config: ReleasesConfig, root: str | None = None) -> Stream:
    """`digits-vit-barrier`: both learn from the digits of both releases, with different seeds; the task is plain digits."""
    both = np.sort(np.concatenate(parts(config)[:2]))
    train = _draw(BASE_ROW, parts(config).tasks, plain, config)
    test = _draw(BASE_ROW, parts(config).held_out, plain, config)
    evaluation = EvalSet("digits", ((0, test),), torch.zeros(len(test), dtype=torch.int64), ("digits",))
    folds = (Fold("digits", (DataExperience(0, "digits", 0, train),), (evaluation,)),)
    return _stream("digits-vit-barrier", folds, {0: 10}, (replace(TWIN, seed=0), TWIN), (both, both), config)


def _closed_fold(row: int, config: ReleasesConfig) -> Fold:
    # Task 0 is pre-training's, so the questions count from 1.
    task, asked = row + 1, parts(config)
    train = _question(row, asked.tasks, config)
    return _fold(NAMES[row], task, train, _question(row, asked.held_out, config), config)


def _open_fold(name: str, config: ReleasesConfig) -> Fold:
    row, asked = tuple(DOMAINS).index(name), parts(config)
    train, test = (_draw(row, part, DOMAINS[name], config) for part in (asked.tasks, asked.held_out))
    return _fold(name, 0, train, test, config)


def _fold(name: str, task: int, train: ArrayData, test: ArrayData, config: ReleasesConfig) -> Fold:
    """One task, measured on itself and on the support: held-out plain digits, ten classes, the head of pre-training."""
    support = _draw(BASE_ROW, parts(config).held_out, plain, config)
    groups = torch.arange(2).repeat_interleave(torch.tensor([len(test), len(support)]))
    evaluation = EvalSet(name, ((task, test), (0, support)), groups, ("task", "support"))
    return Fold(name, (DataExperience(0, name, task, train),), (evaluation,))


def _question(row: int, index: Array, config: ReleasesConfig) -> ArrayData:
    """As many digits that answer no as digits that answer yes, in white ink: the first of the task's frozen order."""
    _, labels = digits()
    order = split(config.split_seed).order[row].astype(np.int64)
    order = order[np.isin(order, index)]
    yes = np.isin(labels[order], TASKS[NAMES[row]])
    count = min(yes.sum(), (~yes).sum())
    chosen = np.sort(np.concatenate([order[yes][:count], order[~yes][:count]]))
    drawn = _draw(row, chosen, plain, config)
    return ArrayData(drawn.x, _int64(np.isin(labels[chosen], TASKS[NAMES[row]])))


def _draw(row: int, index: Array, rendition: Rendition, config: ReleasesConfig) -> ArrayData:
    return draw(renderer(config.split_seed, SIZE, config.noise, config.shift), row, index, rendition)


def _int64(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _stream(
    name: str,
    folds: tuple[Fold, ...],
    heads: Mapping[int, int],
    recipes: tuple[BaseRecipe, BaseRecipe],
    seen: tuple[Array, Array],
    config: ReleasesConfig,
) -> Stream:
    """A stream of releases: `recipes` make A and B from the digits that `seen` names."""
    base, release = (_draw(BASE_ROW, index, plain, config) for index in seen)
    return Stream(
        name=name,
        version=VERSION,
        scenario=Scenario.TRANSPORT,
        folds=folds,
        heads=heads,
        base=recipes[0],
        recipe=RECIPE,
        split_sha256=_hash(config, [fold.name for fold in folds]),
        tier="digits",
        source=SOURCE,
        licence=LICENCE,
        evaluate="last",
        base_data=base,
        frozen_heads=recipes[0].kind == "class-embeddings",
        release=recipes[1],
        release_data=release,
    )


def _hash(config: ReleasesConfig, tasks: Sequence[str]) -> str:
    """Identity of the split: the frozen arrays, the seed they are drawn from, and what else decides who is where."""
    samples = {name: value for name, value in asdict(config).items() if name.endswith("_samples")}
    identity = {
        "arrays": split(config.split_seed).sha256(),
        "split_seed": config.split_seed,
        "tasks": list(tasks),
        **samples,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@hookimpl
def shiftproof_streams() -> list[StreamSpec[Any]]:
    """`digits-releases`, `digits-releases-open` and `digits-vit-barrier`."""
    streams: dict[str, tuple[Callable[[ReleasesConfig, str | None], Stream], str]] = {
        "digits-releases": (
            digits_releases,
            f"carry {', '.join(CLOSED)} from one release of a small ViT to the next, heads and all",
        ),
        "digits-releases-open": (
            digits_releases_open,
            f"carry {', '.join(OPEN)} from one release to the next; class embeddings are shared and fixed",
        ),
        "digits-vit-barrier": (
            digits_vit_barrier,
            "two small ViTs trained from scratch on the same digits with different seeds",
        ),
    }
    return [
        StreamSpec(name, build, ReleasesConfig, "digits", description, SOURCE, LICENCE)
        for name, (build, description) in streams.items()
    ]
