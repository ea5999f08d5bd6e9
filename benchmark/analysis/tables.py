"""Analyses as rows of text and as JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftproof.benchmark.analysis.barrier import Barrier, chord
from shiftproof.benchmark.analysis.energy import Energies
from shiftproof.benchmark.analysis.measuring import Measured
from shiftproof.benchmark.analysis.overlap import Overlap
from shiftproof.benchmark.analysis.sweep import Point, Sweep

_NAN = torch.tensor(math.nan)
NAMED = 3  # matrices that a note names at most


class Table(NamedTuple):
    """A table of text under a header."""

    header: list[str]
    rows: list[list[str]]


def overlap_tables(found: Overlap) -> list[Table]:
    """SAR and angles averaged over layers, and a row a layer averaged over pairs."""
    tables = []
    for title, values in (("mean SAR", found.sar), ("mean angle (rad)", found.angle)):
        rows = [[name, *map(_number, row)] for name, row in zip(found.experts, values.tolist(), strict=True)]
        tables.append(Table([title, *found.experts], rows))
    header = ["layer", "shape", "k", "SAR", "lowest", "highest", "by chance", "angle (rad)"]
    rows = []
    for layer in found.layers:
        sar, angle = _pairs(layer.sar), _pairs(layer.angle)
        ranks = [rank for rank in layer.ranks if rank]
        whole = [sar.mean(), sar.min(), sar.max(), torch.tensor(layer.chance), angle.mean()] if len(sar) else [_NAN] * 5
        rows.append([layer.name, _shape(layer.shape), _span(ranks), *(_number(float(number)) for number in whole)])
    return [*tables, Table(header, rows)]


def overlap_json(found: Overlap) -> dict[str, Any]:
    """Everything, with null where an expert did not change a matrix."""
    return {
        "analysis": "overlap",
        "experts": list(found.experts),
        "epsilon": found.rule.epsilon,
        "one_fewer": found.rule.one_fewer,
        "rows_are": "projected",
        "columns_are": "the subspace",
        "sar": _nulls(found.sar),
        "angle": _nulls(found.angle),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "k": list(layer.ranks),
                "sar": _nulls(layer.sar),
                "angle": _nulls(layer.angle),
                "chance": layer.chance,
            }
            for layer in found.layers
        ],
        "unchanged": list(found.unchanged),
    }


def sigma_tables(found: Energies) -> list[Table]:
    """A row a layer, the one with most energy on the diagonal first."""
    header = ["layer", "shape", "experts", "rank", "energy", "on diagonal", "off"]
    rows = [
        [
            layer.name,
            _shape(layer.shape),
            str(layer.experts),
            str(layer.rank),
            f"{layer.diagonal + layer.off_diagonal:.4g}",
            f"{layer.share:.1%}",
            f"{1 - layer.share:.1%}",
        ]
        for layer in sorted(found.layers, key=lambda layer: -layer.share)
    ]
    return [Table(header, rows)]


def sigma_json(found: Energies) -> dict[str, Any]:
    """Everything, in the order of the base."""
    return {
        "analysis": "sigma",
        "experts": list(found.experts),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "experts": layer.experts,
                "rank": layer.rank,
                "diagonal": layer.diagonal,
                "off_diagonal": layer.off_diagonal,
                "share": layer.share,
            }
            for layer in found.layers
        ],
        "unchanged": list(found.unchanged),
    }


def sweep_tables(found: Sweep) -> list[Table]:
    """Base, experts, defaults and the best of the grid."""
    header = ["point", *(f"of {name}" for name in found.experts), "accuracy", "loss", *_columns(found.eval_sets)]
    marked = {**found.corners, "best": found.best()}
    rows = [
        [name, *(f"{value:g}" for value in point), _percent(one.accuracy), _number(one.loss), *_each(one)]
        for name, (point, one) in marked.items()
    ]
    return [Table(header, rows)]


def sweep_json(found: Sweep) -> dict[str, Any]:
    """The whole grid: `accuracy[i][j][e]` with coefficient i of the first and j of the second on eval set e."""
    best: tuple[Point, Measured] = found.best()
    return {
        "analysis": "sweep",
        "experts": list(found.experts),
        "eval_sets": list(found.eval_sets),
        "values": list(found.values),
        "accuracy": [[_nulls(one.accuracies) for one in row] for row in found.grid],
        "loss": [[_nulls(one.losses) for one in row] for row in found.grid],
        "points": {
            name: {"coefficients": list(point), "accuracy": _nulls(one.accuracies), "loss": _nulls(one.losses)}
            for name, (point, one) in {**found.corners, "best": best}.items()
        },
    }


def barrier_tables(found: Barrier) -> list[Table]:
    """A row a point of the line."""
    header = ["point", "loss", "between the ends", "above", "accuracy", *_columns(found.eval_sets)]
    rows = []
    for point, one, straight in zip(found.points, found.line, chord(found.losses), strict=True):
        rises = one.loss - straight
        rows.append([f"{point:.3g}", _number(one.loss), _number(straight), _number(rises), _percent(one.accuracy), *_each(one)])
    return [Table(header, rows)]


def barrier_json(found: Barrier) -> dict[str, Any]:
    """Everything: `loss[t][e]` at point t on eval set e."""
    return {
        "analysis": "barrier",
        "experts": list(found.experts),
        "eval_sets": list(found.eval_sets),
        "points": list(found.points),
        "loss": [_nulls(one.losses) for one in found.line],
        "accuracy": [_nulls(one.accuracies) for one in found.line],
        "barrier": _nulls(found.height),
        "barriers": _nulls(found.heights),
    }


def barrier_note(found: Barrier) -> str:
    """The barrier of the mean over eval sets, and on which of them it is highest."""
    note = f"barrier: {_number(found.height)}"
    if len(found.heights) == 1:
        return f"{note} on {found.eval_sets[0]}"
    top = max(range(len(found.heights)), key=lambda place: found.heights[place])
    return f"{note} of the mean over eval sets; highest {_number(found.heights[top])} on {found.eval_sets[top]}"


def unchanged_note(names: Sequence[str]) -> str:
    """What to say of matrices that were left out; empty if none were."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"skipped, since no expert changed them: {', '.join(names[:NAMED])}{more}"


def _pairs(values: Tensor) -> Tensor:
    """What a (D, D) matrix says about two different experts that both changed something."""
    off = values[~torch.eye(len(values), dtype=torch.bool)]
    return off[~off.isnan()]


def _columns(eval_sets: Sequence[str]) -> list[str]:
    """Of the accuracy on each eval set; of one alone it is the mean already."""
    return list(eval_sets) if len(eval_sets) > 1 else []


def _each(measured: Measured) -> list[str]:
    return [_percent(value) for value in measured.accuracies] if len(measured.accuracies) > 1 else []


def _nulls(values: Any) -> Any:
    """Nested lists of numbers with None for what JSON has no word for."""
    if isinstance(values, Tensor):
        return _nulls(values.tolist())
    if isinstance(values, list | tuple):
        return [_nulls(value) for value in values]
    return values if math.isfinite(values) else None


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
