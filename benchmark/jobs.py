"""A cell as it travels to a worker, and what the worker does with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import torch

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.executors import JobResult
from shiftproof.benchmark.records import RecordStore, RunRecord, RunRequest
from shiftproof.benchmark.registry import Registry, load_registry
from shiftproof.benchmark.runner import build_stream, make_cell, run_cell
from shiftproof.benchmark.streams import Stream


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; it looks everything up again by name.

    Attributes:
        entry_points: Plugins to load; None for all.
        files: Loose plugin files.
        rerun: Run even where a finished record lies.
        wait: Wait where another process holds the cell, instead of answering "busy".
    """

    request: RunRequest
    run_id: str
    out: str
    device: str
    command: str
    checkpoint_seconds: float
    data_root: str | None = None
    entry_points: tuple[str, ...] | None = None
    files: tuple[str, ...] = ()
    rerun: bool = False
    retry: bool = True
    wait: bool = False


_worker_rank = 0


def limit_threads() -> None:
    """One torch thread: cells run beside each other, and one count of threads gives one result."""
    torch.set_num_threads(1)


def start_worker(ranks: Any) -> None:
    """Called once in every spawned worker."""
    global _worker_rank
    with ranks.get_lock():
        _worker_rank = ranks.value
        ranks.value += 1
    limit_threads()


def execute(job: Job) -> JobResult:
    """Run one cell unless it is done or another process is at it."""
    out = Path(job.out)
    lock = out / "locks" / f"{job.run_id}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=-1 if job.wait else 0):
            return JobResult(job.run_id, _run(job, out).status)
    except filelock.Timeout:
        return JobResult(job.run_id, "busy")


def _run(job: Job, out: Path) -> RunRecord:
    stored = RecordStore(out).read(job.run_id)
    if stored is not None and not job.rerun and (stored.status == "finished" or not job.retry):
        return stored
    device = _device(job.device)
    registry = _registry(job.entry_points, job.files)
    cell = make_cell(registry, job.request, _stream(job.entry_points, job.files, job.request, job.data_root), device)
    if cell.run_id != job.run_id:
        raise InputError(
            f"{job.request.label} on {job.request.stream}: expected the code and data that were planned, got others; "
            "a file changed while the suite was running: start it again"
        )
    return run_cell(cell, registry, out, Cache(), device, job.checkpoint_seconds, job.command)


def _device(device: str) -> str:
    if device != "cuda":
        return device
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    return f"cuda:{_worker_rank % torch.cuda.device_count()}"


@lru_cache(maxsize=1)
def _registry(entry_points: tuple[str, ...] | None, files: tuple[str, ...]) -> Registry:
    return load_registry(entry_points, [Path(file) for file in files])


_streams: dict[Any, Stream] = {}


def _stream(entry_points: tuple[str, ...] | None, files: tuple[str, ...], request: RunRequest, root: str | None) -> Stream:
    """Streams are built once a worker: every cell of a matrix reads the same arrays."""
    key = (request.stream, request.knobs, request.recipe, request.base, request.recipe_name, root)
    if key not in _streams:
        _streams.clear()
        _streams[key] = build_stream(_registry(entry_points, files), request, root)
    return _streams[key]
