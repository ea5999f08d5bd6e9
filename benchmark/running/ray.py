"""Cells as tasks of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shiftproof.benchmark.running.executors import THREADS, JobResult, told

if TYPE_CHECKING:
    from shiftproof.benchmark.running.jobs import Job


class RayExecutor:
    """One task a cell, with one processor and, for `--device cuda`, one GPU.

    Joins the cluster that RAY_ADDRESS names or that this machine belongs to; where there is none, Ray starts one on this
    machine. Output folder, cache and data lie where every node sees them.
    """

    def run(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        """Run every job with at most `workers` at a time; a worker that dies takes only its own cell with it.

        Raises:
            InputError: If a cell is told that its input is wrong.
        """
        if not jobs:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
        import ray
        from ray import exceptions as errors

        from shiftproof.benchmark.running.jobs import answer  # needs torch

        ours = {name: value for name, value in os.environ.items() if name.startswith("SHIFTPROOF_")}
        ray.init(log_to_driver=False, runtime_env={"env_vars": ours | dict.fromkeys(THREADS, "1")})
        try:
            gpus = int(jobs[0].device == "cuda")
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(answer)
            under_way: dict[ray.ObjectRef, Job] = {}
            queue = iter(jobs)
            while True:
                # No more than wanted, so that a suite that is stopped leaves little behind.
                while len(under_way) < workers and (job := next(queue, None)) is not None:
                    under_way[task.remote(_absolute(job))] = job
                if not under_way:
                    return
                for done in ray.wait(list(under_way))[0]:
                    result: JobResult | str = JobResult(under_way.pop(done).run_id, "lost")
                    with suppress(errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError):
                        result = ray.get(done)
                    yield told(result)
        finally:
            ray.shutdown()


def _absolute(job: Job) -> Job:
    """Workers run in folders of their own."""
    root = job.data_root and str(Path(job.data_root).resolve())
    files = tuple(str(Path(file).resolve()) for file in job.files)
    return replace(job, out=str(Path(job.out).resolve()), data_root=root, files=files)
