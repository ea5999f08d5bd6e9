"""What a cell's record says: the blocks around the counts, and the reason of a failure."""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.benchmark.lifting import needs_data
from shiftproof.benchmark.metrics import CellScores
from shiftproof.benchmark.provenance import peak_memory_mb, without_paths
from shiftproof.benchmark.records import RunRecord, sha256
from shiftproof.benchmark.registry.lookup import Registry

if TYPE_CHECKING:
    from shiftproof.benchmark.running.runner import CellRun

_LOG = logging.getLogger("shiftproof")


def compose(
    run: CellRun, provenance: dict[str, Any], results: dict[str, Any] | None, error: dict[str, str] | None
) -> RunRecord:
    """The record of an attempt at a cell that has come to its end.

    Args:
        provenance: The block of that name.
        results: The results block, None where the cell failed.
        error: What `describe_failure` gave, None where it did not.
    """
    cell, registry = run.cell, run.registry
    stream, spec, cost = cell.stream, cell.spec, run.context.cost
    origin = registry.origin("strategy", spec.name)
    seconds = run.seconds()
    return RunRecord(
        run_id=cell.run_id,
        status="finished" if results else "failed",
        identity=cell.identity,
        label=cell.request.label,
        plugin={
            "distribution": origin.distribution,
            "version": origin.version,
            "entry_point": origin.entry_point,
            "code_sha256": cell.identity["code_sha256"],
        },
        protocol=_protocol(run),
        data={
            "data_sha256": stream.data_sha256,
            "split_sha256": stream.split_sha256,
            "counts": stream.counts(),
            "source": stream.source,
            "licence": stream.licence,
        },
        results=results,
        results_sha256=sha256(results) if results else None,
        metrics=measure(registry, results, stream.scenario.ordered) if results else {},
        logs=[dict(entry) for entry in run.progress.logs],
        provenance=provenance,
        cost={
            "wall_seconds": round(seconds, 3),
            "train_seconds": round(seconds - run.progress.eval_seconds, 3),
            "eval_seconds": round(run.progress.eval_seconds, 3),
            "peak_memory_mb": peak_memory_mb(run.device),
            **asdict(cost),
        },
        error=error,
    )


def _protocol(run: CellRun) -> dict[str, Any]:
    """The rules of the run."""
    stream, spec, cell = run.cell.stream, run.cell.spec, run.cell
    return {
        "scenario": str(stream.scenario),
        "evaluate": stream.evaluate,
        "uses_group_labels": spec.uses_group_labels,
        "uses_bias_knowledge": spec.uses_bias_knowledge,
        "needs_data": needs_data(spec, cell.config),
        "uses_target": spec.uses_target,
        "consumes": spec.consumes.__name__,
        "selection": stream.selection,
        "recipe": stream.recipe.name,
        "backbone": stream.base.backbone,
        "base_sha256": stream.base_sha256,
        "base_weights_sha256": run.bases.base_sha256,
        "tier": stream.tier,
        "custom": cell.request.custom,
        **(
            {"release_sha256": stream.release_sha256, "release_weights_sha256": run.bases.release_sha256}
            if stream.release
            else {}
        ),
    }


def measure(registry: Registry, results: Mapping[str, Any], ordered: bool) -> dict[str, Any]:
    """Every registered metric of a results block; None where it means nothing or fails."""
    scores = CellScores.from_results(results, ordered)
    return {
        name: {"value": _value(spec, scores), "higher_is_better": spec.higher_is_better, "definition": spec.definition}
        for name, spec in sorted(registry.metrics.items())
    }


def _value(spec: MetricSpec, scores: CellScores) -> float | None:
    try:
        value = spec.compute(scores)
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(f"expected a finite number or None, got {value}")
        return value if value is None else float(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's code: the counts are what matters, a metric does not cost the run
        _LOG.warning("metric %s failed, its value is left open: %s", spec.name, error)
        return None


def describe_failure(failure: BaseException, where: str, module: str) -> dict[str, str]:
    """The failure in one line, and its place: in the strategy's own file, where it passed through that."""
    frames = traceback.extract_tb(failure.__traceback__)
    own = [frame for frame in frames if frame.filename == getattr(sys.modules.get(module), "__file__", None)]
    last = (own or list(frames))[-1]
    place = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    text = str(failure).partition("\nException raised from ")[0]  # after which torch lists the frames of its own code
    message = without_paths(" ".join(text.split()))
    return {"type": type(failure).__name__, "message": message, "where": f"{where}, {place}"}
