"""SIGKILL at random points, the same command again: the results of an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.records import RecordStore
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.matrix import Plan
from shiftproof.benchmark.running.runner import run_cell

OVERRIDES = ("recipe.epochs=6", "recipe.batch_size=8", "stream.samples=64")  # 96 steps, with a checkpoint after each

# Imports once, then starts the suite again and again in a fork of itself, and kills it KILLS times: once it has written so
# many checkpoints, or has begun where it writes none, and a moment later. FOLDER TOYS STRATEGIES KILLS OVERRIDE ...
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # imports half of torch, which the forks need not repeat
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.running.matrix import RunOptions, plan, run_plan
from shiftproof.benchmark.registry.lookup import load_registry

folder, toys, strategies, kills, *overrides = sys.argv[1:]
plugins = ("rehearsal",)
registry = load_registry(plugins, [Path(toys)])
options = RunOptions(Path(folder), "inline", entry_points=plugins, files=(toys,), checkpoint_seconds=0.0)
rng = random.Random(0)


def stamp(run_id):
    for path in (Path(folder, "checkpoints", f"{run_id}.pt"), Path(folder, "locks", f"{run_id}.lock")):
        if path.exists():
            return path.stat().st_mtime_ns


def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def kill(child, run_id, after, moment):
    seen = {None, stamp(run_id)}
    while len(seen) < after + 2 and not has_ended(child):
        seen.add(stamp(run_id))
        time.sleep(0.001)
    time.sleep(rng.uniform(0, moment))
    os.kill(child, signal.SIGKILL)


def torment(strategy):
    planned = plan(registry, SuiteSpec("s", "", ("tiny",), (strategy,), (0,)), overrides)
    killed = 0
    while True:
        child = os.fork()
        if not child:
            outcome = run_plan(planned, registry, options)
            os._exit(0 if outcome.finished + outcome.reused == 1 else 1)
        if killed < int(kills):
            kill(child, planned.cells[0].run_id, *((rng.randrange(10), 0.02) if strategy == "er" else (0, 0.1)))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return {"killed": killed, "status": os.waitstatus_to_exitcode(status)}
        killed += 1


print(json.dumps({strategy: torment(strategy) for strategy in strategies.split(",")}))
"""


@pytest.fixture(scope="module")
def cut(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output folder of suites that were killed again and again, and how often each was."""
    folder = tmp_path_factory.mktemp("cut")
    command = [sys.executable, "-c", KILLER, str(folder), str(registry.files[0]), "er,plain", "6", *OVERRIDES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize(("strategy", "resumable"), [("er", True), ("plain", False)], ids=["resumable", "from the start"])
def test_a_suite_that_is_killed_again_and_again_ends_in_the_results_of_an_uninterrupted_one(
    cut: tuple[Path, dict[str, Any]],
    plan_of: Callable[..., Plan],
    registry: Registry,
    tmp_path: Path,
    strategy: str,
    resumable: bool,
) -> None:
    folder, said = cut
    (cell,) = plan_of(strategy, *OVERRIDES).cells
    whole = run_cell(cell, registry, tmp_path / "whole")
    record = RecordStore(folder).read(cell.run_id)
    assert said[strategy]["killed"] > 0
    assert said[strategy]["status"] == 0
    assert record is not None
    assert (record.status, record.results_sha256, record.results) == ("finished", whole.results_sha256, whole.results)
    assert record.logs == whole.logs
    assert record.cost["optimizer_steps"] == whole.cost["optimizer_steps"]
    assert bool(record.provenance["resumed_from"]) is resumable


def test_nothing_is_left_of_the_attempts_that_were_killed(cut: tuple[Path, dict[str, Any]]) -> None:
    left = [path for path in cut[0].rglob("*") if path.is_file()]
    assert {path.parent.name for path in left} == {"locks", "records"}
    assert len(left) == 4
