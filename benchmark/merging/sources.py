"""What base and experts are read from: whole tensors, or runs of elements into buffers that every thread has once."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor

BLOCK = 1 << 17  # elements: half a megabyte of each float32 model, so that a handful of models stay near the processor
GLANCE = 1 << 10  # elements


class TensorSource(Protocol):
    """Named tensors that are read one at a time, or one run of elements at a time. Reading is safe from several threads."""

    @property
    def label(self) -> str:
        """What errors call it."""
        ...

    def names(self) -> Sequence[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor."""
        ...

    def borrow(self, name: str) -> Tensor:
        """The tensor, which is overwritten when the same thread borrows the next, of whatever source."""
        ...

    def read_into(self, name: str, start: int, into: Tensor) -> None:
        """Fill `into`, (N,) of the tensor's dtype, with its elements from `start` on."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A state dict as a source."""

    tensors: Mapping[str, Tensor]
    label: str = "a state dict"

    def names(self) -> Sequence[str]:
        """All names."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self.tensors[name]

    def borrow(self, name: str) -> Tensor:
        """The tensor, which nothing overwrites."""
        return self.read(name)

    def read_into(self, name: str, start: int, into: Tensor) -> None:
        """Fill `into`, (N,) of the tensor's dtype, with its elements from `start` on."""
        into.copy_(self.tensors[name].reshape(-1)[start : start + len(into)])


class InTurn(Sequence[Tensor]):
    """Tensors that are read when they are asked for, each time anew; one may be overwritten when the next is."""

    def __init__(self, readers: Sequence[Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __len__(self) -> int:
        return len(self._readers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> InTurn: ...

    def __getitem__(self, index: int | slice) -> Tensor | InTurn:
        return InTurn(self._readers[index]) if isinstance(index, slice) else self._readers[index]()


class Blocks:
    """Reads runs of elements. What it returns is overwritten by the same thread's next call."""

    def __init__(self, sources: Sequence[TensorSource], elements: int = BLOCK) -> None:
        self.sources = sources
        self.elements = elements
        self._local = threading.local()

    def starts(self, total: int) -> Iterator[int]:
        """Where the runs of a tensor with that many elements begin."""
        return iter(range(0, total, self.elements))

    def read(self, name: str, start: int, total: int, sources: int | None = None) -> list[Tensor]:
        """(N,) of the first sources, or of all, in the stored dtype, from `start` to the end of the run or of the tensor."""
        runs = []
        for position, source in enumerate(self.sources[:sources]):
            runs.append(self._buffer(position, source.dtype(name))[: total - start])
            source.read_into(name, start, runs[-1])
        return runs

    def is_changed(self, name: str, total: int) -> bool:
        """Whether any other source differs from the first; a glance at the first elements nearly always tells."""
        runs = itertools.chain([(0, min(total, GLANCE))], ((start, total) for start in self.starts(total)))
        found = (self.read(name, start, stop) for start, stop in runs)
        return any(not all(torch.equal(base, expert) for expert in experts) for base, *experts in found)

    def _buffer(self, position: int, dtype: torch.dtype) -> Tensor:
        buffers: dict[str, Tensor] = vars(self._local)
        key = f"{position} {dtype}"
        if key not in buffers:
            buffers[key] = torch.empty(self.elements, dtype=dtype)
        return buffers[key]


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor of that shape."""
    elements = 1
    for side in shape:
        elements *= side
    return elements


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is. The sum is finite if all are; it may also overflow: only then each is looked at."""
    if tensor.dtype.itemsize == 1:  # torch neither adds nor tests them
        tensor = tensor.float()
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of tensors of one shape, without a stack of them."""
    remaining = iter(tensors)
    total = next(remaining).clone()
    for tensor in remaining:
        total += tensor
    return total.div_(len(tensors))
