"""A cell as it travels to a worker, and what the worker does with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import torch

from shiftproof.benchmark.cache import Cache, locked
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RecordStore, RunRecord, RunRequest
from shiftproof.benchmark.registry.loading import PluginError
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running.cells import build_stream, make_cell
from shiftproof.benchmark.running.executors import JobResult
from shiftproof.benchmark.running.runner import run_cell
from shiftproof.benchmark.streams import Stream


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; it looks everything up again by name.

    Attributes:
        entry_points: Plugins to load; None for all.
        files: Loose plugin files.
        rerun: Run even where a finished record lies.
        attempts: Failed attempts when the matrix was planned; where the record says more, another process has tried since.
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
    attempts: int = 0
    wait: bool = False


LINGER_SECONDS = 2.0  # in which a worker that has done its work may end by itself

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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_end_with_main_thread, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose suite was killed would finish its cell, hold the cell's lock until then, and wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_with_main_thread() -> None:
    """A thread that a strategy has left behind would keep the worker, and with it the suite, from ending."""
    threading.main_thread().join()
    time.sleep(LINGER_SECONDS)
    os._exit(0)


def execute(job: Job) -> JobResult:
    """Run one cell unless it is done or another process is at it.

    Raises:
        InputError: If the output folder cannot be written, or the code or the data are no longer what was planned.
    """
    out = Path(job.out)
    limit_threads()  # again, in case an earlier cell's strategy has set more
    try:
        with locked(out / "locks" / f"{job.run_id}.lock", wait=job.wait):
            return JobResult(job.run_id, _run(job, out).status)
    except filelock.Timeout:
        return JobResult(job.run_id, "busy")
    except PluginError as error:
        raise InputError(str(error)) from error  # which, unlike a PluginError, finds its way back from a worker


def answer(job: Job) -> JobResult | str:
    """`execute`, with wrong input as its message: for engines that bring a traceback back instead of an exception."""
    try:
        return execute(job)
    except InputError as error:
        return str(error)


def _run(job: Job, out: Path) -> RunRecord:
    stored = RecordStore(out).read(job.run_id)
    if stored is not None and not job.rerun and (stored.status == "finished" or stored.attempts > job.attempts):
        return stored
    device = chosen_gpu(job.device)
    stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, filter(os.path.exists, job.files)))
    registry = _registry(job.entry_points, job.files, stamps)
    cell = make_cell(registry, job.request, _stream(registry, _stream_part(job.request), job.data_root), device)
    if cell.run_id != job.run_id:
        raise InputError(
            f"{job.request.label} on {job.request.stream}: expected the code and data that were planned, got others; "
            "a file changed while the suite was running: start it again"
        )
    record = run_cell(cell, registry, out, Cache(), device, job.checkpoint_seconds, job.command, job.rerun)
    if record.status == "failed":
        _stream.cache_clear()  # the strategy may have changed the data for those that come after it
    return record


def like_a_worker(device: str) -> str:
    """Set this process up as cells are run, so that what it makes is what they would make; returns its device."""
    limit_threads()
    return chosen_gpu(device)


def chosen_gpu(device: str) -> str:
    """This worker's GPU, set up to repeat itself; "cpu" stays."""
    if device != "cuda":
        return device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not promise to repeat itself
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    return f"cuda:{_worker_rank % torch.cuda.device_count()}"


@lru_cache(maxsize=1)
def _registry(entry_points: tuple[str, ...] | None, files: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> Registry:
    """Plugins are loaded once a worker, and again when a loose file has changed."""
    return load_registry(entry_points, [Path(file) for file in files])


def _stream_part(request: RunRequest) -> RunRequest:
    """What of a request decides about its stream."""
    return replace(request, strategy="", preset="", config=(), fold="", seed=0, custom=False)


@lru_cache(maxsize=1)
def _stream(registry: Registry, request: RunRequest, root: str | None) -> Stream:
    """Streams are built once a worker: every cell of a matrix reads the same arrays."""
    return build_stream(registry, request, root)
