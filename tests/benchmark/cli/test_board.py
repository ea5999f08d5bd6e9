"""`shiftproof leaderboard` on synthetic records: what is refused, in how many lines, and what is left on the disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shiftproof.benchmark.boards.leaderboard import board_json, build_board
from shiftproof.benchmark.cli.main import app
from shiftproof.benchmark.records import RecordStore, RunRecord, sha256

MakeRecord = Callable[..., RunRecord]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line on standard error of a call that ends with 2 and prints nothing else."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return str(line)


@pytest.fixture
def records(make_record: MakeRecord) -> list[RunRecord]:
    return [make_record(strategy, seed) for strategy in ("sgd", "er") for seed in range(2)]


@pytest.fixture
def folder(records: list[RunRecord], tmp_path: Path) -> Path:
    """Holds `records` and, beside it, a board of them."""
    for record in records:
        RecordStore(tmp_path).write(record)
    (tmp_path / "b.json").write_text(board_json(build_board("b", records)))
    return tmp_path


def file_of(folder: Path, record: RunRecord) -> Path:
    return RecordStore(folder).path(record.run_id)


# Check


def test_a_check_without_a_problem_names_the_board_as_the_user_did(
    folder: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert call("check", "b.json").stdout == "b.json: 4 records, every number agrees\n"
    single = make_record()
    RecordStore(folder / "one").write(single)
    Path("one/b.json").write_text(board_json(build_board("b", [single])))
    assert call("check", "one/b.json").stdout == "one/b.json: 1 record, every number agrees\n"


def test_records_of_another_suite_are_one_line(folder: Path, make_record: MakeRecord) -> None:
    for seed in range(5):
        RecordStore(folder / "other").write(make_record("lws", seed))
    other = folder / "other/records"
    said = refused("check", folder / "b.json", "--records", folder / "other")
    assert f"expected the 4 records of the board in {other}, got 0 of them and 5 others; is this another suite?" in said


def test_an_empty_folder_of_records_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("check", folder / "b.json", "--records", tmp_path / "empty")
    assert said.endswith("empty, got 0 of them; name the folder of the board's records with --records")


def test_missing_and_additional_records_are_named_by_their_files(
    folder: Path, records: list[RunRecord], make_record: MakeRecord
) -> None:
    RecordStore(folder).write(make_record("lws"))
    said = refused("check", folder / "b.json")
    assert f"got 4 of them and 1 other; build the board again or take away {file_of(folder, make_record('lws'))}" in said
    first, second, *_ = sorted(records, key=lambda record: record.run_id)
    file_of(folder, first).unlink()
    assert f"got 3 of them and 1 other; restore {file_of(folder, first)}" in refused("check", folder / "b.json")
    file_of(folder, second).unlink()
    assert refused("check", folder / "b.json").endswith(f"restore {file_of(folder, first)} and 1 more")


def edited(record: RunRecord) -> str:
    content = json.loads(record.to_json())
    content["results"]["counts"][0][0][0][0] += 1
    return RunRecord(**content).to_json()


DAMAGE: dict[str, tuple[Callable[[RunRecord], str], str]] = {
    "edited": (edited, "expected results_sha256 "),
    "edited beside the results": (lambda record: record.to_json().replace("60.0", "61.0"), "got an edited file; restore it"),
    "cut short": (lambda record: record.to_json()[:900], "expected a complete JSON file, got one that ends or breaks at line"),
    "of a newer schema": (lambda record: replace(record, schema_version="2.0.0").to_json(), "got 2.0.0; update shiftproof"),
    "nested": (lambda record: "[" * 100_000, "got one that is nested too deeply"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_one_line_that_names_its_file_and_what_is_wrong(
    folder: Path, records: list[RunRecord], damage: str
) -> None:
    change, said = DAMAGE[damage]
    path = file_of(folder, records[0])
    path.write_text(change(records[0]))
    line = refused("check", folder / "b.json")
    assert line.startswith(f"error: {path}: expected ")
    assert said in line
    assert "more" not in line


def test_of_several_problems_the_first_is_said_and_the_others_are_counted(folder: Path, records: list[RunRecord]) -> None:
    first, second, third, _ = sorted(records, key=lambda record: record.run_id)
    file_of(folder, first).write_text("{")
    file_of(folder, second).write_text(edited(second))
    file_of(folder, third).unlink()
    line = refused("check", folder / "b.json")
    assert line.startswith(f"error: {file_of(folder, first)}: ")
    assert line.endswith("; and 2 more")


def test_a_forged_number_of_a_board_is_named_and_the_hash_made_anew_is_not_counted(folder: Path) -> None:
    board = json.loads((folder / "b.json").read_text())
    board["sections"][0]["rows"][0]["metrics"]["worst"]["mean"] = 0.99
    board.pop("sha256")
    (folder / "b.json").write_text(board_json(board | {"sha256": sha256(board)}))
    line = refused("check", folder / "b.json")
    assert line.startswith(f"error: {folder / 'b.json'} at $.sections[0].rows[0].metrics.worst.mean: expected 0.")
    assert line.endswith("from the records, got 0.99; build it again from its records")


# Show


def test_a_board_that_cannot_be_read_is_named_as_the_user_did(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("records/deep.json").write_text("[" * 100_000)
    Path("records/cut.json").write_text("{")
    assert refused("show", "records/deep.json").startswith(
        "error: records/deep.json: expected a JSON file, got one that is nest"
    )
    assert refused("show", "records/cut.json").startswith("error: records/cut.json: expected a complete JSON file")
    assert refused("check", "records/../none.json").startswith("error: records/../none.json: expected a JSON file")


# Build


@pytest.mark.parametrize("name", ["", ".", "x.txt", "x", ".json", "records"])
def test_a_board_is_written_to_a_json_file_only(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert refused("build", ".", "-o", name).startswith("error: expected -o as a ")
    assert sorted(folder.iterdir()) == before


def test_a_name_that_is_too_long_for_the_system_is_one_line(folder: Path) -> None:
    board, long = folder / "b.json", "a" * 300
    assert "expected a folder with records" in refused("build", long, "-o", "x.json")
    assert "expected a folder with the board's records" in refused("check", board, "--records", long)
    assert "File name too long" in refused("show", f"{long}.json")
    result = call("build", folder, "-o", folder / f"{long}.json")
    assert (result.exit_code, "File name too long" in result.stderr) == (2, True)


def test_records_that_no_board_can_be_built_from_are_named_by_their_files(folder: Path, records: list[RunRecord]) -> None:
    path = file_of(folder, records[0])
    path.write_text(edited(records[0]))
    assert refused("build", folder, "-o", folder / "new.json").startswith(f"error: {path}: expected results_sha256")
    path.write_text("[" * 100_000)
    assert refused("build", folder, "-o", folder / "new.json").startswith(f"error: {path}: expected a JSON file")
    path.write_text(json.dumps(json.loads(records[0].to_json())))
    assert refused("build", folder, "-o", folder / "new.json").startswith(f"error: {path}: expected a record laid out as")


def test_a_full_disk_keeps_neither_board_nor_pictures_and_the_table_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:  # the board is written, its first picture is not
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = call("build", folder, "-o", folder / "new/b.json")
    assert result.exit_code == 2
    assert "er" in result.stdout
    assert result.stderr.startswith("error: expected to write b-b-digits-1-recipe-standard-worst-average.png into ")
    assert list((folder / "new").iterdir()) == []
