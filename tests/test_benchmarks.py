"""The scripts under `tests/benchmarks` still fit the code that they time; how fast it is, they say themselves."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
    assert names
    code = "\n".join(f"import {name}" for name in names)
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
