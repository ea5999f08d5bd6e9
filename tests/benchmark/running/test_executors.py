"""Inline and process executors: the same results, and no cell is lost with another's worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark.records import RecordStore
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.executors import InlineExecutor, ProcessExecutor
from shiftproof.benchmark.running.matrix import Plan, RunOptions, run_plan

PlanOf = Callable[..., Plan]
Eventually = Callable[..., bool]

# Carries out a suite in a process of its own: OUT EXECUTOR JOBS STRATEGIES [OVERRIDE ...].
SUITE = """
import json, sys
from pathlib import Path

if __name__ == "__main__":
    from shiftproof.benchmark.contracts import SuiteSpec
    from shiftproof.benchmark.running.matrix import RunOptions, plan, run_plan
    from shiftproof.benchmark.registry.lookup import load_registry

    toys, out, executor, jobs, strategies, *overrides = sys.argv[1:]
    registry = load_registry((), [Path(toys)])
    suite = SuiteSpec("s", "", ("tiny",), tuple(strategies.split(",")), (0, 1, 2))
    options = RunOptions(Path(out), executor, int(jobs), entry_points=(), files=(toys,))
    outcome = run_plan(plan(registry, suite, overrides), registry, options)
    print(json.dumps([outcome.finished, outcome.reused, len(outcome.failed), len(outcome.lost)]))
"""


def start(folder: Path, registry: Registry, *arguments: str) -> subprocess.Popen[str]:
    script = folder / "suite.py"
    script.write_text(SUITE)
    command = [sys.executable, str(script), str(registry.files[0]), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def options(registry: Registry, out: Path, executor: str, jobs: int = 1) -> RunOptions:
    return RunOptions(out, executor, jobs, entry_points=registry.only, files=tuple(map(str, registry.files)))


def test_two_workers_give_the_results_of_one_process_bit_for_bit_and_lose_only_the_cell_that_kills_its_worker(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    plan = plan_of("careless,killed,toy", seeds=(0,))
    outcome = run_plan(plan, registry, options(registry, tmp_path / "process", "process", 2))
    assert [cell.request.label for cell in outcome.lost] == ["killed"]
    assert (outcome.finished, outcome.failed) == (2, [])
    run_plan(plan_of("careless,toy"), registry, options(registry, tmp_path / "inline", "inline"))
    spawned, inline = (RecordStore(tmp_path / name).all() for name in ("process", "inline"))
    assert [(one.run_id, one.results, one.logs) for one in spawned] == [(one.run_id, one.results, one.logs) for one in inline]
    assert [one.provenance["threads"] for one in (*spawned, *inline)] == [1] * 4


def test_a_thread_that_a_strategy_leaves_behind_does_not_keep_the_suite_from_ending(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    started = time.monotonic()
    assert run_plan(plan_of("lingerer"), registry, options(registry, tmp_path / "out", "process")).finished == 1
    assert time.monotonic() - started < 50  # the thread sleeps for 60


def test_two_processes_on_one_output_folder_share_it(registry: Registry, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = (str(tmp_path / "out"), "inline", "1", "counted", f"counted.file={log}", "recipe.epochs=60")
    suites = [start(tmp_path, registry, *arguments) for _ in range(2)]
    outcomes = [json.loads(suite.communicate(timeout=300)[0]) for suite in suites]
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == ["0", "1", "2"]
    assert all(finished + reused == 3 and failed == lost == 0 for finished, reused, failed, lost in outcomes)
    assert len(RecordStore(tmp_path / "out").all()) == 3


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")  # on Linux; a container without an init leaves zombies behind
        return not stat.exists() or stat.read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_suite_that_was_killed(eventually: Eventually, registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    suite = start(tmp_path, registry, str(tmp_path / "out"), "process", "1", "sleeper", f"sleeper.file={file}")
    assert eventually(lambda: file.exists() and file.read_text(), 120)
    worker = int(file.read_text())
    assert exists(worker)
    suite.kill()
    suite.communicate()
    assert eventually(lambda: not exists(worker), 20)
    assert RecordStore(tmp_path / "out").all() == []


@pytest.mark.parametrize(("name", "learns", "code"), [("SIGINT", False, 130), ("SIGTERM", True, 143)])
def test_a_run_that_is_told_to_stop_takes_its_workers_along_and_says_one_line(
    eventually: Eventually, registry: Registry, tmp_path: Path, name: str, learns: bool, code: int
) -> None:
    file = tmp_path / "pid"
    # A shell's background job hands on to its children that they ignore SIGINT: tests run in one, too.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    main = f"{heed}; from shiftproof.benchmark.cli.main import main; main()"
    chosen = ["--stream", "tiny", "--strategy", "sleeper,plain", "--seeds", "0", "--plugin", str(registry.files[0])]
    options = ["--set", f"sleeper.file={file}", "--jobs", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", main, "run", *chosen, *options]
    suite = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children")  # one of them is multiprocessing's own
    assert eventually(lambda: len(children.read_text().split()) == 3 and (not learns or file.exists()), 120)
    workers = [int(child) for child in children.read_text().split()]
    if name == "SIGINT":  # from a keyboard it reaches all of them
        os.killpg(suite.pid, signal.SIGINT)
    else:
        suite.terminate()
    told = suite.communicate(timeout=60)
    assert told == ("", "stopped; finished cells are kept, the same command goes on from here\n")
    assert suite.returncode == code
    assert eventually(lambda: not any(map(exists, workers)), 20)


def test_running_inline_takes_one_thread_and_gives_back_what_there_was(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    try:
        run_plan(plan_of("toy", "recipe.epochs=1"), registry, options(registry, tmp_path, "inline"))
        (record,) = RecordStore(tmp_path).all()
        assert record.provenance["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("executor", [InlineExecutor(), ProcessExecutor()])
def test_nothing_to_do_starts_nothing(executor: InlineExecutor | ProcessExecutor) -> None:
    assert list(executor.run([], 4)) == []


def test_the_environment_of_the_suite_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert list(ProcessExecutor()._pool([], 1)) == []
    assert (os.environ["OMP_NUM_THREADS"], os.environ.get("MKL_NUM_THREADS")) == ("7", None)
