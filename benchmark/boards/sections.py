"""Sections of a board: which rows may be ranked together, and their ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shiftproof.benchmark.boards import ranking
from shiftproof.benchmark.boards.rows import NOT_RANKED, CellValues, build_row, cell, interval, label_of, mixtures, rounded
from shiftproof.benchmark.boards.verification import scenario_of
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RunRecord, canonical

SORTED_BY = "worst"  # the metric that orders the rows
ONE_ON_A_BOARD = ("stream_version", "split_sha256", "data_sha256")

_OF_A_ROW = ("strategy", "config", "code_sha256", "experts")  # who fine-tuned the experts of a merge, and with which code

_RANKING = "Tukey's HSD over ranked rows, residual variance of the two-way model strategy + seed"


def build_sections(records: Sequence[RunRecord], values: CellValues, metrics: Sequence[MetricSpec]) -> list[dict[str, Any]]:
    """Group records into sections and rank the rows of each.

    Args:
        records: In the order of run ids.
        values: Metrics of the finished records, by run id.
        metrics: What the columns are.

    Raises:
        InputError: If standard records of one stream differ in version, split or data.
    """
    refuse_mixed_streams(record.identity for record in records if not record.protocol["custom"])
    groups = _group(records, _facts)
    facts = [_facts(group[0]) for group in groups]
    details = tell_apart([fact["stream"] for fact in facts], [_flat(fact) for fact in facts])
    sections = [_section(group, values, metrics, detail) for group, detail in zip(groups, details, strict=True)]
    return sorted(sections, key=lambda section: (section["custom"], section["title"]))


def refuse_mixed_streams(identities: Iterable[Mapping[str, Any]]) -> None:
    """Raise InputError where two identities of one stream differ in version, split or data."""
    seen: dict[str, Mapping[str, Any]] = {}
    for identity in identities:
        first = seen.setdefault(identity["stream"], identity)
        pairs = {name: (first[name], identity[name]) for name in ONE_ON_A_BOARD}
        differing = [f"{name} {one} and {other}" for name, (one, other) in pairs.items() if one != other]
        if differing:
            raise InputError(
                f"expected one version, split and data set of stream {identity['stream']!r} on a board, "
                f"got {', '.join(differing)}; give each a board and a folder of its own"
            )


def _facts(record: RunRecord) -> dict[str, Any]:
    """What must agree in two rows that are ranked together."""
    of_identity = ("stream", "stream_version", "knobs", "split_sha256", "data_sha256", "recipe", "base", "protocol_version")
    of_protocol = ("scenario", "evaluate", "tier", "selection", "custom")
    return {
        **{name: record.identity[name] for name in of_identity},
        **{name: record.protocol[name] for name in of_protocol},
        "recipe_name": record.protocol["recipe"],
        **{name: record.identity[name] for name in ("release",) if name in record.identity},
    }


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a title may have to say beside the stream's name and version, the recipe's name and 'custom'."""
    blocks = [block for block in ("knobs", "recipe", "base", "release") if block in facts]
    nested = {f"{block}.{name}": value for block in blocks for name, value in facts[block].items()}
    names = ("split_sha256", "data_sha256", "protocol_version", "scenario", "evaluate", "tier", "selection")
    plain = {name: facts[name] for name in names}
    return {name: value for name, value in (nested | plain).items() if name != "recipe.name"}


def tell_apart(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each item, what does not agree among the items of its name; hashes only where the rest does not tell them apart.

    >>> tell_apart(["lws", "lws", "er"], [{"gamma": 0.3, "bins": 8}, {"gamma": 0.5, "bins": 8}, {"gamma": 0.1}])
    ['gamma=0.3', 'gamma=0.5', '']
    """

    def differing(name: str) -> list[str]:
        namesakes = [fact for other, fact in zip(names, facts, strict=True) if other == name]
        keys = sorted({key for fact in namesakes for key in fact})
        odd = [key for key in keys if len({canonical(fact.get(key)) for fact in namesakes}) > 1]
        plain = [key for key in odd if not key.endswith("sha256")]
        unique = {canonical([fact.get(key) for key in plain]) for fact in namesakes}
        return plain if len(unique) == len(namesakes) else odd

    def shown(key: str, value: object) -> str:
        return f"{key.removesuffix('_sha256')}={str(value)[:8] if key.endswith('sha256') else value}"

    keys = {name: differing(name) for name in dict.fromkeys(names)}
    pairs = zip(names, facts, strict=True)
    return [", ".join(shown(key, fact[key]) for key in keys[name] if key in fact) for name, fact in pairs]


def _group(records: Iterable[RunRecord], key: Callable[[RunRecord], object]) -> list[list[RunRecord]]:
    groups: defaultdict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        groups[canonical(key(record))].append(record)
    return [groups[name] for name in sorted(groups)]


def _section(records: Sequence[RunRecord], values: CellValues, metrics: Sequence[MetricSpec], detail: str) -> dict[str, Any]:
    facts = _facts(records[0])
    title = f"{facts['stream']} {facts['stream_version']}, recipe {facts['recipe_name']}{', custom' * facts['custom']}"
    seeds = sorted({record.identity["seed"] for record in records})
    folds = sorted({record.identity["fold"] for record in records})
    cells = [(seed, fold) for seed in seeds for fold in folds]
    members = _members(records)
    rows = [build_row(group, cells, values, metrics, variant) for group, variant in members]
    return {
        **facts,
        "title": f"{title} ({detail})" if detail else title,
        "ordered": scenario_of(records[0]).ordered,
        "seeds": seeds,
        "folds": folds,
        "ranking": {metric.name: _rank(rows, metric) for metric in metrics if metric.primary},
        "rows": sorted(rows, key=_place),
        "failed": [_failure(record, variant) for group, variant in members for record in group if record.error is not None],
        "flags": ["custom"] * facts["custom"] + mixtures(records),
    }


def _members(records: Sequence[RunRecord]) -> list[tuple[list[RunRecord], str]]:
    """The records of each row, and what tells the row from others with its label."""
    groups = []
    for group in _group(records, lambda record: [record.identity.get(name) for name in _OF_A_ROW]):
        twice = len({cell(record) for record in group}) < len(group)
        # A row may mix devices and is flagged; what ran once on each is two rows.
        groups += _group(group, lambda record: (record.identity["device"], record.identity["dtype"])) if twice else [group]
    facts = []
    for group in groups:
        identity = group[0].identity
        named = {name: identity[name] for name in ("code_sha256", "device", "dtype")}
        trainer = {f"experts.{name}": value for name, value in identity.get("experts", {}).items()}
        facts.append(identity["config"] | named | trainer)
    return list(zip(groups, tell_apart([label_of(group) for group in groups], facts), strict=True))


def _failure(record: RunRecord, variant: str) -> dict[str, Any]:
    seed, fold = cell(record)
    return {
        "label": record.label,
        "variant": variant,
        "seed": seed,
        "fold": fold,
        "run_id": record.run_id,
        **(record.error or {}),
    }


def _place(row: Mapping[str, Any]) -> tuple[object, ...]:
    metrics = row["metrics"]
    metric = metrics.get(SORTED_BY) or metrics[min(metrics)]
    mean, sign = metric["mean"], -1 if metric["higher_is_better"] else 1
    return mean is None, sign * (mean or 0.0), row["label"], row["variant"], row["config_sha256"], row["code_sha256"]


def _rank(rows: Sequence[dict[str, Any]], metric: MetricSpec) -> dict[str, Any]:
    """Write rank, rank range and pooled interval of one metric into the rows; return how it was done."""
    complete = [row for row in rows if row["metrics"][metric.name]["mean"] is not None]
    ranked = [row["metrics"][metric.name] for row in complete if not set(row["flags"]) & set(NOT_RANKED)]
    how = {"method": _RANKING, "confidence": ranking.CONFIDENCE, "rows": len(ranked), "seeds": 0}
    how |= {"residual_variance": None, "degrees": None, "critical_difference": None}
    if not ranked:
        return how
    values = np.array([summary["values"] for summary in ranked])  # (S, K)
    ranks, ranges = ranking.rank_ranges(values, metric.higher_is_better)
    for place, summary in enumerate(ranked):
        summary["rank"] = ranks[place]
        summary["rank_range"] = list(ranges[place]) if ranges else None
    how["seeds"] = values.shape[1]
    if min(values.shape) > 1:
        variance, degrees = ranking.residual_variance(values)
        method = f"Student t, {ranking.CONFIDENCE:.0%}, variance pooled over rows, {degrees} degrees of freedom"
        for summary in ranked:
            summary["pooled_interval"] = interval(ranking.pooled_interval(summary["values"], variance, degrees), method)
        difference = ranking.critical_difference(variance, degrees, *values.shape)
        how |= {"residual_variance": rounded(variance, 4), "degrees": degrees, "critical_difference": rounded(difference, 4)}
    return how
