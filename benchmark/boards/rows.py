"""One row of a board: a strategy with its config, folded over folds and summed up over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shiftproof.benchmark.boards.ranking import CONFIDENCE, Interval, student_interval
from shiftproof.benchmark.boards.verification import scenario_of
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.records import RunRecord, canonical, sha256

Cell = tuple[int, str]
"""Seed and fold."""
CellValues = Mapping[str, Mapping[str, float | None]]
"""Metrics by run id."""

NOT_RANKED = ("group labels", "bias knowledge", "upper bound", "incomplete", "failed cells")
DEGENERATE = 0.05  # a spectral merge of a smaller share of the parameters is weight averaging in all but name
COSTS = (
    "wall_seconds",
    "train_seconds",
    "eval_seconds",
    "peak_memory_mb",
    "samples_seen",
    "optimizer_steps",
    "experts_trained",
)

# What should be the same in all records of a row; the run id covers only some of it.
_MIXTURES: dict[str, Callable[[RunRecord], object]] = {
    "mixed packages": lambda record: (record.provenance["packages"], record.provenance["python"]),
    "mixed threads": lambda record: record.provenance["threads"],
    "mixed hardware": lambda record: record.provenance["hardware"],
    "mixed devices": lambda record: (record.identity["device"], record.identity["dtype"]),
    "mixed base weights": lambda record: (
        record.protocol["base_weights_sha256"],
        record.protocol.get("release_weights_sha256"),
    ),
}


def cell(record: RunRecord) -> Cell:
    """Which seed and fold a record is about."""
    return record.identity["seed"], record.identity["fold"]


def label_of(records: Iterable[RunRecord]) -> str:
    """What a row is called: a preset may hold the same config as the default, so the shortest of its records' labels."""
    return min((record.label for record in records), key=lambda label: (len(label), label))


def rounded(value: float, digits: int = 9) -> float:
    """`value` with so many significant digits: what a board holds must not hang on the last bit of somebody's arithmetic.

    >>> rounded(2 / 3), rounded(-0.0)
    (0.666666667, 0.0)
    """
    return float(f"{value:.{digits}g}") + 0.0


def mixtures(records: Sequence[RunRecord]) -> list[str]:
    """Flags for what differs between finished records that should agree in it."""
    records = [record for record in records if record.status == "finished"]
    # A commit is that of the strategy's own checkout: those of two distributions have nothing to do with each other.
    commits = {(record.plugin["distribution"], record.provenance["git_commit"]) for record in records}
    flags = ["mixed commits"] * (len(commits) > len({distribution for distribution, _ in commits}))
    flags += [flag for flag, fact in _MIXTURES.items() if len({canonical(fact(record)) for record in records}) > 1]
    return flags + ["dirty tree"] * any(record.provenance["git_dirty"] for record in records)


def build_row(
    records: Sequence[RunRecord], cells: Sequence[Cell], values: CellValues, metrics: Sequence[MetricSpec], variant: str
) -> dict[str, Any]:
    """A row without its ranks.

    Args:
        records: Of one strategy with one config and one code, one a cell.
        cells: What the section expects: every fold of every seed.
        values: Metrics of the finished records.
        metrics: What the columns are.
        variant: What tells the row from others with its label.
    """
    records = sorted(records, key=cell)
    finished = [record for record in records if record.status == "finished"]
    by_cell = {cell(record): values[record.run_id] for record in finished}
    missing = [wanted for wanted in cells if wanted not in by_cell]
    seeds = sorted({seed for seed, _ in cells} - {seed for seed, _ in missing})
    folds = sorted({fold for _, fold in cells})
    first = records[0]
    worst_of_folds = scenario_of(first) == "leave-one-domain-out"
    return {
        "label": label_of(records),
        "variant": variant,
        "strategy": first.identity["strategy"],
        "config": first.identity["config"],
        "config_sha256": sha256(first.identity["config"]),
        "code_sha256": first.identity["code_sha256"],
        "plugins": sorted({f"{record.plugin['distribution']} {record.plugin['version']}" for record in records}),
        **{name: first.protocol[name] for name in ("consumes", "uses_group_labels", "uses_bias_knowledge", "needs_data")},
        "seeds": seeds,
        "folds": folds,
        "missing": [{"seed": seed, "fold": fold} for seed, fold in missing],
        "run_ids": [record.run_id for record in finished],
        "results_sha256": [record.results_sha256 for record in finished],
        "metrics": {
            metric.name: _summary(
                [_fold([by_cell[seed, fold][metric.name] for fold in folds], metric, worst_of_folds) for seed in seeds],
                metric.higher_is_better,
            )
            for metric in metrics
        },
        "cost": {name: _mean([record.cost[name] for record in finished]) for name in COSTS},
        "flags": _flags(records, incomplete=bool(missing)),
    }


def _flags(records: Sequence[RunRecord], incomplete: bool) -> list[str]:
    facts = {
        "group labels": any(record.protocol["uses_group_labels"] for record in records),
        "bias knowledge": any(record.protocol["uses_bias_knowledge"] for record in records),
        "upper bound": any(record.protocol.get("uses_target", False) for record in records),
        "incomplete": incomplete,
        "failed cells": any(record.status == "failed" for record in records),
    }
    last = [record.logs[-1] for record in records if record.logs]
    shares = [share for log in last if (share := log.get("spectral_share")) is not None]
    degenerate = ["degenerate"] if shares and min(shares) < DEGENERATE else []
    return [flag for flag in NOT_RANKED if facts[flag]] + degenerate + mixtures(records)


def _fold(values: Sequence[float | None], metric: MetricSpec, worst_of_folds: bool) -> float | None:
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return None
    if metric.over_folds == "worst" and worst_of_folds:
        return rounded(min(present) if metric.higher_is_better else max(present))
    return rounded(math.fsum(present) / len(present))


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return rounded(math.fsum(present) / len(present)) if present and len(present) == len(values) else None


def _summary(values: Sequence[float | None], higher_is_better: bool) -> dict[str, Any]:
    mean = _mean(values)
    present = [] if mean is None else [value for value in values if value is not None]
    method = f"Student t, {CONFIDENCE:.0%}, {len(present) - 1} degrees of freedom"
    return {
        "higher_is_better": higher_is_better,
        "values": list(values),
        "mean": mean,
        "std": rounded(statistics.stdev(present)) if len(present) > 1 else None,
        "interval": interval(student_interval(present), method),
        "pooled_interval": None,
        "rank": None,
        "rank_range": None,
    }


def interval(bounds: Interval | None, method: str) -> dict[str, Any] | None:
    """An interval as a board holds it; six digits, as quantiles differ in the last ones between versions of scipy."""
    return None if bounds is None else {"low": rounded(bounds[0], 6), "high": rounded(bounds[1], 6), "method": method}
