"""Boards: a pure function of run records, and a check that computes every number of one again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftproof.benchmark.boards.sections import build_sections
from shiftproof.benchmark.boards.verification import cell_metrics, record_problems, validate
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.metrics import shiftproof_metrics
from shiftproof.benchmark.records import SCHEMA_VERSION, RunRecord, canonical, check_version, parse_json, sha256

__all__ = ["board_json", "build_board", "check_board", "read_board", "record_texts", "validate"]

SHOWN_DIFFERENCES = 10


def build_board(name: str, records: Sequence[RunRecord], metrics: Sequence[MetricSpec] | None = None) -> dict[str, Any]:
    """A board from records, the same to the byte whatever their order.

    Rows that differ in stream, version, split, data, knobs, tier, recipe, base, selection rule or the flag 'custom' stand in
    sections of their own and are never ranked together. README.md of `leaderboards/` describes what a row holds.

    Args:
        name: Of the board; its file and its folder of records are called so.
        records: Finished and failed ones.
        metrics: Columns; the built-in metrics if None.

    Raises:
        InputError: If there is no record, one was edited, or standard records of one stream differ in version, split or data.
    """
    metrics = shiftproof_metrics() if metrics is None else metrics
    unique = _unique(records)
    problems = [problem for record in unique for problem in record_problems(record, metrics)]
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
    board = parse_json(_read(path), path.name)
    check_version(board, path.name)
    if board.get("kind") != "board":
        raise InputError(
            f"{path.name}: expected a board, got kind {board.get('kind')!r}; `leaderboard build` makes one from records"
        )
    validate(board, path.name)
    if sha256({name: block for name, block in board.items() if name != "sha256"}) != board["sha256"]:
        raise InputError(
            f"{path.name}: expected a board as it was built, got one that was edited; build it again from its records"
        )
    return board


def record_texts(folder: Path) -> dict[str, str]:
    """The text of each record file, by run id: what `check_board` takes.

    Args:
        folder: Holds the files, or is an output folder with a folder `records` in it.

    Raises:
        InputError: If there is no such folder or a file cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"expected a folder with the board's records, got {folder}, which is none; name it with --records")
    inner = folder / "records"
    return {path.stem: _read(path) for path in sorted((inner if inner.is_dir() else folder).glob("*.json"))}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise InputError(f"{path.name}: expected a JSON file that can be read, got: {reason}; restore it") from error


def check_board(
    board: Mapping[str, Any],
    records: Sequence[RunRecord] | Mapping[str, str],
    metrics: Sequence[MetricSpec] | None = None,
) -> list[str]:
    """Compute everything again: run ids, hashes, the metrics of every record from its counts, every number of the board.

    This makes a board tamper-evident. Who edits a board, a record and all hashes in agreement is found out by running a cell.

    Args:
        board: As read from its file.
        records: The records the board names, or the texts of their files by run id (see `record_texts`).
        metrics: Installed metrics; the built-in ones if None.

    Returns:
        What is wrong, one line each; empty if nothing is.
    """
    try:
        validate(board, "board")
    except InputError as error:
        return [str(error)]
    texts = records if isinstance(records, Mapping) else {record.run_id: record.to_json() for record in records}
    installed = {metric.name: metric for metric in (shiftproof_metrics() if metrics is None else metrics)}
    read = {run_id: _sound(run_id, text, installed) for run_id, text in sorted(texts.items())}
    problems = [*_listing_problems(board, texts), *(problem for _, found in read.values() for problem in found)]
    unknown = sorted(set(board["metrics"]) - set(installed))
    problems += [f"expected metric {name!r} of the board to be installed, got none; install its plugin" for name in unknown]
    listed = [record for run_id, (record, _) in read.items() if record is not None and run_id in board["records"]]
    if len(listed) == len(board["records"]) and not unknown:
        problems += _differences(board, listed, [installed[name] for name in board["metrics"]])
    return problems


def _listing_problems(board: Mapping[str, Any], texts: Mapping[str, str]) -> Iterator[str]:
    for run_id in sorted(set(board["records"]) | set(texts)):
        if run_id not in texts:
            yield f"expected record {run_id}, got none; restore the file"
        elif run_id not in board["records"]:
            yield f"record {run_id[:12]}: expected every record to be on the board, got one that is not; build the board again"
        elif _text_sha256(texts[run_id]) != board["records"][run_id]:
            yield f"record {run_id[:12]}: expected sha256 {board['records'][run_id]}, got an edited file; restore it"


def _sound(run_id: str, text: str, installed: Mapping[str, MetricSpec]) -> tuple[RunRecord | None, list[str]]:
    """The record in a file, None if there are problems with it, and the problems."""
    where = f"record {run_id[:12]}"
    try:
        record = RunRecord.from_json(text, where)
    except InputError as error:
        return None, [str(error)]
    problems = record_problems(record, list(installed.values()))
    if record.run_id != run_id:
        problems.append(f"{where}: expected a file named by its run id, got run id {record.run_id}")
    unknown = sorted(set(record.metrics) - set(installed))
    problems += [f"{where}: expected metric {name!r} to be installed, got none; install its plugin" for name in unknown]
    return (None if problems else record), problems


def _differences(board: Mapping[str, Any], records: Sequence[RunRecord], metrics: Sequence[MetricSpec]) -> list[str]:
    try:
        rebuilt = _build(board["name"], records, metrics)
    except InputError as error:
        return [str(error)]
    found = list(_compare(rebuilt, board, "$"))
    more = [f"... and {len(found) - SHOWN_DIFFERENCES} more differences"] if len(found) > SHOWN_DIFFERENCES else []
    return found[:SHOWN_DIFFERENCES] + more


def _compare(expected: object, got: object, where: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        for name in expected:
            yield from _compare(expected[name], got[name], f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for place, pair in enumerate(zip(expected, got, strict=True)):
            yield from _compare(*pair, f"{where}[{place}]")
    elif canonical(expected) != canonical(got):
        yield f"board at {where}: expected {_short(expected)} from the records, got {_short(got)}"


def _short(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{len(value)} {'items' if isinstance(value, list) else 'fields'}"
    return canonical(value)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
