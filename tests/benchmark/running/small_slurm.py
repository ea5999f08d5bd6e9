"""SLURM's commands on one machine, as far as submitit calls them. A queue is a folder with a file for each task: its state.

    python small_slurm.py sbatch|srun|sacct|scancel|scontrol ...

SMALL_SLURM names the folder; a file `refuse` in it holds what sbatch says before it fails.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUEUE = Path(os.environ["SMALL_SLURM"])


def state(task: str, new: str = "") -> str:
    """The state of a task, after it was set to the new one."""
    file = QUEUE / f"{task}.state"
    if new:
        file.with_suffix(".new").write_text(new)
        file.with_suffix(".new").replace(file)
    return file.read_text()


def sbatch(script: str) -> None:
    """Queue the tasks of a script and go back; as in the real one, the environment wins over the script."""
    if (QUEUE / "refuse").exists():
        sys.exit((QUEUE / "refuse").read_text())
    text = Path(script).read_text()
    job = str(1 + len(list(QUEUE.glob("*.sh"))))
    (QUEUE / f"{job}.sh").write_text(text)
    array = re.search(r"#SBATCH --array=0-(\d+)%(\d+)", text)
    tasks = [f"{job}_{i}" for i in range(1 + int(array[1]))] if array else [job]
    for task in tasks:
        state(task, "PENDING")
    command = [sys.executable, __file__, "queue", array[2] if array else "1", *tasks]
    subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {job}")


def queue(parallel: str, *tasks: str) -> None:
    """Run tasks, so many at a time."""
    with ThreadPoolExecutor(int(parallel)) as pool:
        list(pool.map(run, tasks))


def run(task: str) -> None:
    """Run a task, and again where it was put back into the queue."""
    job, _, index = task.partition("_")
    ids = {"SLURM_JOB_ID": job} | ({"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index} if index else {})
    ids["SMALL_SLURM_TASK"] = task
    while state(task) in {"PENDING", "REQUEUED"}:
        state(task, "RUNNING")
        code = subprocess.call(["bash", str(QUEUE / f"{job}.sh")], env={**os.environ, **ids})
        if state(task) == "RUNNING":
            state(task, "FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> None:
    """Become what stands after the options."""
    rest = list(arguments)
    while rest[0].startswith("--"):
        del rest[: 1 if rest[0] == "--unbuffered" else 2]
    (QUEUE / f"{os.environ['SMALL_SLURM_TASK']}.pid").write_text(str(os.getpid()))
    os.execvp(rest[0], rest)


def sacct(*_: str) -> None:
    """A table of all tasks."""
    print("JobID|State|NodeList")
    for file in QUEUE.glob("*.state"):
        print(f"{file.stem}|{file.read_text()}|here")


def scancel(task: str, *options: str) -> None:
    """End a task, or send it a signal."""
    number = getattr(signal, f"SIG{options[1].removeprefix('SIG')}") if options else signal.SIGKILL
    if not options:
        state(task, "CANCELLED")
    if (QUEUE / f"{task}.pid").exists():
        os.kill(int((QUEUE / f"{task}.pid").read_text()), number)


def scontrol(_: str, task: str) -> None:
    """Put a task back into the queue."""
    state(task, "REQUEUED")


if __name__ == "__main__":
    {one.__name__: one for one in (sbatch, queue, srun, sacct, scancel, scontrol)}[sys.argv[1]](*sys.argv[2:])
