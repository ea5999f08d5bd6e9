"""Paths that a command is given, looked at before it works. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from os.path import lexists, realpath
from pathlib import Path

from shiftproof.benchmark.errors import InputError


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; where the system refuses to look, as at a name that is too long, there is none."""
    return os.path.isdir(path)  # Path.is_dir raises


def check_parent(option: str, path: Path) -> None:
    """Raises InputError unless the folder that a path names is there."""
    if not path.parent.exists():
        raise InputError(f"expected {option} in a folder that exists, got {path}; make {path.parent} first")
    if not path.parent.is_dir():
        raise InputError(f"expected {option} in a folder, got {path}, where {path.parent} is a file; choose another")


def check_file(option: str, path: Path, force: bool) -> None:
    """Raises InputError unless a file can be written there: a new one, or with `force` in place of another."""
    if path.is_dir():
        raise InputError(f"expected {option} as a file, got {path}, which is a folder; choose another name")
    if lexists(path) and not force:
        raise InputError(f"expected a new file for {option}, got {path}, which exists; give --force to replace it")
    check_parent(option, path)


def check_folder(option: str, folder: Path) -> None:
    """Raises InputError, before there is anything to write, unless the folder can be written or made."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if lexists(one))
    if not nearest.is_dir():
        where = "which is" if nearest == folder else f"where {nearest} is"
        raise InputError(f"expected {option} as a folder, got {folder}, {where} a file; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"expected {option} where files can be written, got {folder}; choose another folder")


def check_apart(written: Mapping[str, Sequence[Path]], read: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a file that is written for two options, or read for one and written for another, and one that is to be a folder.

    Args:
        written: Option to the files that are written for it.
        read: Option to the files that are read for it.

    Raises:
        InputError: Which options, and which file.
    """
    pairs = [*combinations(written.items(), 2), *product(written.items(), read.items())]
    for (one, files), (other, others) in pairs:
        for file, another in product(files, others):
            if is_same(file, another) or _lies_in(file, another) or _lies_in(another, file):
                both = f"{file} for the one and {another} for the other" if file != another else f"{file} for both"
                raise InputError(f"expected {one} and {other} apart, got {both}; rename one of them")


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name one file, through links of either kind. A link to itself, which `resolve` fails at, is a name."""
    return realpath(one) == realpath(other) or (one.exists() and other.exists() and one.samefile(other))


def _lies_in(one: Path, other: Path) -> bool:
    return Path(realpath(other)) in Path(realpath(one)).parents
