"""Synthetic records: sound ones, in which hashes and metrics agree with the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from shiftproof.benchmark.metrics import CellScores, shiftproof_metrics
from shiftproof.benchmark.records import PROTOCOL_VERSION, SCHEMA_VERSION, RunRecord, sha256
from shiftproof.benchmark.streams import Scenario

Counts = Sequence[Sequence[Sequence[tuple[int, int]]]]


MakeRecord = Callable[..., RunRecord]


def digest(text: str) -> str:
    return sha256(text)


def identity(strategy: str, seed: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "strategy": strategy,
        "config": {"buffer": 200},
        "code_sha256": digest(strategy),
        "stream": "b-digits",
        "stream_version": "1",
        "knobs": {"p_corr": 0.95},
        "split_sha256": digest("split"),
        "data_sha256": digest("data"),
        "fold": "all",
        "seed": seed,
        "recipe": {"name": "standard", "epochs": 20},
        "base": {"backbone": "small-conv", "kind": "random", "sha256": digest("base")},
        "device": "cpu",
        "dtype": "float32",
        "protocol_version": PROTOCOL_VERSION,
    }


PROTOCOL = {
    "scenario": "task-incremental",
    "evaluate": "each",
    "uses_group_labels": False,
    "uses_bias_knowledge": False,
    "needs_data": False,
    "uses_target": False,
    "selection": "last epoch, no validation data",
    "recipe": "standard",
    "backbone": "small-conv",
    "base_sha256": digest("base"),
    "base_weights_sha256": digest("weights"),
    "tier": "digits",
    "custom": False,
    "consumes": "DataExperience",
}
PROVENANCE = {
    "command": "shiftproof run digits --out runs",
    "git_commit": "0" * 40,
    "git_dirty": False,
    "packages": {"torch": "2.0"},
    "python": "3.11.7",
    "hardware": {"cpu": "a processor", "cores": 2, "gpu": None},
    "threads": 1,
    "deterministic": True,
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:01:00+00:00",
    "attempts": 1,
    "resumed_from": [],
}
COST = {
    "wall_seconds": 60.0,
    "train_seconds": 50.0,
    "eval_seconds": 10.0,
    "peak_memory_mb": 300.0,
    "samples_seen": 1000,
    "optimizer_steps": 100,
    "experts_trained": 0,
    "experts_reused": 0,
}


@dataclass
class Blocks:
    """The blocks of a record that tests change."""

    identity: dict[str, Any]
    protocol: dict[str, Any]
    provenance: dict[str, Any]
    cost: dict[str, Any]

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set fields by name, in every block that has one."""
        for name, value in changes.items():
            blocks = [block for block in (self.identity, self.protocol, self.provenance, self.cost) if name in block]
            assert blocks, f"no block has a field {name!r}"
            for block in blocks:
                # Both blocks name the recipe, one as a whole.
                block[name] = value["name"] if block is self.protocol and isinstance(value, dict) else value


def results_of(counts: Counts, experiences: Sequence[str]) -> dict[str, Any]:
    """Two classes; the classes of an eval set halve the sums over its groups."""

    def classes(cell: Sequence[tuple[int, int]]) -> list[list[int]]:
        correct, total = sum(c for c, _ in cell), sum(n for _, n in cell)
        return [[correct // 2, total // 2], [correct - correct // 2, total - total // 2]]

    return {
        "experiences": list(experiences),
        "eval_sets": [{"name": f"task-{j}", "groups": [f"g{g}" for g in range(len(cell))]} for j, cell in enumerate(counts[0])],
        "counts": [[[list(pair) for pair in cell] for cell in row] for row in counts],
        "class_counts": [[classes(cell) for cell in row] for row in counts],
    }


def samples_of(results: dict[str, Any] | None, fold: str) -> dict[str, int]:
    """Samples of each eval set, another fold's included."""
    cells = zip(results["eval_sets"], results["counts"][0], strict=True) if results else ()
    return {f"{fold}/{one['name']}": sum(total for _, total in cell) for one, cell in cells} | {f"not-{fold}/task-0": 200}


def simple_counts(strategy: str, seed: int) -> Counts:
    """Two tasks of two groups of 100; differs between strategies and seeds."""
    skill = 40 + int(digest(strategy)[:2], 16) % 40
    noise = int(digest(f"{strategy}{seed}")[:2], 16) % 5
    learned, forgotten = skill + noise, skill - 10 + noise
    return [[[(learned, 100), (learned - 20, 100)], [(10, 100), (10, 100)]], [[(forgotten, 100), (forgotten - 20, 100)]] * 2]


def _make_record(
    strategy: str = "sgd", seed: int = 0, counts: Counts | None = None, *, failed: bool = False, **changes: Any
) -> RunRecord:
    label = changes.pop("label", strategy)
    experiences = changes.pop("experiences", None)
    blocks = Blocks(identity(strategy, seed), dict(PROTOCOL), dict(PROVENANCE), dict(COST))
    blocks.change(changes)
    counts = simple_counts(strategy, seed) if counts is None else counts
    results = None if failed else results_of(counts, experiences or [f"task-{i}" for i in range(len(counts))])
    record = RunRecord(
        run_id=sha256(blocks.identity),
        status="failed" if failed else "finished",
        identity=blocks.identity,
        label=label,
        plugin={
            "distribution": "shiftproof",
            "version": "0.1.0",
            "entry_point": "baselines",
            "code_sha256": blocks.identity["code_sha256"],
        },
        protocol=blocks.protocol,
        data={
            **{name: blocks.identity[name] for name in ("data_sha256", "split_sha256")},
            "counts": {"train": {"all/task-0": 100}, "eval": samples_of(results, blocks.identity["fold"])},
            "source": "scikit-learn",
            "licence": "BSD",
        },
        results=results,
        results_sha256=None if results is None else sha256(results),
        metrics={},
        logs=[{"loss": 0.5}],
        provenance=blocks.provenance,
        cost=blocks.cost,
        error={"type": "NotFiniteError", "message": "loss is nan", "where": "experience task-0"} if failed else None,
    )
    return record if results is None else replace(record, metrics=metrics_of(record))


def metrics_of(record: RunRecord) -> dict[str, Any]:
    assert record.results is not None
    scores = CellScores.from_results(record.results, Scenario(record.protocol["scenario"]).ordered)
    return {
        spec.name: {"value": spec.compute(scores), "higher_is_better": spec.higher_is_better, "definition": spec.definition}
        for spec in shiftproof_metrics()
    }


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    """Build a sound record; keywords change fields of identity, protocol, provenance or cost by name."""
    return _make_record
