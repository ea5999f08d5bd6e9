"""Curves for TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from shiftproof.benchmark import tensorboard
from shiftproof.benchmark.records import RunRecord
from shiftproof.benchmark.registry.discovery import Entry
from shiftproof.benchmark.registry.loading import Loaded, load_entry
from shiftproof.benchmark.registry.lookup import Registry


@pytest.fixture
def observer(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loaded:
    """The plugin listens, and a folder is named."""
    loaded = load_entry(Entry("tensorboard", "shiftproof.benchmark.tensorboard", "shiftproof", "0"))
    monkeypatch.setattr(registry.observers, "plugins", [loaded])
    monkeypatch.setenv("SHIFTPROOF_TENSORBOARD", str(tmp_path / "curves"))
    return loaded


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def accuracies(record: RunRecord, column: int) -> list[list[float]]:
    assert record.results is not None
    return [[correct / total for correct, total in row[column]] for row in record.results["counts"]]


def test_every_eval_set_has_a_curve_of_its_average_and_of_its_worst_group(
    observer: Loaded, run: Callable[..., RunRecord], tmp_path: Path
) -> None:
    record = run("toy", seeds=(4,))
    found = curves(tmp_path / "curves" / "tiny" / "toy" / "all" / "seed-4")
    assert set(found) == {"learn/loss", "average/0", "average/1", "worst/0", "worst/1"}
    for column in (0, 1):
        rows = accuracies(record, column)
        assert found[f"worst/{column}"] == [(step, pytest.approx(min(row))) for step, row in enumerate(rows)]
        assert found[f"average/{column}"] == [(step, pytest.approx(sum(row) / 4)) for step, row in enumerate(rows)]
    assert found["learn/loss"] == [(step, pytest.approx(entry["loss"])) for step, entry in enumerate(record.logs)]
    assert tensorboard._writers == {}


def test_a_failed_cell_closes_its_log_with_what_there_was(
    observer: Loaded, run: Callable[..., RunRecord], tmp_path: Path
) -> None:
    run("nan-loss")
    assert len(curves(tmp_path / "curves" / "tiny" / "nan-loss" / "all" / "seed-0")["worst/0"]) == 1
    assert tensorboard._writers == {}


def test_overrides_have_curves_of_their_own(observer: Loaded, run: Callable[..., RunRecord], tmp_path: Path) -> None:
    run("plain", "recipe.epochs=1")
    run("plain")
    run("plain", "recipe.epochs=1", "recipe.lr=0.1")
    folders = sorted(path.name for path in (tmp_path / "curves" / "tiny" / "plain" / "all").iterdir())
    assert len(folders) == 3
    assert folders[0] == "seed-0"
    assert all(name.startswith("seed-0-") for name in folders[1:])


def test_without_a_folder_nothing_is_written(
    observer: Loaded, run: Callable[..., RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHIFTPROOF_TENSORBOARD")
    assert run("plain").status == "finished"
    assert not list(tmp_path.rglob("events*"))
