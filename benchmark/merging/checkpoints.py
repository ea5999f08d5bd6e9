"""Checkpoints on disk as sources of a merge, and what is refused before a merge begins."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.inputs import Located, weight_map
from shiftproof.benchmark.merging.pytorch_files import read_pytorch
from shiftproof.benchmark.merging.safetensors_files import Entry, pread_full, read_header
from shiftproof.benchmark.merging.sources import BLOCK, count

NAMED = 3  # tensors that an error names at most
LENT = 1 << 24  # bytes of a tensor that is lent at most; a larger one gets memory of its own, which is soon given back
_lent = threading.local()  # has `bytes` where a thread has borrowed


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors that are read from open files one at a time, or one run of elements at a time; safe from several threads.

    Attributes:
        located: Where it lies.
        entries: Where each tensor lies in its file, in the order of files and bytes.
        homes: The file that each tensor lies in.
        descriptors: Of the open files.
        metadata: Of each safetensors file.
        loaded: Tensors of a file whose format does not let them be read one at a time.
        wrapper: The keys under which the tensors were found in a PyTorch file.
        skipped: What was passed over in it, name to reason.
    """

    located: Located
    entries: Mapping[str, Entry]
    homes: Mapping[str, Path]
    descriptors: Mapping[Path, int]
    metadata: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)
    loaded: Mapping[str, Tensor] = field(default_factory=dict)
    wrapper: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.located.label

    def names(self) -> Sequence[str]:
        """All names."""
        return [*self.entries, *self.loaded]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entries[name].shape if name in self.entries else tuple(self.loaded[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.entries[name].dtype if name in self.entries else self.loaded[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return count(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if name in self.loaded:
            return self.loaded[name]
        entry = self.entries[name]
        if entry.strides is None:
            flat = torch.empty(entry.elements, dtype=entry.dtype)
            self._fill(name, entry.offset, flat)
            return flat.view(entry.shape)
        steps = zip(entry.shape, entry.strides, strict=True)
        flat = torch.empty(1 + sum((side - 1) * stride for side, stride in steps), dtype=entry.dtype)
        self._fill(name, entry.offset, flat)
        return flat.as_strided(entry.shape, entry.strides).contiguous()

    def borrow(self, name: str) -> Tensor:
        """The tensor, which is overwritten when the same thread borrows the next, of whatever checkpoint."""
        entry = self.entries.get(name)
        if entry is None or entry.strides is not None or not 0 < self.nbytes(name) <= LENT:
            return self.read(name)
        if not hasattr(_lent, "bytes"):
            _lent.bytes = torch.empty(LENT, dtype=torch.uint8)
        flat: Tensor = _lent.bytes[: self.nbytes(name)].view(entry.dtype)
        self._fill(name, entry.offset, flat)
        return flat.view(entry.shape)

    def read_into(self, name: str, start: int, into: Tensor) -> None:
        """Fill `into`, (N,) of the tensor's dtype, with its elements from `start` on."""
        entry = self.entries.get(name)
        if entry is None or entry.strides is not None:
            into.copy_(self.read(name).reshape(-1)[start : start + len(into)])
        else:
            self._fill(name, entry.offset + start * entry.dtype.itemsize, into)

    def _fill(self, name: str, offset: int, flat: Tensor) -> None:
        try:
            pread_full(self.descriptors[self.homes[name]], flat.view(torch.uint8).numpy().data, offset)
        except (OSError, EOFError) as error:
            raise InputError(f"expected to read {name!r} from {self.label}, got: {error}; was the file changed?") from error


@contextmanager
def opened(locations: Sequence[Located]) -> Iterator[list[Checkpoint]]:
    """Open checkpoints; their files stay open as long as the context.

    Raises:
        InputError: If one of them is damaged or would execute code.
    """
    with ExitStack() as stack:
        yield [_open(located, stack) for located in locations]


def _open(located: Located, stack: ExitStack) -> Checkpoint:
    descriptors = {file: _descriptor(file, stack) for file in located.files}
    if located.is_pytorch:
        (file,) = located.files
        found = read_pytorch(file)
        homes = dict.fromkeys(found.entries, file)
        return Checkpoint(located, found.entries, homes, descriptors, {}, found.loaded, found.wrapper, found.skipped)
    headers = {file: read_header(file) for file in located.files}
    if located.index:
        _check_shards(located.index, {file.name: entries for file, (entries, _) in headers.items()})
    return Checkpoint(
        located,
        {name: entry for entries, _ in headers.values() for name, entry in entries.items()},
        {name: file for file, (entries, _) in headers.items() for name in entries},
        descriptors,
        {file: metadata for file, (_, metadata) in headers.items()},
    )


def _descriptor(file: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"expected to read {file}, got: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _check_shards(index: Path, held: Mapping[str, Mapping[str, Entry]]) -> None:
    told = weight_map(index)
    for shard, entries in held.items():
        if odd := sorted(set(entries) ^ {name for name, file in told.items() if file == shard}):
            raise InputError(f"{index}: expected it to tell what lies in {shard}, got another file for {_some(odd)}")


def check_alike(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Refuse experts that are no fine-tuned copies of the base.

    Raises:
        InputError: For fewer than two of them, one file given twice, other names, shapes or dtypes, an expert that is the
            base, or no floating-point numbers at all.
    """
    if len(experts) < 2:
        raise InputError(f"expected two experts or more, got {len(experts)}; give --expert once for each")
    if not any(base.dtype(name).is_floating_point and count(base.shape(name)) for name in base.names()):
        raise InputError(f"{base.label}: expected floating-point tensors, got none; counters and empty tensors are not merged")
    _check_twice(experts)
    for expert in experts:
        _check_names(base, expert)
        for what in ("shape", "dtype"):
            pairs = {name: (getattr(base, what)(name), getattr(expert, what)(name)) for name in base.names()}
            odd = [f"{name!r} {_text(theirs)} for {_text(ours)}" for name, (ours, theirs) in pairs.items() if ours != theirs]
            if odd:
                raise InputError(f"{expert.label}: expected every {what} as in {base.label}, got {_some(odd)}")
    for expert in experts:
        if not differs(base, expert):
            raise InputError(
                f"{expert.label}: expected an expert that differs from {base.label}, got the same weights: "
                "its delta is zero everywhere; leave it out"
            )


def _check_twice(experts: Sequence[Checkpoint]) -> None:
    """One file given twice is a slip; two files may well hold the same."""
    known: dict[tuple[Path, ...], str] = {}
    for expert in experts:
        files = tuple(file.resolve() for file in expert.located.files)
        if files in known:
            again = "twice" if known[files] == expert.label else f"and {known[files]}, which are one file"
            raise InputError(f"expected every expert once, got {expert.label} {again}; leave one out")
        known[files] = expert.label


def _check_names(base: Checkpoint, expert: Checkpoint) -> None:
    ours, theirs = set(base.names()), set(expert.names())
    if ours != theirs:
        sides = {"without": ours - theirs, "with": theirs - ours}
        told = " and ".join(f"{which} {_some([*map(repr, sorted(names))])}" for which, names in sides.items() if names)
        raise InputError(f"{expert.label}: expected the tensors of {base.label}, got those {told}")


def differs(base: Checkpoint, expert: Checkpoint) -> bool:
    """Whether any floating-point tensor of an expert is not the base's; reads no further than to the first difference."""
    buffers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for name in base.names():
        dtype, elements = base.dtype(name), count(base.shape(name))
        if not dtype.is_floating_point:
            continue
        pair = buffers.setdefault(dtype, (torch.empty(BLOCK, dtype=dtype), torch.empty(BLOCK, dtype=dtype)))
        for start in range(0, elements, BLOCK):
            ours, theirs = (buffer[: elements - start] for buffer in pair)
            base.read_into(name, start, ours)
            expert.read_into(name, start, theirs)
            if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                return True
    return False


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")


def _some(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
