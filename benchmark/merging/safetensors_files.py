"""The safetensors format: 8 bytes with the length of the header, the header in JSON, then the tensors' bytes.

Read by hand rather than through the library, which maps files into memory: mapped pages count as this process's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.sources import count

PREFIX = 8  # bytes with the length of the header, little-endian
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format's own library

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Fact = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        offset: Of its first byte in the file.
        strides: In elements; None where its elements follow each other in order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return count(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.elements * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors in the order of their bytes, and the metadata.

    Raises:
        InputError: If the file is truncated, damaged, or holds a dtype that torch does not have.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(PREFIX)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < PREFIX or length > min(size - PREFIX, LONGEST_HEADER):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):  # the latter for brackets within brackets
            raise _damaged(path, "a header that is no JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "a header that is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "metadata that are not texts")
    return _entries(path, header, PREFIX + length, size), metadata


def _entries(path: Path, header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The tensors' bytes must follow each other without gap from the header to the end of the file."""
    found, end = {}, start
    try:
        facts = [_facts(name, **item) for name, item in header.items()]
        facts.sort(key=lambda fact: (fact[3], fact[4]))
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, "a header without dtype, shape and offsets of every tensor") from None
    for name, dtype, shape, first, last in facts:
        if dtype not in DTYPES:
            raise InputError(f"{path}: expected a dtype out of {', '.join(DTYPES)} for {name!r}, got {dtype!r}")
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
            raise _damaged(path, f"{name!r} with shape {shape} at {first} to {last}")
        found[name] = Entry(DTYPES[dtype], shape, start + first)
        if start + first != end or last - first != found[name].nbytes:
            raise _damaged(path, f"{name!r} of {found[name].nbytes} bytes at {first} to {last}")
        end = start + last
    if end != size:
        raise _damaged(path, f"{size} bytes where the header tells of {end}")
    return found


def _facts(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, str, tuple[int, ...], int, int]:
    first, last = data_offsets
    return name, dtype, tuple(shape), first, last


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: expected a complete safetensors file, got {what}; copy or download it again")


def header_bytes(entries: Sequence[Fact], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The header for tensors in this order, its length included, and where each tensor begins in the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = [], 0
    for name, dtype, shape in entries:
        starts.append(end)
        end += count(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned for every dtype
    head = len(text).to_bytes(PREFIX, "little") + text
    return head, [len(head) + start for start in starts]


def pread_full(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from a file. Raises EOFError where the file is shorter."""
    while buffer.nbytes:
        got = os.preadv(descriptor, [buffer], offset)
        if got == 0:
            raise EOFError("the file ends early")
        buffer, offset = buffer[got:], offset + got


def pwrite_full(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write all of the buffer into a file. Raises OSError where the disk is full."""
    while buffer.nbytes:
        put = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[put:], offset + put
