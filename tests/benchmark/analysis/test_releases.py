"""What lies between two releases, on small versions of the real streams: the ends of lines, and the board's own numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shiftproof.benchmark.analysis.release_reports import barrier_tables, means, scale_tables
from shiftproof.benchmark.analysis.releases import WITHOUT_MAPS, Curve, Line
from shiftproof.benchmark.cli.main import app
from shiftproof.datasets import digits_releases

SMALL = ["base_samples=64", "release_samples=64", "task_samples=64"]
SET = [part for knob in SMALL for part in ("--set", f"stream.{knob}")] + ["--set", "recipe.epochs=1"]
METHODS = "vanilla,git-rebasin,transfusion,transfusion@shared"


@pytest.fixture(scope="module", autouse=True)
def _brief() -> Iterator[None]:
    """Releases that were hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("A", "B", "TWIN"):
            patch.setattr(digits_releases, name, replace(getattr(digits_releases, name), epochs=20))
        yield


def analyzed(what: str, stream: str, folder: Path, *extra: str) -> dict[str, Any]:
    arguments = ["analyze", what, "--stream", stream, *SET, "--out", str(folder), *extra]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (folder / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    told: dict[str, Any] = json.loads((folder / f"{what}.json").read_text())
    return told


@pytest.fixture(scope="module")
def rebasin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    told = analyzed("rebasin", "digits-vit-barrier", tmp_path_factory.mktemp("told"), "--strategy", METHODS, "--points", "5")
    return {line["method"]: line for line in told["lines"]}


def test_an_aligned_release_computes_what_it_did_with_its_residual_maps_and_not_without(rebasin: dict[str, Any]) -> None:
    start = rebasin["vanilla"]["loss"][0]
    assert rebasin["transfusion"]["loss"][0] == pytest.approx(start, rel=1e-4)
    assert rebasin["transfusion@shared"]["loss"][0] == pytest.approx(start, rel=1e-4)
    assert rebasin[f"transfusion{WITHOUT_MAPS}"]["loss"][0] > start + 0.1


def test_units_that_changed_heads_have_lost_the_function(rebasin: dict[str, Any]) -> None:
    assert rebasin["git-rebasin"]["loss"][0] > rebasin["vanilla"]["loss"][0] + 0.01


def test_all_lines_end_at_the_new_release_and_one_permutation_a_stream_has_one_line(rebasin: dict[str, Any]) -> None:
    ends = [line["loss"][-1] for line in rebasin.values()]
    assert ends == pytest.approx([ends[0]] * len(ends), rel=1e-5)
    assert f"transfusion@shared{WITHOUT_MAPS}" not in rebasin
    assert all(len(line["accuracy"]) == 5 for line in rebasin.values())


def test_the_scale_of_one_gives_the_boards_numbers(tmp_path: Path) -> None:
    told = analyzed("alpha", "digits-releases", tmp_path, "--strategy", "transfusion", "--high", "1", "--step", "0.5")
    run = ["run", "--stream", "digits-releases", "--strategy", "transfusion,transfusion@head-only", "--seeds", "0"]
    done = CliRunner().invoke(app, [*run, *SET, "--executor", "inline", "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "records").glob("*.json")]
    (curve,) = told["curves"]
    for record in records:
        row = curve["accuracy"][0 if "head-only" in record["label"] else 2][told["folds"].index(record["identity"]["fold"])]
        assert row == [correct / total for correct, total in record["results"]["counts"][0][0]]
    assert len(records) == 8


def test_streams_without_a_release_and_methods_that_do_not_align_are_refused() -> None:
    for arguments, said in (
        (["rebasin", "--stream", "digits-domains"], "to a new release of its base, got digits-domains, which does not; choose"),
        (["overlap", "--stream", "digits-releases"], "got digits-releases: the stream carries a fine-tuning to a new release"),
        (["alpha", "--stream", "digits-releases", "--strategy", "target-base"], "expected methods that align"),
        (["alpha", "--stream", "digits-releases", "--strategy", "sgd"], "got 'sgd'; `shiftproof list strategies` tells"),
        (["alpha", "--stream", "digits-releases", "--step", "0"], "expected --step above 0, got 0"),
        (["rebasin", "--stream", "digits-vit-barrier", "--points", "2"], "--points"),
    ):
        result = CliRunner().invoke(app, ["analyze", *arguments])
        assert result.exit_code == 2
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_tables_have_the_barrier_and_means_over_folds() -> None:
    line = Line("m", (1.0, 3.0, 2.0), (0.5, 0.25, 1.0))
    losses, accuracies = barrier_tables((0.0, 0.5, 1.0), [line])
    assert losses.rows == [["m", "1.500", "1.000", "3.000", "2.000"]]
    assert accuracies.rows == [["m", "50.0%", "25.0%", "100.0%"]]
    curve = Curve("m", (((0.5, 1.0), (0.7, 0.8)),))
    assert means(curve, 0) == pytest.approx([0.6])
    assert [table.rows for table in scale_tables((1.0,), ("task", "support"), [curve])] == [[["m", "60.0%"]], [["m", "90.0%"]]]
