"""Cells as tasks of SLURM job arrays, through submitit: they outlive the session that has submitted them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftproof.benchmark.errors import InputError, Terminated
from shiftproof.benchmark.running.executors import THREADS, JobResult, told

if TYPE_CHECKING:
    from submitit import Job as SubmittedJob
    from submitit.helpers import DelayedSubmission

    from shiftproof.benchmark.running.jobs import Job

ARRAY = 1000  # tasks; a cluster's MaxArraySize is 1001 if nobody has changed it
MINUTES = 240  # of a task, unless SBATCH_TIMELIMIT says otherwise
QUEUED = frozenset({"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"})
POLL_SECONDS = 1.0


class Task:
    """What a task of the array does. Before it runs out of time or is preempted, submitit puts it into the queue again."""

    def __call__(self, job: Job) -> JobResult | str:
        """Run the cell, unless it is told to leave."""
        from submitit import JobEnvironment

        from shiftproof.benchmark.running.jobs import answer  # needs torch

        _leave_after(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        return answer(job)

    def checkpoint(self, job: Job) -> DelayedSubmission:
        """The same again: a cell goes on from its own last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def _leave_after(number: signal.Signals) -> None:
    """submitit's handler ends with SystemExit, in the middle of the cell, which would take it for the strategy's failure."""
    requeue = signal.getsignal(number)

    def handler(*arguments: Any) -> None:
        try:
            if callable(requeue):
                requeue(*arguments)
        finally:
            os._exit(1)

    signal.signal(number, handler)


class SlurmExecutor:
    """One task a cell, with one processor and, for `--device cuda`, one GPU.

    What else the cluster wants to know is said in SLURM's own words, the environment of `sbatch`: SBATCH_PARTITION,
    SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_MEM_PER_CPU and so on. Output folder, cache and data lie where every node sees
    them. Logs and what submitit exchanges go to `slurm/` in the output folder.
    """

    def run(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        """Submit what is not in the queue yet, at most `workers` at a time, and wait for all of it.

        If this process is ended or dies, the tasks go on, and who calls again waits for those. An interrupt from the keyboard
        and any error cancel them.

        Raises:
            InputError: If SLURM is not there or refuses, or a cell is told that its input is wrong.
        """
        for command in ("sbatch", "srun", "sacct", "scancel"):
            if shutil.which(command) is None:
                raise InputError(f"expected SLURM's {command} on this machine, got none; use --executor process")
        for start in range(0, len(jobs), ARRAY):
            yield from self._array(jobs[start : start + ARRAY], workers)

    def _array(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        folder = Path(jobs[0].out, "slurm")
        under_way = _submitted(folder, jobs)
        new = [job for job in jobs if job.run_id not in under_way]
        if new:
            under_way |= _submit(folder, new, workers)
            _remember(folder, under_way)
        try:
            while under_way:
                for run_id in [run_id for run_id, task in under_way.items() if task.done()]:
                    yield _result(run_id, under_way.pop(run_id))
                time.sleep(POLL_SECONDS if under_way else 0)
        except Terminated:
            raise  # with the login session: the tasks outlive it
        except BaseException:
            for task in under_way.values():
                task.cancel(check=False)
            raise


def _submit(folder: Path, jobs: Sequence[Job], workers: int) -> dict[str, SubmittedJob[JobResult | str]]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name="shiftproof",
        time=MINUTES,
        cpus_per_task=1,
        array_parallelism=workers,
        setup=[f"export {name}=1" for name in THREADS],
        **({"gpus_per_node": 1} if jobs[0].device == "cuda" else {}),
    )
    try:
        tasks = executor.map_array(Task(), jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"expected sbatch to take {len(jobs)} tasks, got: {said}; see SBATCH_PARTITION and the like") from None
    return {job.run_id: task for job, task in zip(jobs, tasks, strict=True)}


def _submitted(folder: Path, jobs: Sequence[Job]) -> dict[str, SubmittedJob[JobResult | str]]:
    """Tasks of an earlier call that SLURM still has in its queue."""
    names = _names(folder)
    if not names:
        return {}
    import submitit

    tasks: dict[str, SubmittedJob[JobResult | str]] = {
        job.run_id: submitit.SlurmJob(folder, names[job.run_id]) for job in jobs if job.run_id in names
    }
    submitit.SlurmJob.watcher.update()  # one question for all of them
    return {run_id: task for run_id, task in tasks.items() if task.get_info("cache").get("State") in QUEUED}


def _names(folder: Path) -> dict[str, str]:
    file = folder / "tasks.json"
    names: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return names


def _remember(folder: Path, tasks: dict[str, SubmittedJob[Any]]) -> None:
    from shiftproof.benchmark.records import write_atomically

    names = _names(folder) | {run_id: task.job_id for run_id, task in tasks.items()}
    write_atomically(folder / "tasks.json", json.dumps(names, indent=1))


def _result(run_id: str, task: SubmittedJob[JobResult | str]) -> JobResult:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return told(task.result())
    except FailedJobError:
        raise
    except UncompletedJobError:
        return JobResult(run_id, "lost")
