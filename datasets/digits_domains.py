"""`digits-domains`: leave one rendition of the digits out, learn the others.

The base learns from digits that no expert sees, in plain white ink under generic views; no domain shows them like that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le

from shiftproof.benchmark import (
    ArrayData,
    BaseRecipe,
    DataExperience,
    EvalSet,
    Recipe,
    Scenario,
    Stream,
    StreamSpec,
    hookimpl,
    leave_one_domain_out,
)
from shiftproof.datasets.digits import LICENCE, SOURCE
from shiftproof.datasets.domains import DOMAINS, Rendition, draw, plain
from shiftproof.datasets.renditions import renderer
from shiftproof.datasets.splits import ROWS, Array, digits, split

SIZE = 16  # pixels a side
BASE_ROW = ROWS - 1  # of the split, no domain's: its order says which digits are the base's
VERSION = "1"

# Chosen on seed 100 of one split, with the base, the experts and their plain mean alone; README.md has the table.
BASE = BaseRecipe(backbone="digits-vit", kind="supervised", epochs=240, batch_size=64, lr=1e-3)
RECIPE = Recipe(
    name="standard", epochs=20, batch_size=128, optimizer="adamw", lr=2e-3, weight_decay=0.1, schedule="cosine", clip_norm=1.0
)


@dataclass(frozen=True)
class DomainsConfig:
    """Knobs of `digits-domains`."""

    split_seed: Annotated[int, Ge(0)] = 0  # 0 = the frozen file; another draws split, orders, shifts and noise anew
    noise: Annotated[int, Ge(0), Le(255)] = 13  # standard deviation in grey levels
    shift: Annotated[int, Ge(0), Le(8)] = 1  # at most so many pixels in each direction
    base_samples: Annotated[int, Ge(64), Le(1000)] = 450  # training digits that only the base sees


def digits_domains(config: DomainsConfig, root: str | None = None) -> Stream:
    """One fold a domain; ten classes, one head, which is the base's and stays as it is."""
    base, rest, held_out = parts(config)
    _, labels = digits()
    train, evals = [], []
    for row, (name, rendition) in enumerate(DOMAINS.items()):
        train.append(DataExperience(row, name, 0, _draw(row, rest, rendition, config)))
        test = _draw(row, held_out, rendition, config)
        evals.append(EvalSet(name, ((0, test),), torch.zeros(len(test), dtype=torch.int64), (name,)))
    return Stream(
        name="digits-domains",
        version=VERSION,
        scenario=Scenario.LEAVE_ONE_DOMAIN_OUT,
        folds=leave_one_domain_out(train, evals),
        heads={0: int(labels.max()) + 1},
        base=BASE,
        recipe=RECIPE,
        split_sha256=_hash(config),
        tier="digits",
        source=SOURCE,
        licence=LICENCE,
        evaluate="last",
        base_data=_draw(BASE_ROW, base, plain, config),
        frozen_heads=True,
    )


def parts(config: DomainsConfig) -> tuple[Array, Array, Array]:
    """Which digits the base sees, which the experts, and which are held out: positions in scikit-learn's file, ascending."""
    frozen = split(config.split_seed)
    order = frozen.order[BASE_ROW].astype(np.int64)
    train = order[~frozen.held_out[order]]
    return (
        np.sort(train[: config.base_samples]),
        np.sort(train[config.base_samples :]),
        np.flatnonzero(frozen.held_out),
    )


def _draw(row: int, index: Array, rendition: Rendition, config: DomainsConfig) -> ArrayData:
    return draw(renderer(config.split_seed, SIZE, config.noise, config.shift), row, index, rendition)


def _hash(config: DomainsConfig) -> str:
    identity = {
        "arrays": split(config.split_seed).sha256(),
        "split_seed": config.split_seed,
        "base_samples": config.base_samples,
        "domains": list(DOMAINS),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@hookimpl
def shiftproof_streams() -> list[StreamSpec[Any]]:
    """`digits-domains`."""
    description = f"leave one of {len(DOMAINS)} renditions of the digits out: {', '.join(DOMAINS)}"
    return [StreamSpec("digits-domains", digits_domains, DomainsConfig, "digits", description, SOURCE, LICENCE)]
