"""How much faster two workers finish a matrix than one: `python tests/benchmarks/bench_workers.py`.

The base is pre-trained before the clock starts; both runs start their workers anew and write into empty folders. On a machine
where something else runs, the ratio says little: the load average is printed, and a warning where it is above 0.5.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.registry.lookup import load_registry
from shiftproof.benchmark.running.matrix import RunOptions, plan, run_plan
from shiftproof.benchmark.running.runner import run_cell

SUITE = SuiteSpec("workers", "sgd with eight seeds", ("b-digits",), ("sgd",), seeds=tuple(range(8)))
TARGET = 1.7


def main() -> None:
    """Print the two times and their ratio."""
    registry = load_registry()
    cells = plan(registry, SUITE)
    with tempfile.TemporaryDirectory() as folder:
        warm = plan(registry, SuiteSpec("warm", "one cell", ("b-digits",), ("sgd",), seeds=(99,)), ["recipe.epochs=1"])
        run_cell(warm.cells[0], registry, Path(folder) / "warm", Cache())
        load = os.getloadavg()[0]
        seconds = {}
        for jobs in (1, 2):
            started = time.perf_counter()
            outcome = run_plan(cells, registry, RunOptions(Path(folder) / str(jobs), jobs=jobs))
            seconds[jobs] = time.perf_counter() - started
            assert outcome.finished == len(cells.cells)
    ratio = seconds[1] / seconds[2]
    print(f"{len(cells.cells)} cells of sgd on b-digits, load average before {load:.2f}")
    print(f"one worker {seconds[1]:.1f} s, two workers {seconds[2]:.1f} s: {ratio:.2f} times as fast (wanted: {TARGET})")
    if load > 0.5:
        print("the machine was not idle: do not quote this")


if __name__ == "__main__":
    main()
