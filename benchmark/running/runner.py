"""Run one cell: the only loop over experiences. Checkpoints, resume, record."""

from __future__ import annotations

import io
import logging
import math
import pickle
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark import codehash, lifting
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import CHECKPOINT_SECONDS, Checkpointer, Cost, RunContext
from shiftproof.benchmark.contracts import Resumable, State
from shiftproof.benchmark.errors import ContractError, NotFiniteError, OutputError
from shiftproof.benchmark.evaluation import EvalCounts, evaluate
from shiftproof.benchmark.experiences import DataExperience, Experience, GroupedExperience
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.provenance import Provenance, without_paths
from shiftproof.benchmark.records import RecordStore, RunRecord, remove_leftovers, write_atomically
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.bases import Bases
from shiftproof.benchmark.running.cells import (
    Cell as Cell,
    build_stream as build_stream,
    experts_of as experts_of,
    identify as identify,
    make_cell as make_cell,
    origin_of,
)
from shiftproof.benchmark.running.composing import compose, describe_failure
from shiftproof.benchmark.running.isolation import own_process
from shiftproof.benchmark.streams import Fold

_LOG = logging.getLogger("shiftproof")

_ALTERED = "the strategy alters the training data in place, which other cells read, too; work on a copy"


@dataclass
class Progress:
    """What a checkpoint holds of the runner's own: everything learned and measured so far."""

    learned: int = 0
    rows: list[list[EvalCounts]] = field(default_factory=list)  # one an experience, empty where nothing was measured
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
        self.bases = Bases(cell.stream, registry, cache, self.device)
        self.where = "before the first experience"
        self.checkpointer = Checkpointer(self.write_checkpoint, checkpoint_seconds)
        self.context = RunContext(
            cell.request.seed,
            cell.stream.recipe,
            self.bases.base,
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
        # Base and release come from the data as they are, and are kept for others: before a strategy has laid hands on those.
        self.context.new_model()
        if cell.stream.release is not None:
            self.release()
        strategy = cell.spec.build(cell.config, self.context)
        self._resume(strategy)
        progress = self.progress
        for position in range(progress.learned):
            self._tell(experiences[position].name, position)  # observers of this attempt have not heard of them
        for position in range(progress.learned, len(experiences)):
            self.where = f"experience {experiences[position].name!r}"
            experience = self.consumed(experiences[position], fold)
            progress.logs.append(self._learn(strategy, experience, position))
            is_measured = cell.stream.evaluate == "each" or position == len(experiences) - 1
            progress.rows.append(self._evaluate(strategy, fold, position) if is_measured else [])
            progress.learned = position + 1
            self._tell(experience.name, position)
            if isinstance(strategy, Resumable):
                self.context.tick(strategy.state)
        if cell.stream.content_sha256() != cell.stream.data_sha256:
            raise ContractError(_ALTERED)
        measured = [(experiences[i].name, row) for i, row in enumerate(progress.rows) if row]
        return {
            "experiences": [name for name, _ in measured],
            "eval_sets": [{"name": e.name, "groups": list(e.group_names)} for e in fold.evals],
            "counts": [[[list(pair) for pair in counts.groups] for counts in row] for _, row in measured],
            "class_counts": [[[list(pair) for pair in counts.classes] for counts in row] for _, row in measured],
        }

    def consumed(self, experience: Experience, fold: Fold) -> Experience:
        """The experience itself, or the expert that was fine-tuned on it."""
        cell = self.cell
        if isinstance(experience, DataExperience) and lifting.is_lifted(cell.spec, cell.stream):
            before, making = time.monotonic(), self.bases.seconds
            trainer, _, _ = self.registry.strategy(lifting.EXPERT_TRAINER)
            code_sha256 = cell.identity["experts"]["code_sha256"]
            origin = origin_of(cell.request, cell.stream)
            experience = lifting.expert_for(experience, fold, cell.stream, trainer, code_sha256, self.context, origin)
            if cell.stream.release is not None:
                experience = lifting.carried_to(self.release(), experience)
            # Other cells share it. Base and release, which may have been made on the way, are taken out elsewhere.
            self.started += time.monotonic() - before - (self.bases.seconds - making)
        return lifting.visible_expert(cell.spec, cell.config, experience)

    def _learn(self, strategy: Any, experience: Experience, position: int) -> dict[str, float]:
        before = _versions(experience)
        # A fence for each experience: what global generators give does not depend on what was learned before, or resumed.
        with self.context.global_rng("learn", position):
            logs = _checked(strategy.learn(experience))
        if _versions(experience) != before:
            raise ContractError(_ALTERED)
        return logs

    def _evaluate(self, strategy: Any, fold: Fold, position: int) -> list[EvalCounts]:
        before = time.monotonic()
        with self.context.global_rng("evaluate", position):
            row = evaluate(strategy.model(), fold.evals, self.device)
        self.progress.eval_seconds += time.monotonic() - before
        return row

    def _tell(self, experience: str, position: int) -> None:
        logs, row = self.progress.logs[position], self.progress.rows[position]
        self.registry.observers.experience_learned(self.cell.request, experience, dict(logs), [counts.groups for counts in row])

    def seconds(self) -> float:
        """Wall time over all attempts that were resumed, without the making of base and experts, which cells share."""
        return self.progress.seconds + time.monotonic() - self.started - self.bases.seconds

    def release(self) -> Model:
        """The stream's new release; heads that it does not bring are as those of the base's model.

        Raises:
            InputError: If the stream has none.
        """
        return self.bases.release(self.context.new_model())

    def write_checkpoint(self, state: State | None) -> None:
        """Everything that a later attempt needs, in one file that loads without executing code."""
        buffer = io.BytesIO()
        progress = asdict(replace(self.progress, seconds=self.seconds()))
        torch.save({"progress": progress, "cost": asdict(self.context.cost), "strategy": state}, buffer)
        write_atomically(self.checkpoint, buffer.getvalue())

    def clean(self, record: Path) -> None:
        """Remove what is of no use once the record is written, and what attempts that were killed have left behind."""
        self.checkpoint.unlink(missing_ok=True)
        remove_leftovers(self.checkpoint)
        remove_leftovers(record)
        shutil.rmtree(self.context.workdir, ignore_errors=True)

    def _resume(self, strategy: Any) -> None:
        if not self.checkpoint.exists() or not isinstance(strategy, Resumable):
            return
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            _LOG.warning("%s cannot be read, the cell starts again: %s", self.checkpoint.name, without_paths(str(error)))
            return
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
    from_start: bool = False,
) -> RunRecord:
    """Run a cell, or go on with it where a checkpoint lies, and write its record.

    A strategy that fails gives a record that says so; only what the user can mend is raised.

    Args:
        from_start: Pass over a checkpoint.

    Raises:
        OutputError: If the output folder or the cache cannot be written.
    """
    store = RecordStore(out)
    earlier = store.read(cell.run_id)
    attempts = 1 + (earlier.attempts if earlier is not None and earlier.status == "failed" else 0)
    run = CellRun(cell, registry, out, cache or Cache(), device, checkpoint_seconds)
    if from_start:
        run.checkpoint.unlink(missing_ok=True)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    module = codehash.module_of(cell.spec.build)
    provenance = Provenance(module, command)
    registry.observers.run_started(cell.request)
    results, error = None, None
    try:
        with own_process(), run.context.global_rng("global"):
            results = run.results()
    except (OutputError, KeyboardInterrupt):
        raise  # the disk is full or read-only, or somebody wants to stop: not the strategy's fault
    except BaseException as failure:  # a stranger's code: whatever it raises becomes the record's reason
        error = describe_failure(failure, run.where, module)
    record = compose(run, provenance.block(attempts, run.progress.resumed_from), results, error)
    store.write(record)
    run.clean(store.path(cell.run_id))
    registry.observers.run_finished(record)
    return record


def _checked(logs: Any) -> dict[str, float]:
    """What `learn` returned as plain numbers by name."""
    try:
        detached = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in dict(logs).items()}
        numbers = {str(name): float(value) for name, value in detached.items()}
    except (TypeError, ValueError) as error:
        raise ContractError(f"expected learn() to return numbers by name, got {logs!r:.80}") from error
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"expected finite numbers from learn(), got {name} = {value}")
    return numbers


def _versions(experience: Experience) -> list[int]:
    """How often each tensor of the training data was altered in place."""
    if not isinstance(experience, DataExperience):
        return []
    groups = [experience.groups] if isinstance(experience, GroupedExperience) else []
    return [tensor._version for tensor in (experience.train.x, experience.train.y, *groups)]


def _pairs(pairs: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(correct), int(total)) for correct, total in pairs)
