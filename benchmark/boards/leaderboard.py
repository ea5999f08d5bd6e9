"""Boards: a pure function of run records, and a check that computes every number of one again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftproof.benchmark.boards.sections import build_sections
from shiftproof.benchmark.boards.verification import cell_metrics, name_of, record_problems, validate
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.metrics import shiftproof_metrics
from shiftproof.benchmark.paths import is_folder
from shiftproof.benchmark.records import (
    SCHEMA_VERSION,
    RunRecord,
    canonical,
    check_version,
    parse_json,
    records_folder,
    sha256,
)

__all__ = ["board_json", "build_board", "check_board", "read_board", "record_texts", "validate"]


def build_board(
    name: str, records: Sequence[RunRecord], metrics: Sequence[MetricSpec] | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """A board from records, the same to the byte whatever their order.

    Rows that differ in stream, version, split, data, knobs, tier, recipe, base, selection rule or the flag 'custom' stand in
    sections of their own and are never ranked together. README.md of `leaderboards/` describes what a row holds.

    Args:
        name: Of the board; its file and its folder of records are called so.
        records: Finished and failed ones.
        metrics: Columns; the built-in metrics if None.
        folder: That the records were read from, for errors to name their files.

    Raises:
        InputError: If there is no record, one was edited, or standard records of one stream differ in version, split or data.
    """
    metrics = shiftproof_metrics() if metrics is None else metrics
    unique = _unique(records)
    problems = [problem for record in unique for problem in record_problems(record, metrics, folder)]
    if problems:
        raise InputError(problems[0])
    return _build(name, unique, metrics)


def _unique(records: Sequence[RunRecord]) -> list[RunRecord]:
    by_id: dict[str, RunRecord] = {}
    for record in records:
        if by_id.setdefault(record.run_id, record) != record:
            raise InputError(f"expected one record of run {record.run_id}, got two that differ; keep the one that you trust")
    if not by_id:
        raise InputError(
            "expected at least one record to build a board from, got none; run a suite first or name its output folder"
        )
    return [by_id[run_id] for run_id in sorted(by_id)]


def _build(name: str, records: Sequence[RunRecord], metrics: Sequence[MetricSpec]) -> dict[str, Any]:
    """A board from records in the order of run ids that are known to be sound."""
    values = {record.run_id: cell_metrics(record, metrics) for record in records if record.results is not None}
    board = {
        "schema_version": SCHEMA_VERSION,
        "kind": "board",
        "name": name,
        "sections": build_sections(records, values, metrics),
        "metrics": {
            metric.name: {
                "definition": metric.definition,
                "higher_is_better": metric.higher_is_better,
                "over_folds": metric.over_folds,
                "primary": metric.primary,
            }
            for metric in metrics
        },
        "records": {record.run_id: _text_sha256(record.to_json()) for record in records},
    }
    return board | {"sha256": sha256(board)}


def board_json(board: Mapping[str, Any]) -> str:
    """The file's text: sorted keys, no NaN."""
    return json.dumps(board, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_board(path: Path) -> dict[str, Any]:
    """Read a board and compare its shape with the schema and its content with the hash that it carries.

    Raises:
        InputError: If the file cannot be read, is cut short, was edited, is no board, or was written by a newer shiftproof.
    """
    board = parse_json(_read(path), str(path))
    check_version(board, str(path))
    if board.get("kind") != "board":
        raise InputError(
            f"{path}: expected a board, got kind {board.get('kind')!r}; `leaderboard build` makes one from records"
        )
    validate(board, str(path))
    if sha256({name: block for name, block in board.items() if name != "sha256"}) != board["sha256"]:
        raise InputError(f"{path}: expected a board as it was built, got one that was edited; build it again from its records")
    return board


def record_texts(folder: Path) -> dict[str, str]:
    """The text of each record file, by run id: what `check_board` takes.

    Args:
        folder: Holds the files, or is an output folder with a folder `records` in it.

    Raises:
        InputError: If there is no such folder or a file cannot be read.
    """
    if not is_folder(folder):
        raise InputError(f"expected a folder with the board's records, got {folder}, which is none; name it with --records")
    return {path.stem: _read(path) for path in sorted(records_folder(folder).glob("*.json"))}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise InputError(f"{path}: expected a JSON file that can be read, got: {reason}; restore it") from error


def check_board(
    board: Mapping[str, Any],
    records: Sequence[RunRecord] | Mapping[str, str],
    metrics: Sequence[MetricSpec] | None = None,
    *,
    where: str = "board",
    folder: Path | None = None,
) -> list[str]:
    """Compute everything again: run ids, hashes, the metrics of every record from its counts, every number of the board.

    This makes a board tamper-evident. Who edits a board, a record and all hashes in agreement is found out by running a cell.

    Args:
        board: As read from its file.
        records: The records the board names, or the texts of their files by run id (see `record_texts`).
        metrics: Installed metrics; the built-in ones if None.
        where: Names the board in a problem, its file for example.
        folder: That the records were read from, for problems to name their files.

    Returns:
        What is wrong, at most one line a record; empty if nothing is. The numbers of the board are compared with sound records
        alone: with others they would differ for that reason.
    """
    try:
        validate(board, where)
    except InputError as error:
        return [str(error)]
    installed = {metric.name: metric for metric in (shiftproof_metrics() if metrics is None else metrics)}
    unknown = sorted(set(board["metrics"]) - set(installed))
    if unknown:
        return [
            f"{where}: expected metric {name!r} of the board to be installed, got none; install its plugin" for name in unknown
        ]
    texts = records if isinstance(records, Mapping) else {record.run_id: record.to_json() for record in records}
    listing = _listing_problems(board, texts, folder)
    if listing and not set(texts) & set(board["records"]):
        return listing  # what is wrong with the records of another suite is beside the point
    read = [_read_sound(run_id, text, board, installed, folder) for run_id, text in sorted(texts.items())]
    problems = [found for found in read if isinstance(found, str)] + listing
    sound = [found for found in read if isinstance(found, RunRecord)]
    return problems or _differences(board, sound, [installed[name] for name in board["metrics"]], where)


def _listing_problems(board: Mapping[str, Any], texts: Mapping[str, str], folder: Path | None) -> list[str]:
    """One line if the records are not those that the board names, none if they are."""
    missing, other = (sorted(ids) for ids in (set(board["records"]) - set(texts), set(texts) - set(board["records"])))
    if not missing and not other:
        return []
    total, found = len(board["records"]), len(board["records"]) - len(missing)
    others = f" and {len(other)} other{'s' * (len(other) != 1)}" if other else ""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    if not found:
        advice = ("is this another suite? " if other else "") + "name the folder of the board's records with --records"
    elif missing:
        advice = f"restore {name_of(missing[0], folder)}{more}"
    else:
        advice = f"build the board again or take away {name_of(other[0], folder)}"
    expected = f"the {total} records" if total > 1 else "the one record"
    place = f" in {folder}" if folder else ""
    return [f"expected {expected} of the board{place}, got {found} of them{others}; {advice}"]


def _read_sound(
    run_id: str, text: str, board: Mapping[str, Any], installed: Mapping[str, MetricSpec], folder: Path | None
) -> RunRecord | str:
    """The record in a file, or the first problem with it."""
    where = name_of(run_id, folder)
    try:
        record = RunRecord.from_json(text, where)
    except InputError as error:
        return str(error)
    problems = record_problems(record, list(installed.values()), folder)
    if record.run_id != run_id:
        problems.insert(0, f"{where}: expected a file named by its run id, got run id {record.run_id}")
    unknown = sorted(set(record.metrics) - set(installed))
    problems += [f"{where}: expected metric {name!r} to be installed, got none; install its plugin" for name in unknown]
    stated = board["records"].get(run_id)
    if stated not in (None, _text_sha256(text)):
        problems.append(f"{where}: expected sha256 {stated}, got an edited file; restore it")
    return problems[0] if problems else record


def _differences(
    board: Mapping[str, Any], records: Sequence[RunRecord], metrics: Sequence[MetricSpec], where: str
) -> list[str]:
    try:
        rebuilt = _build(board["name"], records, metrics)
    except InputError as error:
        return [str(error)]
    # Another number makes another hash: that says nothing new.
    numbers = [{name: block for name, block in one.items() if name != "sha256"} for one in (rebuilt, board)]
    found = list(_compare(numbers[0], numbers[1], "$")) or list(_compare(rebuilt, board, "$"))
    return [f"{where} at {difference}; build it again from its records" for difference in found]


def _compare(expected: object, got: object, where: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        for name in expected:
            yield from _compare(expected[name], got[name], f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for place, pair in enumerate(zip(expected, got, strict=True)):
            yield from _compare(*pair, f"{where}[{place}]")
    elif canonical(expected) != canonical(got):
        yield f"{where}: expected {_short(expected)} from the records, got {_short(got)}"


def _short(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{len(value)} {'items' if isinstance(value, list) else 'fields'}"
    return canonical(value)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
