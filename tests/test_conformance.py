"""The conformance kit on every strategy and every preset that is registered: a new one is tested on arrival."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark import (
    ArrayData,
    DataExperience,
    ExpertExperience,
    GroupedExperience,
    Recipe,
    Scenario,
    Stream,
    TransportExperience,
    sequential,
)
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.conformance import check_strategy, planted_stream
from shiftproof.benchmark.records import RunRequest
from shiftproof.benchmark.registry.lookup import load_registry
from shiftproof.benchmark.running.runner import experts_of, identify, run_cell

REGISTRY = load_registry()
LEARNERS = [name for name, spec in REGISTRY.strategies.items() if issubclass(spec.consumes, DataExperience | ExpertExperience)]
LABELS = [label for name in LEARNERS for label in (name, *(f"{name}@{preset}" for preset in REGISTRY.strategies[name].presets))]
# A stream of data alone has no release to which a fine-tuning could be carried.
ON_DATA = [label for label in LABELS if REGISTRY.strategy(label)[0].consumes is not TransportExperience]


def test_every_installed_plugin_loads() -> None:
    assert REGISTRY.problems == []


@pytest.mark.parametrize("label", LABELS)
def test_conforms(label: str) -> None:
    failed = [result for result in check_strategy(label, registry=REGISTRY) if not result.passed]
    assert not failed, "\n".join(f"{result.name}: {result.detail}" for result in failed)


def test_without_who_fine_tunes_experts_a_merge_is_not_tried_and_the_row_says_so() -> None:
    (result,) = check_strategy("weight-average", registry=load_registry(["merging"]))
    assert (result.passed, result.detail) == (False, "needs the strategy 'sgd' to fine-tune experts, which is not loaded")


def test_an_accuracy_that_is_not_judged_is_not_sold_as_one() -> None:
    (row,) = (one for one in check_strategy("sgd", registry=REGISTRY) if one.name == "finishes the planted stream")
    assert "which is not judged: the run is too short to learn much, chance is 50 %" in row.detail


def shared_head() -> Stream:
    """Two steps of two classes each, out of ten that share one head, whose task id is 3."""
    planted, train, evals = planted_stream(), [], []
    for step, (experience, held_out) in enumerate(zip(planted.folds[0].train, planted.folds[0].evals, strict=True)):
        assert isinstance(experience, GroupedExperience)
        classes = torch.tensor([2 + 5 * step, 3 + 5 * step])
        data = ArrayData(experience.train.x, classes[experience.train.y])
        train.append(dataclasses.replace(experience, task=3, train=data))
        ((_, part),) = held_out.parts
        evals.append(dataclasses.replace(held_out, parts=((3, ArrayData(part.x, classes[part.y])),)))
    return dataclasses.replace(
        planted,
        name="planted-shared",
        scenario=Scenario.CLASS_INCREMENTAL,
        folds=sequential(train, evals),
        heads={3: 10},
        recipe=Recipe(name="conformance", epochs=2, batch_size=24, lr=0.05),  # 64 samples: the last batch is a short one
    )


@pytest.mark.parametrize("label", ON_DATA)
def test_learns_new_classes_of_a_shared_head_whose_task_is_not_0(label: str, tmp_path: Path) -> None:
    spec, preset, config = REGISTRY.strategy(label)
    stream = shared_head()
    request, experts = RunRequest(spec.name, stream.name, 0, preset=preset), experts_of(REGISTRY, spec, stream)
    cell = identify(request, spec, config, stream, {}, "cpu", experts)
    record = run_cell(cell, REGISTRY, tmp_path, Cache(tmp_path / "cache"))
    assert record.error is None
    assert record.results is not None
    answered = [[[total for _, total in counts] for counts in row] for row in record.results["counts"]]
    assert all(sum(totals) == 64 for row in answered for totals in row)


def test_the_fixture_for_pytest_fails_with_what_the_kit_finds(tmp_path: Path) -> None:
    toys = str(Path(__file__).parent / "toys.py")
    (tmp_path / "test_toy.py").write_text(f"def test_toy(conformance):\n    conformance('nan-loss', [{toys!r}])\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "shiftproof.benchmark.pytest_plugin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "AssertionError: finishes the planted stream: " in done.stdout
