"""What Avalanche costs: its import, our bridge beside its own loop, and a step of each of its strategies.

    python tests/benchmarks/bench_avalanche.py

On `b-digits` with its backbone and recipe (one epoch of each task), random weights, one torch thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_training_loop import (  # type: ignore[import-not-found]  # beside this script
    EPOCHS,
    PAIRS,
    alternate,
    avalanche_naive,
    experiences,
    make_context,
    measure,
    report,
    steps_of,
    with_our_heads,
)

from shiftproof.benchmark import Stream
from shiftproof.datasets.digits import BiasedDigitsConfig, biased_digits
from shiftproof.strategies.avalanche import shiftproof_strategies, to_avalanche


def import_times() -> None:
    """Seconds that a fresh process needs on top of torch."""
    for module in ("shiftproof.strategies.avalanche", "avalanche.training.supervised"):
        code = f"import time, torch; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        print(f"import {module:40s} {float(done.stdout):6.2f} s after torch", flush=True)


def bridge_against_plain(stream: Stream, folder: Path) -> None:
    """`avalanche-naive` over Avalanche's Naive on the same data and model; the bridge also follows the recipe and counts."""
    first = experiences(stream)[0]
    theirs = to_avalanche(stream).train_stream[0]
    spec = next(spec for spec in shiftproof_strategies() if spec.name == "avalanche-naive")

    def bridged() -> Callable[[], Any]:
        strategy = spec.build(spec.config(), make_context(stream, folder))
        return lambda: strategy.learn(first)

    def plain() -> Callable[[], Any]:
        strategy = avalanche_naive(with_our_heads(make_context(stream, folder).new_model()), stream.recipe)
        return lambda: strategy.train(theirs)

    report("avalanche-naive / Avalanche's Naive", alternate(bridged, plain), "", steps_of(first, stream.recipe))


def steps_of_each(stream: Stream, folder: Path) -> None:
    """Milliseconds a step in the first and in the last task."""
    for spec in shiftproof_strategies():
        if spec.unavailable:
            print(f"{spec.name:18s} {spec.unavailable}")
            continue
        context = make_context(stream, folder)
        strategy = spec.build(spec.config(), context)
        start, milliseconds = time.perf_counter(), []
        for one in experiences(stream):
            _, seconds = measure(partial(strategy.learn, one))
            milliseconds.append(1000 * seconds / steps_of(one, stream.recipe))
        print(
            f"{spec.name:18s} {milliseconds[0]:7.2f} ms of processor a step in task 1, {milliseconds[-1]:7.2f} in task 8, "
            f"{time.perf_counter() - start:6.1f} s by the clock for {context.cost.optimizer_steps} steps",
            flush=True,
        )


def main() -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    print(f"median of {PAIRS} pairs of {EPOCHS} epochs, one thread, load average {os.getloadavg()[0]:.2f}")
    import_times()
    stream = biased_digits(BiasedDigitsConfig())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True):  # Avalanche warns about itself
        bridge_against_plain(replace(stream, recipe=replace(stream.recipe, epochs=EPOCHS)), Path(folder))
        steps_of_each(replace(stream, recipe=replace(stream.recipe, epochs=1)), Path(folder))
    print(f"load average at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
