"""Files of exported experts: what they say about themselves, a folder of them written whole or not at all, and checks."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.experiences import StateDict, state_sha256
from shiftproof.benchmark.merging.safetensors_files import read_header
from shiftproof.benchmark.records import canonical

METADATA = "shiftproof.export"  # key of the metadata; a merge keeps that of the base, so its output names the stream
SUFFIX = ".safetensors"
BASE_FILE, RELEASE_FILE, HEADS_FILE = f"base{SUFFIX}", f"release{SUFFIX}", f"heads{SUFFIX}"
AGAIN = "export again, or copy the folder again"


@dataclass(frozen=True)
class Facts:
    """What an exported file says about itself.

    Attributes:
        part: "base", "release", "expert", or "heads": what no two experts share, each head as its own expert has it.
        stream: Its name; a merge of these files keeps that of the base.
        version: Of the stream.
        fold: The fold whose experts these are; "" = all.
        seed: Of the run that would fine-tune them.
        set: What was set for the stream, "scope.key=value".
        weights_sha256: Over names, dtypes, shapes and bytes of this file's tensors.
        experience: What an expert was fine-tuned on.
        key: What determines the entry in the cache, among it data, recipe, seed, device and torch; empty where there is none.
        cache_key: Hash of it, the name of the entry.
        files: `weights_sha256` of all other files of the export; the base's file alone lists them.
        shiftproof: Which version wrote it.
    """

    part: str
    stream: str
    version: str
    fold: str
    seed: int
    set: list[str]
    weights_sha256: str = ""
    experience: str = ""
    key: dict[str, Any] = field(default_factory=dict)
    cache_key: str = ""
    files: dict[str, str] = field(default_factory=dict)
    shiftproof: str = field(default_factory=lambda: installed_version("shiftproof"))

    @property
    def origin(self) -> tuple[object, ...]:
        """What all files of an export have in common."""
        return self.stream, self.version, self.fold, self.seed, self.set


@dataclass(frozen=True)
class Export:
    """A folder of exported files, as they say.

    Attributes:
        base: Facts of the base's file.
        parts: Facts of every other file, by its name.
    """

    folder: Path
    base: Facts
    parts: dict[str, Facts]

    @property
    def experts(self) -> list[str]:
        """Names of the experts."""
        return [name.removesuffix(SUFFIX) for name, facts in self.parts.items() if facts.part == "expert"]

    @property
    def device(self) -> str:
        """Type of the device that they were fine-tuned on."""
        return str(self.parts[f"{self.experts[0]}{SUFFIX}"].key.get("device"))

    def facts(self, file: str) -> Facts:
        """What a file says. Raises InputError if it is not among those of the export."""
        if file != BASE_FILE and file not in self.parts:
            raise InputError(f"expected {file} among the files that {BASE_FILE} names, got {', '.join(self.parts)}; {AGAIN}")
        return self.base if file == BASE_FILE else self.parts[file]

    def weights(self, file: str) -> StateDict:
        """The tensors of a file.

        Raises:
            InputError: If it is not among those of the export, its tensors are not what was exported, or not finite.
        """
        expected = self.facts(file).weights_sha256
        tensors = safetensors.torch.load((self.folder / file).read_bytes())
        if state_sha256(tensors) != expected:
            raise InputError(f"{file}: expected the weights that were exported, got others, whose hash is wrong; {AGAIN}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InputError(f"{file}: expected finite weights, got NaN or infinity in {name!r}; train it again")
        return tensors


def write_part(path: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Write one file and wait until it is on the disk."""
    content = safetensors.torch.save(dict(tensors), {"format": "pt", METADATA: canonical(asdict(facts))})
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_facts(path: Path) -> Facts:
    """What a file says about itself.

    Raises:
        InputError: If it is not there, damaged, or was not exported.
    """
    if not path.is_file():
        raise InputError(f"expected {path.name} in {path.parent}, got no such file; {AGAIN}")
    try:
        _, metadata = read_header(path)
    except OSError as error:
        raise InputError(f"expected to read {path}, got: {error.strerror}") from error
    if METADATA not in metadata:
        raise InputError(f"{path}: expected a file that `shiftproof experts export` wrote, got one without its metadata")
    try:
        told = json.loads(metadata[METADATA])
        kinds = {name: type(value) for name, value in asdict(Facts("", "", "", "", 0, [])).items()}
        complete = {name: type(value) for name, value in told.items()} == kinds
    except (ValueError, AttributeError, RecursionError):  # the last for brackets within brackets
        complete = False
    if not complete:
        raise InputError(f"{path}: expected the metadata of this version's `experts export`, got others; export again")
    return Facts(**told)


def read_export(folder: Path) -> Export:
    """What the files of an export say; other files in the folder are passed over.

    Raises:
        InputError: If a file is missing, damaged, or of another export.
    """
    if not folder.is_dir():
        raise InputError(f"expected a folder that `shiftproof experts export` wrote, got {folder}, which is none")
    base = read_facts(folder / BASE_FILE)
    if base.part != "base" or not base.files or any(Path(name).name != name for name in base.files):
        raise InputError(f"{BASE_FILE}: expected the base of an export, which lists its files, got another part; {AGAIN}")
    parts = {name: read_facts(folder / name) for name in base.files}
    for name, facts in parts.items():
        if facts.weights_sha256 != base.files[name] or facts.origin != base.origin:
            raise InputError(f"{name}: expected a file of the same export as {BASE_FILE}, got one of another; {AGAIN}")
    export = Export(folder, base, parts)
    if not export.experts:
        raise InputError(f"{BASE_FILE}: expected an export with experts, got one with {', '.join(parts)} alone; {AGAIN}")
    return export


def check_out(out: Path, force: bool) -> None:
    """Raises InputError if the folder must not be written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"expected --out as a folder, got {out}, which is a file; choose another name")
    if out.exists() and not force:
        raise InputError(f"expected a new folder for --out, got {out}, which exists; give --force to replace an export in it")
    if out.exists() and any(out.iterdir()) and not _earlier(out):
        raise InputError(f"expected a new folder or an earlier export for --out, got {out}, which is none; choose another name")


@contextmanager
def new_export(out: Path, force: bool) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `out` when it is complete.

    In an `out` that exists the files of the new export take the place of those of an earlier one, the base's last: without
    it the others are no export. What else lies there is left alone.

    Raises:
        OutputError: If something cannot be written; nothing is left of it.
    """
    part = out.parent / f".{out.name}.{secrets.token_hex(8)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        part.mkdir()
        yield part
        if out.exists():
            _replace(out, part)
        else:
            part.rename(out)
    except OSError as error:
        why = f"expected to write {out.name} into {out.parent}, got: {error.strerror}"
        raise OutputError(f"{why}; free space or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace(out: Path, part: Path) -> None:
    for file in _earlier(out):
        file.unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == BASE_FILE):
        os.replace(file, out / file.name)


def _earlier(out: Path) -> list[Path]:
    """Files of the export that lies there, the base's first."""
    try:
        base = read_facts(out / BASE_FILE)
    except InputError:
        return []
    return [out / BASE_FILE, *(out / name for name in base.files if Path(name).name == name)]


def _remove_leftovers(out: Path) -> None:
    """Remove what an export that was killed has left beside `out`."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}")
    for folder in out.parent.iterdir():
        if ours.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
