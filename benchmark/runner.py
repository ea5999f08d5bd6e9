"""Run one cell: the only loop over experiences. Checkpoints, resume, record."""

from __future__ import annotations

import hashlib
import io
import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark import codehash, config, lifting
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import CHECKPOINT_SECONDS, Checkpointer, Cost, RunContext
from shiftproof.benchmark.contracts import Resumable, State, StrategySpec
from shiftproof.benchmark.errors import NotFiniteError, OutputError
from shiftproof.benchmark.evaluation import EvalCounts, evaluate
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.metrics import CellScores
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.pretraining import base_weights
from shiftproof.benchmark.provenance import Provenance, peak_memory_mb
from shiftproof.benchmark.records import (
    PROTOCOL_VERSION,
    SCHEMA_VERSION,
    RecordStore,
    RunRecord,
    RunRequest,
    sha256,
    write_atomically,
)
from shiftproof.benchmark.registry import Registry
from shiftproof.benchmark.streams import Stream


@dataclass(frozen=True, eq=False)
class Cell:
    """A request with everything it names looked up, and its identity."""

    request: RunRequest
    spec: StrategySpec[Any]
    config: Any
    stream: Stream
    identity: dict[str, Any]
    run_id: str


def build_stream(registry: Registry, request: RunRequest, data_root: str | None = None) -> Stream:
    """The stream with the request's knobs, recipe and base."""
    spec = registry.stream(request.stream)
    stream = spec.build(config.resolve(spec.config(), request.knobs), data_root)
    recipe = config.resolve(stream.recipe, request.recipe)
    if request.recipe_name:
        recipe = replace(recipe, name=request.recipe_name)
    return replace(stream, recipe=recipe, base=config.resolve(stream.base, request.base))


def make_cell(registry: Registry, request: RunRequest, stream: Stream, device: str = "cpu") -> Cell:
    """Look up the strategy and take the identity of the run.

    Raises:
        InputError: If a name or a knob is unknown or out of range.
    """
    spec, _, preset = registry.strategy(request.label)
    resolved = config.resolve(preset, request.config)
    stream_config = config.resolve(registry.stream(request.stream).config(), request.knobs)
    return identify(request, spec, resolved, stream, asdict(stream_config), device)


def identify(
    request: RunRequest, spec: StrategySpec[Any], resolved: Any, stream: Stream, knobs: Mapping[str, Any], device: str
) -> Cell:
    """A cell from its parts. The run id is the hash of what determines the result."""
    identity = {
        "schema": SCHEMA_VERSION,
        "strategy": spec.name,
        "config": asdict(resolved),
        "code_sha256": codehash.code_sha256(spec.build.__module__),
        "stream": stream.name,
        "stream_version": stream.version,
        "knobs": dict(knobs),
        "split_sha256": stream.split_sha256,
        "data_sha256": stream.data_sha256,
        "fold": request.fold,
        "seed": request.seed,
        "recipe": asdict(stream.recipe),
        "base": {**asdict(stream.base), "file": Path(stream.base.file).name, "sha256": stream.base_sha256},
        "device": torch.device(device).type,
        "dtype": stream.recipe.precision,
        "protocol_version": PROTOCOL_VERSION,
    }
    return Cell(request, spec, resolved, stream, identity, sha256(identity))


@dataclass
class Progress:
    """What a checkpoint holds of the runner's own: everything learned and measured so far."""

    learned: int = 0
    rows: list[list[EvalCounts]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    eval_seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)


class CellRun:
    """One attempt at a cell."""

    def __init__(self, cell: Cell, registry: Registry, out: Path, cache: Cache, device: str, checkpoint_seconds: float) -> None:
        self.cell = cell
        self.registry = registry
        self.checkpoint = out / "checkpoints" / f"{cell.run_id}.pt"
        self.device = torch.device(device)
        self.progress = Progress()
        self.started = time.monotonic()
        self.base_weights_sha256 = ""
        self.where = "before the first experience"
        self.checkpointer = Checkpointer(self.write_checkpoint, checkpoint_seconds)
        self.context = RunContext(
            cell.request.seed,
            cell.stream.recipe,
            lambda: self._base(cache),
            cell.stream.base_sha256,
            cache,
            out / "work" / cell.run_id,
            self.device,
            self.checkpointer,
        )

    def results(self) -> dict[str, Any]:
        """Learn every experience, evaluate, and return the results block."""
        cell = self.cell
        fold = cell.stream.fold(cell.request.fold)
        experiences = lifting.lift(cell.spec, fold)
        strategy = cell.spec.build(cell.config, self.context)
        self._resume(strategy)
        progress = self.progress
        for position in range(progress.learned, len(experiences)):
            experience = experiences[position]
            self.where = f"experience {experience.name!r}"
            logs = dict(strategy.learn(experience))
            _refuse_non_finite(logs)
            row: list[EvalCounts] = []
            if cell.stream.evaluate == "each" or position == len(experiences) - 1:
                before = time.monotonic()
                row = evaluate(strategy.model(), fold.evals, self.device)
                progress.eval_seconds += time.monotonic() - before
                progress.rows.append(row)
            progress.logs.append(logs)
            progress.learned = position + 1
            counts = [counts.groups for counts in row]
            self.registry.observers.experience_learned(cell.request, experience.name, logs, counts)
            if isinstance(strategy, Resumable):
                self.context.tick(strategy.state)
        names = [experience.name for experience in experiences]
        return {
            "experiences": names if cell.stream.evaluate == "each" else names[-1:],
            "eval_sets": [{"name": e.name, "groups": list(e.group_names)} for e in fold.evals],
            "counts": [[[list(pair) for pair in counts.groups] for counts in row] for row in progress.rows],
            "class_counts": [[[list(pair) for pair in counts.classes] for counts in row] for row in progress.rows],
        }

    def seconds(self) -> float:
        """Wall time over all attempts that were resumed."""
        return self.progress.seconds + time.monotonic() - self.started

    def _base(self, cache: Cache) -> tuple[Model, StateDict]:
        stream = self.cell.stream
        build = self.registry.backbone(stream.base.backbone).build
        weights = base_weights(
            stream.base, lambda: build(stream.input_shape), stream.unlabelled(), cache, stream.base_sha256, self.device
        )
        self.base_weights_sha256 = sha256({name: _bytes_sha256(tensor) for name, tensor in sorted(weights.items())})
        return Model(build(stream.input_shape), stream.heads), weights

    def write_checkpoint(self, state: State | None) -> None:
        """Everything that a later attempt needs, in one file that loads without executing code."""
        buffer = io.BytesIO()
        progress = asdict(replace(self.progress, seconds=self.seconds()))
        torch.save({"progress": progress, "cost": asdict(self.context.cost), "strategy": state}, buffer)
        write_atomically(self.checkpoint, buffer.getvalue())

    def _resume(self, strategy: Any) -> None:
        if not self.checkpoint.exists() or not isinstance(strategy, Resumable):
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        progress = saved["progress"]
        progress["rows"] = [[EvalCounts(_pairs(e["groups"]), _pairs(e["classes"])) for e in row] for row in progress["rows"]]
        progress["resumed_from"] = [*progress["resumed_from"], progress["learned"]]
        self.progress = Progress(**progress)
        self.context.cost = Cost(**saved["cost"])
        strategy.load(saved["strategy"])


def run_cell(
    cell: Cell,
    registry: Registry,
    out: Path,
    cache: Cache | None = None,
    device: str = "cpu",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    command: str = "",
) -> RunRecord:
    """Run a cell, or go on with it where a checkpoint lies, and write its record.

    A strategy that fails gives a record that says so; only what the user can mend is raised.

    Raises:
        OutputError: If the output folder cannot be written.
    """
    store = RecordStore(out)
    run = CellRun(cell, registry, out, cache or Cache(), device, checkpoint_seconds)
    provenance = Provenance(cell.spec.build.__module__, command)
    registry.observers.run_started(cell.request)
    results, error = None, None
    try:
        with run.context.global_rng("global"):
            results = run.results()
    except OutputError:
        raise  # the disk is full or read-only: not the strategy's fault, and the user can mend it
    except Exception as failure:  # a stranger's code: whatever it raises becomes the record's reason
        error = _describe(failure, run.where)
    attempts = _attempts(store, cell.run_id) + 1
    record = _record(cell, registry, run, provenance.block(attempts, run.progress.resumed_from), results, error)
    store.write(record)
    run.checkpoint.unlink(missing_ok=True)
    registry.observers.run_finished(record)
    return record


def _record(
    cell: Cell, registry: Registry, run: CellRun, provenance: dict[str, Any], results: dict[str, Any] | None, error: Any
) -> RunRecord:
    stream, spec, logs = cell.stream, cell.spec, run.progress.logs
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
        protocol={
            "scenario": str(stream.scenario),
            "evaluate": stream.evaluate,
            "uses_group_labels": spec.uses_group_labels,
            "uses_bias_knowledge": spec.uses_bias_knowledge,
            "needs_data": spec.needs_data,
            "consumes": spec.consumes.__name__,
            "selection": stream.selection,
            "recipe": stream.recipe.name,
            "backbone": stream.base.backbone,
            "base_sha256": stream.base_sha256,
            "base_weights_sha256": run.base_weights_sha256,
            "tier": stream.tier,
            "custom": cell.request.custom,
        },
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
        logs=[{name: value if math.isfinite(value) else None for name, value in entry.items()} for entry in logs],
        provenance=provenance,
        cost={
            "wall_seconds": round(seconds, 3),
            "train_seconds": round(seconds - run.progress.eval_seconds, 3),
            "eval_seconds": round(run.progress.eval_seconds, 3),
            "peak_memory_mb": peak_memory_mb(run.device),
            **asdict(run.context.cost),
        },
        error=error,
    )


def measure(registry: Registry, results: Mapping[str, Any], ordered: bool) -> dict[str, Any]:
    """Every registered metric of a results block."""
    scores = CellScores.from_results(results, ordered)
    return {
        name: {"value": spec.compute(scores), "higher_is_better": spec.higher_is_better, "definition": spec.definition}
        for name, spec in sorted(registry.metrics.items())
    }


def _attempts(store: RecordStore, run_id: str) -> int:
    earlier = store.read(run_id)
    return int(earlier.provenance["attempts"]) if earlier is not None and earlier.status == "failed" else 0


def _refuse_non_finite(logs: Mapping[str, float]) -> None:
    for name, value in logs.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"expected finite numbers from learn(), got {name} = {value}")


def _describe(failure: Exception, where: str) -> dict[str, str]:
    frames = traceback.extract_tb(failure.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else "unknown"
    return {"type": type(failure).__name__, "message": " ".join(str(failure).split()), "where": f"{where}, {place}"}


def _bytes_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().data).hexdigest()


def _pairs(pairs: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(correct), int(total)) for correct, total in pairs)
