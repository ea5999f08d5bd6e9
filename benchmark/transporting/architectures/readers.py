"""What reads the features of a network: classifiers, poolers, and the heads of tasks."""

from __future__ import annotations

import re

from shiftproof.benchmark.transporting.drafting import FIXED, Draft

LAST = re.compile(r"head|head_dist|heads|heads\.head|heads\.\d+|head\.proj|fc|classifier|classifier\.out_proj|qa_outputs")
HIDDEN = {"heads.head": "heads.pre_logits", "classifier.out_proj": "classifier.dense", "classifier": "pre_classifier"}
SCALARS = ("logit_scale", "logit_bias")  # of contrastive models


def add_readers(draft: Draft, units: str, pooler: str = "", has_maps: bool = False) -> None:
    """Heads beside the network or beside what contains it, which read `units`; without one that is what it returns.

    A pooler that "classifier" reads has units of its own. Of other heads the names do not tell whether they read the pooler or
    pass it by: its rows follow the units, so that both are right. Where there is no head its rows stay as they are.

    Args:
        pooler: A linear map between the units and a classifier, where there is one.
        has_maps: Heads may read a flattened map of each unit.
    """
    levels = [level for level in _levels(draft) if _last(level)]
    draft.output = units
    if pooler and draft.has(f"{pooler}.weight"):
        is_read = bool(levels) and _last(levels[0]) == ["classifier"] and not _hidden(levels[0], "classifier")
        if is_read:
            draft.output = draft.unit(pooler)
        draft.layer(pooler, draft.output if levels else FIXED, units)
    for level in levels:
        for name in _last(level):
            _add(level, name, draft.output, has_maps)
        draft.output = FIXED
    for level in _levels(draft):
        for name in SCALARS:
            level.tensor(name)


def has_readers(draft: Draft) -> bool:
    """Whether there is a head beside the network or beside what contains it."""
    return any(map(_last, _levels(draft)))


def _levels(draft: Draft) -> list[Draft]:
    """The draft at its own prefix, and at those of what contains it."""
    parts = draft.prefix.split(".")[:-1]
    return [draft.at("".join(f"{part}." for part in parts[:depth])) for depth in range(len(parts), -1, -1)]


def _last(level: Draft) -> list[str]:
    names = (name[len(level.prefix) : -len(".weight")] for name in level.shapes if _is_weight(name, level.prefix))
    return [name for name in names if LAST.fullmatch(name) and len(level.shape(f"{name}.weight")) == 2]


def _is_weight(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.endswith(".weight")


def _hidden(level: Draft, name: str) -> str:
    hidden = HIDDEN.get(name, "")
    return hidden if hidden and level.has(f"{hidden}.weight") else ""


def _add(level: Draft, name: str, units: str, has_maps: bool) -> None:
    if hidden := _hidden(level, name):
        rows = level.unit(hidden)
        level.layer(hidden, rows, units)
        units = rows
    columns = level.flattened(units, level.shape(f"{name}.weight")[1]) if has_maps else units
    level.layer(name, FIXED, columns)
