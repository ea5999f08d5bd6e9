"""The guard of PROTOCOL_VERSION: a cell of two seconds against a committed result.

The harness is no part of a run's identity, so whoever changes what it computes has to raise the version. Then write the
committed result anew, with one thread as everywhere:

    SHIFTPROOF_WRITE_PROTOCOL=1 python -m pytest tests/benchmark/test_protocol.py
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.records import PROTOCOL_VERSION, write_atomically
from shiftproof.benchmark.registry.lookup import load_registry
from shiftproof.benchmark.running.matrix import plan
from shiftproof.benchmark.running.runner import run_cell

COMMITTED = Path(__file__).with_name("protocol.json")
OVERRIDES = ("recipe.epochs=1", "base.kind=random")
NEARLY = 10  # correct answers of 176 and 177 in a group, on another processor or another torch


def machine() -> dict[str, str]:
    """What decides about the last bit of a sum."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    registry = load_registry(("digits", "fine-tuning"))
    suite = SuiteSpec("protocol", "", ("digits-offline-even",), ("sgd",), (0,))
    (cell,) = plan(registry, suite, OVERRIDES).cells
    record = run_cell(cell, registry, tmp_path_factory.mktemp("protocol"))
    return {
        "protocol_version": PROTOCOL_VERSION,
        "machine": machine(),
        "recipe": asdict(cell.stream.recipe),
        "base": asdict(cell.stream.base),
        "data_sha256": cell.stream.data_sha256,
        "results": record.results,
    }


@pytest.fixture(scope="module")
def committed(found: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("SHIFTPROOF_WRITE_PROTOCOL"):
        write_atomically(COMMITTED, json.dumps(found, indent=1, sort_keys=True) + "\n")
    loaded: dict[str, Any] = json.loads(COMMITTED.read_text())
    return loaded


def test_the_committed_result_is_of_this_version_of_the_protocol(committed: dict[str, Any]) -> None:
    assert committed["protocol_version"] == PROTOCOL_VERSION, f"write {COMMITTED.name} anew: see the top of this file"


def test_data_recipe_and_base_of_the_cell_are_those_of_the_committed_result(
    found: dict[str, Any], committed: dict[str, Any]
) -> None:
    for name in ("data_sha256", "recipe", "base"):
        assert found[name] == committed[name], f"the stream changed in its {name}: write {COMMITTED.name} anew"


def pairs(result: dict[str, Any], block: str) -> list[tuple[int, int]]:
    return [tuple(pair) for row in result["results"][block] for cell in row for pair in cell]


def test_the_harness_computes_what_it_computed_under_this_version_of_the_protocol(
    found: dict[str, Any], committed: dict[str, Any]
) -> None:
    advice = "the harness computes something else than before: raise PROTOCOL_VERSION in benchmark/records.py"
    same_machine = found["machine"] == committed["machine"]
    for block in ("counts", "class_counts"):
        now, then = pairs(found, block), pairs(committed, block)
        assert [total for _, total in now] == [total for _, total in then], advice
        differences = [abs(one - other) for (one, _), (other, _) in zip(now, then, strict=True)]
        assert max(differences) <= (0 if same_machine else NEARLY), advice
    if same_machine:
        assert found["results"] == committed["results"], advice


def test_the_cell_learns_something(found: dict[str, Any]) -> None:
    accuracies = [correct / total for correct, total in pairs(found, "counts")]
    assert max(accuracies) > 0.6
    assert min(accuracies) < max(accuracies)
