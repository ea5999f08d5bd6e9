"""The Ray executor, where Ray is installed: it is an extra, and large."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shiftproof.benchmark.records import RecordStore
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.matrix import Plan, RunOptions, run_plan

pytest.importorskip("ray")

# Ray opens connections, on this machine, which the tests' own process must not. OUT TOYS STRATEGIES
SUITE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.running.jobs import Job
from shiftproof.benchmark.running.matrix import RunOptions, plan, run_plan
from shiftproof.benchmark.running.ray import RayExecutor
from shiftproof.benchmark.registry.lookup import load_registry

out, toys, strategies = sys.argv[1:]
registry = load_registry((), [Path(toys)])
cells = plan(registry, SuiteSpec("s", "", ("tiny",), tuple(strategies.split(",")), (0,)))
outcome = run_plan(cells, registry, RunOptions(Path(out), "ray", 2, entry_points=(), files=(toys,)))
said = ""
try:
    list(RayExecutor().run([Job(cells.cells[0].request, "0" * 64, out, "cpu", "", 30.0, None, (), (toys,))], 1))
except InputError as error:
    said = str(error)
print(json.dumps([outcome.finished, [cell.request.label for cell in outcome.lost], said]))
"""


def test_tasks_give_the_results_of_one_process_bit_for_bit_and_lose_only_the_cell_that_kills_its_worker(
    plan_of: Callable[..., Plan], registry: Registry, tmp_path: Path
) -> None:
    toys = str(registry.files[0])
    command = [sys.executable, "-c", SUITE, "out", toys, "careless,killed,toy"]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300).stdout
    finished, lost, said = json.loads(printed.splitlines()[-1])  # Ray says on a line of its own that a worker died
    assert (finished, lost) == (2, ["killed"])
    assert said.startswith("careless on tiny: expected the code and data that were planned, got others")
    assert "\n" not in said
    run_plan(plan_of("careless,toy"), registry, RunOptions(tmp_path / "inline", "inline", files=(toys,)))
    tasks, inline = (RecordStore(tmp_path / name).all() for name in ("out", "inline"))
    assert [(one.run_id, one.results, one.logs) for one in tasks] == [(one.run_id, one.results, one.logs) for one in inline]
