"""Run records: what was run, what came out, and what a stranger needs to check it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.paths import is_folder

SCHEMA_VERSION = "1.0.0"
MEND = "restore it or delete it and run again"
DEEPEST = 100  # levels of a JSON file; ours have less than 10, and Python's own limit hangs on who calls
LONGEST_INTEGER = 20  # digits of 2**64, and of -2**63 with its sign
PROTOCOL_VERSION = 2  # raised whenever the harness changes a result; tests/benchmark/test_protocol.py guards it


@dataclass(frozen=True)
class RunRequest:
    """One cell of a matrix, by name.

    Attributes:
        strategy: Name without preset.
        preset: Name of the preset, or "".
        config: Strategy knobs to set on top of the preset, as "key=value" split into pairs.
        knobs: Stream knobs.
        recipe: Recipe fields.
        base: Base recipe fields.
        recipe_name: Set by suites that come with a recipe of their own; such rows are ranked among themselves.
        custom: True where the user changed stream or recipe by hand; never ranked with standard rows.
    """

    strategy: str
    stream: str
    seed: int
    fold: str = "all"
    preset: str = ""
    config: tuple[tuple[str, str], ...] = ()
    knobs: tuple[tuple[str, str], ...] = ()
    recipe: tuple[tuple[str, str], ...] = ()
    base: tuple[tuple[str, str], ...] = ()
    recipe_name: str = ""
    custom: bool = False

    @property
    def label(self) -> str:
        """What a person calls it: strategy@preset."""
        return f"{self.strategy}@{self.preset}" if self.preset else self.strategy


@dataclass(frozen=True)
class RunRecord:
    """One cell's record, one JSON file named by `run_id`. The blocks are documented in leaderboards/schema.json.

    Attributes:
        identity: What the run id is the hash of.
        results: Integer counts; None where the cell failed.
        error: Type, message and place of the failure; None where it finished.
    """

    run_id: str
    status: Literal["finished", "failed"]
    identity: dict[str, Any]
    label: str
    plugin: dict[str, Any]
    protocol: dict[str, Any]
    data: dict[str, Any]
    results: dict[str, Any] | None
    results_sha256: str | None
    metrics: dict[str, Any]
    logs: list[dict[str, float | None]]
    provenance: dict[str, Any]
    cost: dict[str, Any]
    error: dict[str, str] | None = None
    submission: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION
    kind: Literal["run"] = "run"

    @property
    def attempts(self) -> int:
        """How often the cell was run to its end, failures included."""
        return int(self.provenance.get("attempts", 1))

    def to_json(self) -> str:
        """The file's text: sorted keys, no NaN."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> RunRecord:
        """Read a record back; only its outer shape is looked at here, `leaderboard check` looks at the rest.

        Raises:
            InputError: If the text is cut short, is no record, or was written by a newer shiftproof.
        """
        content = parse_json(text, where)
        check_version(content, where)
        expected = set(cls.__dataclass_fields__)
        if content.get("kind") != "run" or set(content) != expected:
            odd = sorted(set(content) ^ expected)
            raise InputError(f"{where}: expected a run record; fields that are missing or unknown: {', '.join(odd) or 'kind'}")
        for name in _BLOCKS:
            if not isinstance(content[name], dict):
                raise InputError(f"{where}: expected the block {name!r} as an object, got {type(content[name]).__name__}")
        attempts = content["provenance"].get("attempts", 1)
        for name, kind, value in (("run_id", str, content["run_id"]), ("provenance.attempts", int, attempts)):
            if type(value) is not kind:
                raise InputError(f"{where}: expected {name} of type {kind.__name__}, got {type(value).__name__}; {MEND}")
        return cls(**content)


_BLOCKS = ("identity", "plugin", "protocol", "data", "metrics", "provenance", "cost", "submission", "verification")


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object in which every key stands once and every number is finite, or an error that says which file is damaged."""
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_within_64_bits,
            object_pairs_hook=_different_keys,
        )
        _check_nesting(content)
    except RecursionError:
        raise InputError(f"{where}: expected a JSON file, got one that is nested too deeply to be read; {MEND}") from None
    except ValueError as error:
        line = f"ends or breaks at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f"holds {error}"
        raise InputError(f"{where}: expected a complete JSON file, got one that {line}; {MEND}") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, JSON does not have them."""
    raise ValueError(name)


def _finite(text: str) -> float:
    """Python reads 1e999 as infinity."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:LONGEST_INTEGER]}, which no float can hold")
    return number


def _within_64_bits(text: str) -> int:
    if len(text) > LONGEST_INTEGER or (number := int(text)).bit_length() > 64:
        raise ValueError(f"an integer of {len(text.lstrip('-'))} digits, which 64 bits cannot hold")
    return number


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python takes the last of two values, a reader the first."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!a} twice")
        found[name] = value
    return found


def _check_nesting(value: Any, depth: int = 1) -> None:
    if isinstance(value, dict | list):
        if depth > DEEPEST:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            _check_nesting(inner, depth + 1)


def check_version(content: Mapping[str, Any], where: str) -> None:
    """Refuse files of a newer schema, and of an older major one."""
    version = str(content.get("schema_version", "none"))
    numbers = [int(part) if re.fullmatch("[0-9]{1,9}", part) else -1 for part in version.split(".")]
    known = [int(part) for part in SCHEMA_VERSION.split(".")]
    if len(numbers) != 3 or min(numbers) < 0 or numbers[0] != known[0] or numbers[:2] > known[:2]:
        advice = "update shiftproof to read it" if numbers > known else "write it again with this shiftproof"
        raise InputError(f"{where}: expected schema {SCHEMA_VERSION}, got {version[:LONGEST_INTEGER]}; {advice}")


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(value: Any) -> str:
    """Hash of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: a reader never sees half of it, a full disk leaves nothing behind.

    Raises:
        OutputError: If the folder cannot be written or the disk is full.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, str | bytes]) -> None:
    """Write whole files, and none if the disk has no room for all of them.

    Raises:
        OutputError: If a folder cannot be written or the disk is full.
    """
    temporaries: list[tuple[str, Path]] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporaries.append((temporary, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in temporaries:
            os.replace(temporary, path)
    except BaseException as error:  # an interrupt from the keyboard leaves nothing behind, either
        for temporary, _ in temporaries:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"expected to write {path.name} into {path.parent}, got: {error.strerror}; free space or choose another folder"
        ) from error


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` have left behind that were killed in the middle."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


class RecordStore:
    """The records of an output folder: `records/<run_id>.json`."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "records"

    def path(self, run_id: str) -> Path:
        """Where the record of a cell lies."""
        return self.folder / f"{run_id}.json"

    def read(self, run_id: str) -> RunRecord | None:
        """The record of a cell, None if there is none yet."""
        path = self.path(run_id)
        return read_record(path) if path.exists() else None

    def write(self, record: RunRecord) -> None:
        """Write a record atomically.

        Raises:
            OutputError: If the folder cannot be written or the disk is full.
        """
        write_atomically(self.path(record.run_id), record.to_json())

    def all(self) -> list[RunRecord]:
        """Every record, in the order of run ids."""
        return read_records(self.folder)


def records_folder(folder: Path) -> Path:
    """Where the records of `folder` lie: in its `records` if it is an output folder, else directly in it."""
    inner = folder / "records"
    return inner if is_folder(inner) else folder


def read_record(path: Path) -> RunRecord:
    """The record in a file.

    Raises:
        InputError: If it cannot be read, is laid out otherwise than it was written, or as `RunRecord.from_json`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected a JSON file, got other bytes; {MEND}") from None
    except OSError as error:
        raise InputError(f"expected a record in {path}, got: {error.strerror}; {MEND}") from error
    record = RunRecord.from_json(text, str(path))
    # A board holds the hash of each file: of this text, not of what it means.
    if record.to_json() != text:
        raise InputError(
            f"{path}: expected a record laid out as it was written, got other spacing or order; "
            f"leave records as they were written: {MEND}"
        )
    return record


def read_records(folder: Path) -> list[RunRecord]:
    """Every record directly in `folder`, in the order of file names; the file name must be the run id."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        if record.run_id != path.stem:
            raise InputError(f"{path}: expected the file to be named by its run id, got run id {record.run_id}")
        records.append(record)
    return records
