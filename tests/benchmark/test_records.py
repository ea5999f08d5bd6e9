"""Records on disk: whole or not at all, and readable only if they are sound."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.records import (
    RecordStore,
    RunRecord,
    RunRequest,
    canonical,
    check_version,
    parse_json,
    read_records,
    records_folder,
    remove_leftovers,
    sha256,
    write_atomically,
    write_together,
)

MakeRecord = Callable[..., RunRecord]


def test_a_record_is_read_back_as_it_was_written(make_record: MakeRecord, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    finished, failed = make_record(seed=0), make_record(seed=1, failed=True)
    for record in (finished, failed):
        store.write(record)
        assert store.read(record.run_id) == record
    assert store.all() == sorted([finished, failed], key=lambda record: record.run_id)
    assert store.read("0" * 64) is None


def test_the_same_record_gives_the_same_bytes(make_record: MakeRecord) -> None:
    record = make_record()
    shuffled = replace(record, identity=dict(reversed(record.identity.items())))
    assert record.to_json() == shuffled.to_json() == RunRecord.from_json(record.to_json(), "x").to_json()


def test_the_hash_is_that_of_the_canonical_json() -> None:
    value = {"b": [1, 2.5, None, True], "a": "\u00e4"}
    assert canonical(value) == '{"a":"\\u00e4","b":[1,2.5,null,true]}'
    assert sha256(value) == hashlib.sha256(canonical(value).encode()).hexdigest()
    assert sha256({"a": 1}) != sha256({"a": 1.0}) != sha256({"a": "1"})


def cut(text: str) -> str:
    return text[: len(text) // 2]


def block(text: str) -> str:
    return json.dumps({**json.loads(text), "provenance": None})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "expected a complete JSON file, got one that ends or breaks at line"),
        (lambda text: "", "expected a complete JSON file, got one that ends or breaks at line 1"),
        (lambda text: "[1]", "expected a JSON object, got list"),
        (lambda text: text.replace("60.0", "NaN"), "expected a complete JSON file, got one that holds NaN"),
        (lambda text: text.replace('"kind": "run"', '"kind": "board"'), "missing or unknown: kind"),
        (lambda text: text.replace('"label"', '"lable"'), "missing or unknown: label, lable"),
        (lambda text: text.replace('"schema_version": "1.', '"schema_version": "2.'), "got 2.0.0; update shiftproof"),
        (block, "expected the block 'provenance' as an object, got NoneType"),
        (lambda text: "[" * 100_000, "expected a JSON file, got one that is nested too deeply to be read"),
        (lambda text: text.replace("0.5", "[" * 101 + "]" * 101), "got one that is nested too deeply to be read"),
        (lambda text: text.replace('"label"', '"label": "lws",\n"label"'), "got one that holds the key 'label' twice"),
        (lambda text: text.replace("60.0", "1e999"), "got one that holds 1e999, which no float can hold"),
        (lambda text: text.replace("60.0", str(2**64)), "holds an integer of 20 digits, which 64 bits cannot hold"),
        (lambda text: text.replace("60.0", "9" * 5000), "holds an integer of 5000 digits, which 64 bits cannot hold"),
        (lambda text: text.replace("1.0.0", "1.0." + "9" * 5000), "got 1.0.9999999999999999; write it again"),
        (lambda text: text.replace('"attempts": 1', '"attempts": "1"'), "expected provenance.attempts of type int, got str"),
        (lambda text: json.dumps({**json.loads(text), "run_id": 1}), "expected run_id of type str, got int"),
        (lambda text: json.dumps(json.loads(text)), "got other spacing or order; leave records as they were written"),
        (lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=1) + "\n", "got other spacing or order"),
    ],
    ids=[
        *["truncated", "empty", "list", "nan", "kind", "field", "newer", "block", "nested", "nested-101"],
        *["twice", "overflow", "65-bit", "5000-digit", "version", "attempts", "run-id", "indented", "ordered"],
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_file(
    make_record: MakeRecord, tmp_path: Path, damage: Callable[[str], str], said: str
) -> None:
    store, record = RecordStore(tmp_path), make_record()
    store.write(record)
    path = store.path(record.run_id)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError) as caught:
        store.read(record.run_id)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_none_are_input_errors(make_record: MakeRecord, tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), make_record()
    store.write(record)
    store.path(record.run_id).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a JSON file, got other bytes; restore it"):
        store.read(record.run_id)
    store.path(record.run_id).unlink()
    store.path(record.run_id).mkdir()
    with pytest.raises(InputError, match=r"expected a record in .*, got: Is a directory"):
        store.read(record.run_id)


def test_a_file_under_another_name_than_its_run_id_is_refused(make_record: MakeRecord, tmp_path: Path) -> None:
    record = make_record()
    (tmp_path / "other.json").write_text(record.to_json())
    with pytest.raises(
        InputError, match=f"other.json: expected the file to be named by its run id, got run id {record.run_id}"
    ):
        read_records(tmp_path)


def test_integers_of_64_bits_and_100_levels_are_read() -> None:
    content = {"a": [2**64 - 1, -(2**63), 1e308]}
    deepest = functools.reduce(lambda inner, _: [inner], range(99), 0)
    assert parse_json(json.dumps(content | {"c": deepest}), "a file") == content | {"c": deepest}


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        ("2.0.0", "update"),
        ("1.1.0", "update"),
        ("0.9.0", "write it again"),
        ("none", "write it again"),
        ("1.0", "write it again"),
        ("1.0.x", "write it again"),
    ],
)
def test_other_schemas_are_refused(version: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"a file: expected schema 1.0.0, got {version}; {advice}"):
        check_version({"schema_version": version}, "a file")


def test_a_patch_of_the_schema_is_read() -> None:
    check_version({"schema_version": "1.0.7"}, "a file")
    assert parse_json('{"schema_version": "1.0.7"}', "a file") == {"schema_version": "1.0.7"}


def test_a_label_names_strategy_and_preset() -> None:
    assert RunRequest("lws", "b-digits", 0).label == "lws"
    assert RunRequest("lws", "b-digits", 0, preset="released").label == "lws@released"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_anywhere_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match=f"expected to write record.json into .*, got: {os.strerror(code)}; free space"):
            write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert path.read_text() == "old"


def test_of_files_that_belong_together_none_is_written_if_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"expected to write b into .*, got: No space left"):
            write_together({tmp_path / "a": "one", tmp_path / "b": b"two"})
    assert list(tmp_path.iterdir()) == []
    write_together({tmp_path / "a": "one", tmp_path / "b": b"two"})
    assert [(tmp_path / name).read_text() for name in "ab"] == ["one", "two"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_records_of_an_output_folder_lie_in_its_folder_records(tmp_path: Path) -> None:
    assert records_folder(tmp_path) == tmp_path
    (tmp_path / "records").mkdir()
    assert records_folder(tmp_path) == tmp_path / "records"


def test_an_interrupt_in_the_middle_leaves_nothing_behind_and_stays_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "record.json", "new")
    assert list(tmp_path.iterdir()) == []


FULL = """
import sys
from pathlib import Path
from shiftproof.benchmark.errors import OutputError
from shiftproof.benchmark.records import write_atomically

try:
    write_atomically(Path(sys.argv[1], "record.json"), "x" * 100_000)
except OutputError as error:
    print(error)
"""


def test_a_limit_of_the_system_in_the_middle_of_a_record_leaves_nothing_behind(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-B", "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=limit)
    assert done.stdout.startswith("expected to write record.json")
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path, make_record: MakeRecord) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"expected to write .*\.json into .*, got: "):
        RecordStore(tmp_path / "file").write(make_record())


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "record.json", b"x")
    assert (tmp_path / "deep" / "record.json").stat().st_mode & 0o777 == 0o644


def test_only_what_killed_writers_of_this_file_left_is_removed(tmp_path: Path) -> None:
    for name in ("a.json", ".a.json.x1", ".a.json.y2", ".b.json.x1", "b.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.x1", "a.json", "b.json"]
