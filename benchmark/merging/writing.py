"""Writes a merged checkpoint: all of it under its name, or nothing anywhere."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from shiftproof.benchmark.errors import OutputError
from shiftproof.benchmark.merging.checkpoints import Checkpoint
from shiftproof.benchmark.merging.inputs import SAFETENSORS, index_content, targets
from shiftproof.benchmark.merging.libc import hint
from shiftproof.benchmark.merging.safetensors_files import Fact, header_bytes, pwrite_full

RECIPE = "shiftproof.merge"  # key of the metadata
PORTION = 1 << 24  # bytes that are written before the system is told to bring them to the disk
_WHOLE, _START = c_int64(0), 2  # from 0 for 0 bytes: all; SYNC_FILE_RANGE_WRITE of Linux's fs.h: without waiting


@dataclass
class Part:
    """A file on its way: without a name where the system allows it, so that even a killed process leaves nothing.

    Attributes:
        temporary: Its name until it is finished; None while it has none.
        starts: Where each tensor begins.
        metadata: Of the base's file.
        waiting: Bytes that were written since the system was last told to bring them to the disk, roughly: threads add to it.
    """

    target: Path
    descriptor: int
    temporary: Path | None
    tensors: Sequence[Fact]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]
    waiting: int = 0

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes. They are on their way to the disk while the merge goes on: at its end little is left to wait for."""
        pwrite_full(self.descriptor, data, offset)
        self.waiting += data.nbytes
        if self.waiting >= PORTION:
            self.waiting = 0
            hint("sync_file_range", self.descriptor, _WHOLE, _WHOLE, _START)


class Output:
    """The files of a merge, laid out as the base's. Leaving the context without `commit` removes what was written.

    Args:
        out: As `inputs.check_output` takes it.
        base: Whose names, shapes, dtypes and metadata they keep.
        recipe: As long a text as that of `commit`.
        force: Replace files that exist.
        key: Under which the recipe stands in the metadata.

    Raises:
        OutputError: If the folder cannot be written or the disk is full: the space is taken before anything is merged.
    """

    def __init__(self, out: Path, base: Checkpoint, recipe: str, force: bool = False, key: str = RECIPE) -> None:
        self.out, self.base, self.force, self.key = out, base, force, key
        self.files = targets(out, base.located)
        self.is_folder = out.suffix != SAFETENSORS
        self.parts: list[Part] = []
        self._of: dict[str, Part] = {}
        try:
            with self._telling():
                for position, shard in enumerate(_layout(base, split=self.is_folder)):
                    self._begin(self.files[position], *shard, recipe)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.base.nbytes(name) for name in self._of)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor, of the base's shape and dtype; safe from several threads."""
        self.write_part(name, 0, tensor.reshape(-1))

    def write_part(self, name: str, start: int, run: Tensor) -> None:
        """Write (N,) elements of a tensor from position `start` on."""
        part = self._of[name]
        with self._telling():
            data = run.contiguous().view(torch.uint8).numpy().data
            part.write(data, part.starts[name] + start * run.dtype.itemsize)

    def commit(self, recipe: str) -> list[Path]:
        """Write the headers, bring everything to the disk, and give the files their names.

        Returns:
            The files.

        Raises:
            OutputError: If the disk is full, or another process has made a file of that name meanwhile.
        """
        with self._telling():
            for part in self.parts:
                head, starts = header_bytes(part.tensors, {**part.metadata, self.key: recipe})
                assert dict(zip((name for name, _, _ in part.tensors), starts, strict=True)) == part.starts
                pwrite_full(part.descriptor, memoryview(head), 0)
                os.fsync(part.descriptor)
            if self.is_folder:
                self._name_folder()
            else:
                _name(self.parts[0], self.out, self.force)
            _sync_folder(self.out.parent)
        return self.files

    def _begin(self, target: Path, tensors: Sequence[Fact], metadata: Mapping[str, str], recipe: str) -> None:
        head, offsets = header_bytes(tensors, {**metadata, self.key: recipe})
        starts = dict(zip((name for name, _, _ in tensors), offsets, strict=True))
        descriptor, temporary = _nameless(self.out.parent, target.name)
        part = Part(target, descriptor, temporary, tensors, starts, metadata)
        self.parts.append(part)
        self._of |= dict.fromkeys(starts, part)
        size = len(head) + sum(self.base.nbytes(name) for name in starts)
        os.posix_fallocate(descriptor, 0, size)

    def _name_folder(self) -> None:
        """A new folder gets its name when it is complete; in one that exists the index goes first and comes last."""
        folder = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            for part in self.parts:
                _name(part, folder / part.target.name, force=False)
            index = self.base.located.index
            assert index is not None
            (folder / index.name).write_text(self._index(index), encoding="utf-8")
            _sync_folder(folder)
            if not self.out.exists():
                folder.rename(self.out)
                return
            (self.out / index.name).unlink(missing_ok=True)
            for file in self.files:
                os.replace(folder / file.name, file)
            _sync_folder(self.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _index(self, index: Path) -> str:
        where = {name: part.target.name for part in self.parts for name in part.starts}
        metadata = index_content(index).get("metadata")
        facts = {**(metadata if isinstance(metadata, dict) else {}), "total_size": self.nbytes}
        return json.dumps({"metadata": facts, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"

    def _discard(self) -> None:
        for part in self.parts:
            if part.descriptor >= 0:
                os.close(part.descriptor)
                part.descriptor = -1
            if part.temporary is not None:
                part.temporary.unlink(missing_ok=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            mend = "give --force" if isinstance(error, FileExistsError) else "free space or choose another folder"
            what = f"expected to write {self.out.name} into {self.out.parent}, got: {error.strerror}"
            raise OutputError(f"{what}; {mend}") from error


def _layout(base: Checkpoint, split: bool) -> list[tuple[list[Fact], dict[str, str]]]:
    """Tensors and metadata of each file. Wider dtypes come first, which aligns all tensors; else as in the base."""
    names = sorted(base.names(), key=lambda name: -base.dtype(name).itemsize)
    facts = [(name, base.dtype(name), base.shape(name)) for name in names]
    if split:
        files = base.located.files
        return [([fact for fact in facts if base.homes[fact[0]] == file], dict(base.metadata[file])) for file in files]
    merged = {key: value for metadata in base.metadata.values() for key, value in metadata.items()}
    return [(facts, merged or {"format": "pt"})]


def _nameless(folder: Path, name: str) -> tuple[int, Path | None]:
    """A file to write: one without a name where the file system has those, else one with a hidden name."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), None
        except OSError:
            pass  # the file system has none, or the folder cannot be written, which the next line tells
    temporary = folder / f".{name}.{secrets.token_hex(4)}"
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), temporary


def _name(part: Part, target: Path, force: bool) -> None:
    if part.temporary is None:
        # A link cannot replace a file, a rename can.
        first = target.parent / f".{target.name}.{secrets.token_hex(4)}" if force else target
        folder = os.open(target.parent, os.O_RDONLY)
        try:  # with a folder's descriptor Python calls linkat, which follows the link below /proc to the file
            os.link(f"/proc/self/fd/{part.descriptor}", first, src_dir_fd=folder)
        finally:
            os.close(folder)
        if not force:
            return
        part.temporary = first
    elif not force and target.exists():
        raise FileExistsError(17, "the file exists")
    os.replace(part.temporary, target)
    part.temporary = None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
