"""Ways to run the cells of a matrix. Larger matrices go to an engine that exists, through the same hook."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from shiftproof.benchmark.contracts import ExecutorSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.hookspecs import hookimpl

if TYPE_CHECKING:
    from shiftproof.benchmark.running.jobs import Job

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class JobResult:
    """How a cell ended. `busy`: another process holds it; `lost`: its worker died."""

    run_id: str
    status: Literal["finished", "failed", "busy", "lost"]


def told(answer: JobResult | str) -> JobResult:
    """The result, or the InputError whose message came instead."""
    if isinstance(answer, str):
        raise InputError(answer)
    return answer


class Executor(Protocol):
    """Runs jobs in any order and yields a result for each."""

    def run(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        """Run every job with at most `workers` at a time."""
        ...


class InlineExecutor:
    """One cell after another in this process: for debuggers."""

    def run(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        """Run the jobs in order; `workers` is not used."""
        import torch

        from shiftproof.benchmark.running.jobs import execute  # needs torch

        threads = torch.get_num_threads()
        try:
            for job in jobs:
                yield execute(job)
        finally:
            torch.set_num_threads(threads)


class ProcessExecutor:
    """Spawned workers with one torch thread each, and one GPU each where there are GPUs."""

    def run(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        """Run the jobs; a worker that dies takes only its own cell with it, the others go on in a new pool."""
        waiting = list(jobs)
        while waiting:
            done: set[str] = set()
            try:
                for result in self._pool(waiting, workers):
                    done.add(result.run_id)
                    yield result
            except BrokenProcessPool:
                left = [job for job in waiting if job.run_id not in done]
                # Nobody says which worker died: the cells that were under way are run again one at a time, then the rest.
                for job in left[:workers]:
                    yield self._alone(job)
                waiting = left[workers:]
            else:
                return

    def _alone(self, job: Job) -> JobResult:
        try:
            (result,) = self._pool([job], 1)
        except BrokenProcessPool:
            return JobResult(job.run_id, "lost")
        return result

    def _pool(self, jobs: Sequence[Job], workers: int) -> Iterator[JobResult]:
        from shiftproof.benchmark.running.jobs import execute, start_worker

        if not jobs:
            return
        workers = min(workers, len(jobs))  # every worker is spawned at once, wanted or not
        spawn = multiprocessing.get_context("spawn")
        ranks = spawn.Value("i", 0)
        others = set(multiprocessing.active_children())
        with _worker_environment(), ProcessPoolExecutor(workers, spawn, start_worker, (ranks,)) as pool:
            pending: dict[Future[JobResult], Job] = {}
            queue = iter(jobs)
            try:
                while True:
                    # No more than the workers can take, so that a broken pool says which cells were under way.
                    while len(pending) < workers and (job := next(queue, None)) is not None:
                        with _no_interrupts():
                            pending[pool.submit(execute, job)] = job
                    if not pending:
                        return
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        del pending[future]
                        yield future.result()
            except BaseException as error:
                if not isinstance(error, Exception):  # told to stop: nobody waits for the cells that are under way
                    for worker in set(multiprocessing.active_children()) - others:
                        worker.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """What is spawned within never hears of Ctrl-C, not even while it imports: whoever spawned it ends it.

    A stop that comes meanwhile waits for the end: in the middle of a spawn it would leave a pool that knows half its workers.
    Blocking alone does not do: another thread may take the signal, and this one would raise all the same.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is ever interrupted
        yield
        return
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda got, _: came.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for got in came:
        signal.raise_signal(got)


class _worker_environment:
    """For spawned workers: numerical libraries and Python read it when they start."""

    def __enter__(self) -> None:
        # Without the last, a file in the working folder would be taken for a module of Python's own that has its name.
        wanted = dict.fromkeys([*THREADS, "PYTHONSAFEPATH"], "1")
        self.before: dict[str, Any] = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)

    def __exit__(self, *exception: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@hookimpl
def shiftproof_executors() -> list[ExecutorSpec]:
    """The built-in executors."""
    return [
        ExecutorSpec("inline", InlineExecutor, "one cell after another in this process"),
        ExecutorSpec("process", ProcessExecutor, "parallel cells in spawned workers, one thread each"),
        ExecutorSpec("slurm", _slurm, "tasks of SLURM job arrays, by submitit", _needs("submitit", "slurm"), elsewhere=True),
        ExecutorSpec("ray", _ray, "tasks of a Ray cluster", _needs("ray", "ray"), elsewhere=True),
    ]


def _slurm() -> Executor:
    from shiftproof.benchmark.running.slurm import SlurmExecutor  # by an extra

    return SlurmExecutor()


def _ray() -> Executor:
    from shiftproof.benchmark.running.ray import RayExecutor  # by an extra

    return RayExecutor()


def _needs(package: str, extra: str) -> str:
    found = importlib.util.find_spec(package) is not None
    return "" if found else f"needs {package}: pip install 'shiftproof[{extra}]'"
