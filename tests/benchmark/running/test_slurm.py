"""The SLURM executor over submitit itself and SLURM's commands on one machine: tasks outlive who has submitted them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import submitit

from shiftproof.benchmark.errors import InputError, Terminated
from shiftproof.benchmark.records import RecordStore
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.jobs import Job
from shiftproof.benchmark.running.matrix import Plan, RunOptions, run_plan
from shiftproof.benchmark.running.slurm import SlurmExecutor

PlanOf = Callable[..., Plan]
Eventually = Callable[..., bool]
STUB = Path(__file__).with_name("small_slurm.py")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A queue of its own, ended with the test."""
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    queue.mkdir()
    monkeypatch.setenv("SMALL_SLURM", str(queue))
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)  # waits for slow file systems
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" {name} "$@"\n')
        (commands / name).chmod(0o755)
    yield queue
    for file in queue.glob("*.state"):
        subprocess.run(["scancel", file.stem], check=False, stderr=subprocess.DEVNULL)


def options(registry: Registry, out: Path, executor: str = "slurm", jobs: int = 2) -> RunOptions:
    return RunOptions(out, executor, jobs, entry_points=registry.only, files=tuple(map(str, registry.files)))


def state_of(queue: Path, task: str) -> str:
    file = queue / f"{task}.state"
    return file.read_text() if file.exists() else ""


def test_tasks_of_an_array_give_the_results_of_one_process_bit_for_bit_and_lose_only_the_cell_that_dies(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    plan = plan_of("careless,killed,toy")
    outcome = run_plan(plan, registry, options(registry, tmp_path / "slurm"))
    assert [cell.request.label for cell in outcome.lost] == ["killed"]
    assert (outcome.finished, outcome.failed) == (2, [])
    run_plan(plan_of("careless,toy"), registry, options(registry, tmp_path / "inline", "inline"))
    tasks, inline = (RecordStore(tmp_path / name).all() for name in ("slurm", "inline"))
    assert [(one.run_id, one.results, one.logs) for one in tasks] == [(one.run_id, one.results, one.logs) for one in inline]
    assert [one.provenance["threads"] for one in tasks] == [1, 1]
    script = (queue / "1.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --cpus-per-task=1\n" in script
    assert "gpus" not in script


def start(tmp_path: Path, registry: Registry, *arguments: str) -> subprocess.Popen[str]:
    """`shiftproof run` on the toys' stream, counting in `log`."""
    code = "from shiftproof.benchmark.cli.main import main; main()"
    toys, log = str(registry.files[0]), f"counted.file={tmp_path / 'log'}"
    command = ["run", "--stream", "tiny", "--strategy", "counted", "--plugin", toys, "--set", log, "--set", "recipe.epochs=40"]
    out = ["--out", str(tmp_path / "out"), "--executor", "slurm", "--jobs", "2", "--quiet"]
    return subprocess.Popen([sys.executable, "-c", code, *command, *out, *arguments], stdout=subprocess.PIPE, text=True)


def started(tmp_path: Path) -> list[str]:
    """Seeds of the attempts so far."""
    log = tmp_path / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def test_tasks_go_on_when_who_submitted_them_is_killed_and_the_same_command_waits_for_them(
    eventually: Eventually, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    lost = start(tmp_path, registry, "--seeds", "0,1,2")
    assert eventually(lambda: started(tmp_path))
    lost.kill()
    lost.communicate()
    again = start(tmp_path, registry, "--seeds", "0,1,2")
    printed = again.communicate(timeout=300)[0]
    assert again.returncode == 0, printed
    assert sorted(started(tmp_path)) == ["0", "1", "2"]
    assert [file.name for file in queue.glob("*.sh")] == ["1.sh"]
    assert len(RecordStore(tmp_path / "out").all()) == 3


def test_a_preempted_task_is_put_into_the_queue_again_and_does_not_count_as_failed(
    eventually: Eventually, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    suite = start(tmp_path, registry, "--seeds", "0")
    assert eventually(lambda: started(tmp_path))
    subprocess.run(["scancel", "1", "--signal", "USR2"], check=True)
    printed = suite.communicate(timeout=300)[0]
    assert suite.returncode == 0, printed
    assert started(tmp_path) == ["0", "0"]
    assert state_of(queue, "1") == "COMPLETED"


def jobs_of(plan: Plan, registry: Registry, out: Path) -> list[Job]:
    return [
        Job(
            cell.request,
            cell.run_id,
            str(out),
            "cpu",
            "",
            30.0,
            entry_points=registry.only,
            files=tuple(map(str, registry.files)),
        )
        for cell in plan.cells
    ]


def test_who_stops_waiting_cancels_what_is_left(
    eventually: Eventually, plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    jobs = jobs_of(plan_of("toy,sleeper", f"sleeper.file={tmp_path / 'pid'}"), registry, tmp_path / "out")
    results = SlurmExecutor().run(jobs, 2)
    assert next(results).run_id == jobs[0].run_id
    results.close()  # type: ignore[attr-defined]
    assert eventually(lambda: state_of(queue, "1_1") == "CANCELLED")
    assert [record.label for record in RecordStore(tmp_path / "out").all()] == ["toy"]


def test_tasks_outlive_a_login_session_that_is_terminated(
    eventually: Eventually, plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    results = SlurmExecutor().run(jobs_of(plan_of("toy,plain"), registry, tmp_path / "out"), 1)
    assert next(results).status == "finished"
    with pytest.raises(Terminated):
        results.throw(Terminated)  # type: ignore[attr-defined]
    assert eventually(lambda: state_of(queue, "1_1") == "COMPLETED")
    assert {record.label for record in RecordStore(tmp_path / "out").all()} == {"toy", "plain"}


def test_a_cell_whose_code_is_not_what_was_planned_is_wrong_input(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    (job,) = jobs_of(plan_of("toy"), registry, tmp_path / "out")
    with pytest.raises(InputError, match="expected the code and data that were planned, got others"):
        list(SlurmExecutor().run([replace(job, run_id="0" * 64)], 1))
    assert RecordStore(tmp_path / "out").all() == []


def test_what_sbatch_says_against_the_tasks_is_told_in_one_line(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path
) -> None:
    (queue / "refuse").write_text("sbatch: error: invalid partition specified: gpux\nsbatch: error: Batch job failed")
    with pytest.raises(
        InputError, match=r"expected sbatch to take 1 tasks, got: .*invalid partition specified: gpux"
    ) as caught:
        list(SlurmExecutor().run(jobs_of(plan_of("toy"), registry, tmp_path), 1))
    assert "\n" not in str(caught.value)


def test_a_machine_without_slurm_says_which_command_is_missing(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="expected SLURM's sbatch on this machine, got none; use --executor process"):
        list(SlurmExecutor().run(jobs_of(plan_of("toy"), registry, tmp_path), 1))


def test_a_gpu_is_asked_for_where_the_cells_run(plan_of: PlanOf, registry: Registry, tmp_path: Path, queue: Path) -> None:
    (queue / "refuse").write_text("not today")
    jobs = [replace(job, device="cuda") for job in jobs_of(plan_of("toy"), registry, tmp_path)]
    with pytest.raises(InputError, match="not today"):
        list(SlurmExecutor().run(jobs, 1))
    (script,) = (tmp_path / "slurm").glob("*.sh")
    assert "#SBATCH --gpus-per-node=1\n" in script.read_text()
