"""SIGKILL at random points, the same command again: the results of an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.matrix import Plan
from shiftproof.benchmark.records import RecordStore, RunRecord
from shiftproof.benchmark.registry import Registry
from shiftproof.benchmark.runner import run_cell

OVERRIDES = ("recipe.epochs=6", "recipe.batch_size=8", "stream.samples=64")  # 96 steps, with a checkpoint after each

# Imports once, then starts the suite again and again in a fork of itself, and kills it KILLS times: once it has written so
# many checkpoints, or has begun where it writes none, and a moment later. FOLDER TOYS STRATEGY KILLS OVERRIDE ...
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # imports half of torch, which the forks need not repeat
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.matrix import RunOptions, plan, run_plan
from shiftproof.benchmark.registry import load_registry

folder, toys, strategy, kills, *overrides = sys.argv[1:]
plugins = ("rehearsal",)
registry = load_registry(plugins, [Path(toys)])
options = RunOptions(Path(folder), "inline", entry_points=plugins, files=(toys,), checkpoint_seconds=0.0)
planned = plan(registry, SuiteSpec("s", "", ("tiny",), (strategy,), (0,)), overrides)
run_id = planned.cells[0].run_id
rng = random.Random(strategy)


def stamp():
    for path in (Path(folder, "checkpoints", f"{run_id}.pt"), Path(folder, "locks", f"{run_id}.lock")):
        if path.exists():
            return path.stat().st_mtime_ns


def done(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def kill(child, after, moment):
    seen = {None, stamp()}
    while len(seen) < after + 2 and not done(child):
        seen.add(stamp())
        time.sleep(0.001)
    time.sleep(rng.uniform(0, moment))
    os.kill(child, signal.SIGKILL)


killed = 0
while True:
    child = os.fork()
    if not child:
        outcome = run_plan(planned, registry, options)
        os._exit(0 if outcome.finished + outcome.reused == 1 else 1)
    if killed < int(kills):
        kill(child, *((rng.randrange(10), 0.02) if strategy == "er" else (0, 0.1)))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    else:
        break
print(json.dumps({"killed": killed, "status": os.waitstatus_to_exitcode(status)}))
"""


def killed_and_started_again(folder: Path, toys: Path, strategy: str, kills: int) -> dict[str, Any]:
    command = [sys.executable, "-c", KILLER, str(folder), str(toys), strategy, str(kills), *OVERRIDES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def left(folder: Path) -> list[str]:
    return sorted({path.parent.name for path in folder.rglob("*") if path.is_file()})


@pytest.mark.parametrize(("strategy", "resumable"), [("er", True), ("plain", False)], ids=["resumable", "from the start"])
def test_a_suite_that_is_killed_again_and_again_ends_in_the_results_of_an_uninterrupted_one(
    plan_of: Callable[..., Plan], registry: Registry, tmp_path: Path, strategy: str, resumable: bool
) -> None:
    (cell,) = plan_of(strategy, *OVERRIDES).cells
    whole = run_cell(cell, registry, tmp_path / "whole")
    said = killed_and_started_again(tmp_path / "cut", registry.files[0], strategy, 6)
    record = RecordStore(tmp_path / "cut").read(cell.run_id)
    assert said["killed"] > 0
    assert said["status"] == 0
    assert record is not None
    assert_equal(record, whole)
    assert bool(record.provenance["resumed_from"]) is resumable
    assert record.cost["optimizer_steps"] == whole.cost["optimizer_steps"]
    assert left(tmp_path / "cut") == ["locks", "records"]


def assert_equal(record: RunRecord, whole: RunRecord) -> None:
    assert record.results == whole.results
    assert record.results_sha256 == whole.results_sha256
    assert record.logs == whole.logs
    assert record.status == "finished"
