"""Hashes of the inputs against hashlib's, and the child that makes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shiftproof.benchmark.merging.hashing import CHUNK, Hashing


def test_every_file_gets_the_hash_that_hashlib_gives(tmp_path: Path) -> None:
    files = [tmp_path / f"{size}" for size in (0, 1, CHUNK, 2 * CHUNK + 3)]
    for file in files:
        file.write_bytes(os.urandom(int(file.name)))
    with Hashing(files, threads=2) as hashing:
        assert hashing.result() == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_relative_path_with_odd_characters_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("-a b'ö.bin")
    file.write_bytes(b"x")
    with Hashing([file]) as hashing:
        assert hashing.result() == {file: hashlib.sha256(b"x").hexdigest()}


def test_a_file_that_is_gone_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Hashing([tmp_path / "none"]) as hashing, pytest.raises(OSError, match="could not be hashed"):
        hashing.result()


def test_leaving_early_ends_the_child(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(2**34)  # takes seconds to hash, and no room
    with Hashing([file]) as hashing:
        child = hashing._child
        assert child.poll() is None
    assert child.poll() == -9
