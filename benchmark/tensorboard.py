"""An observer: curves for TensorBoard, written where `SHIFTPROOF_TENSORBOARD` names a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shiftproof.benchmark.hookspecs import hookimpl
from shiftproof.benchmark.records import sha256

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from shiftproof.benchmark.records import RunRecord, RunRequest

_writers: dict[RunRequest, SummaryWriter] = {}
_steps: dict[RunRequest, int] = {}


@hookimpl
def shiftproof_run_started(request: RunRequest) -> None:
    """Open a log for the cell, if asked for."""
    folder = os.environ.get("SHIFTPROOF_TENSORBOARD")
    if folder:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when it is used

        name = f"{request.stream}/{request.label}/{request.fold}/seed-{request.seed}"
        if request.config or request.knobs or request.recipe or request.base:
            name += f"-{sha256(asdict(request))[:8]}"  # overrides: curves of their own
        _writers[request] = SummaryWriter(str(Path(folder) / name))
        _steps[request] = 0


@hookimpl
def shiftproof_experience_learned(
    request: RunRequest, experience: str, logs: Mapping[str, float], row: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """One point for each logged number and for each eval set's average and worst group."""
    writer = _writers.get(request)
    if writer is None:
        return
    step = _steps[request]
    _steps[request] += 1
    for name, value in logs.items():
        writer.add_scalar(f"learn/{name}", value, step)
    for position, groups in enumerate(row):
        accuracies = [correct / total for correct, total in groups if total]
        writer.add_scalar(f"average/{position}", sum(accuracies) / len(accuracies), step)
        writer.add_scalar(f"worst/{position}", min(accuracies), step)


@hookimpl
def shiftproof_run_finished(record: RunRecord) -> None:
    """Close the cell's log."""
    for request in [r for r in _writers if (r.label, r.seed, r.stream, r.fold) == _cell_of(record)]:
        _writers.pop(request).close()
        _steps.pop(request)


def _cell_of(record: RunRecord) -> tuple[str, int, str, str]:
    identity = record.identity
    return record.label, identity["seed"], identity["stream"], identity["fold"]
