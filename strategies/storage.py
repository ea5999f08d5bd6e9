"""Slots for samples over raw inputs: what rehearsal buffers have in common, whoever they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shiftproof.benchmark.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Memory:
    """Samples out of a buffer, on the CPU.

    Attributes:
        x: (n, ...) inputs as they were stored.
        y: (n,) int64.
        task: (n,) int64.
        index: (n,) int64, slot of the buffer.
        extras: (n, ...) what else was stored with each sample, by name.
    """

    x: Tensor
    y: Tensor
    task: Tensor
    index: Tensor
    extras: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.y)


class Buffer:
    """What every buffer has: slots, of which 0 to `len(self) - 1` are in use, and one column of them a field."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"expected a buffer capacity of at least 1, got {capacity}")
        self.capacity = capacity
        self._size = 0
        self._columns: dict[str, Tensor] = {}  # each (capacity, ...); names with '_' are the buffer's own
        self._shapes: dict[str, tuple[int, ...]] = {}  # of one row, of what is not the buffer's own

    def __len__(self) -> int:
        return self._size

    def sample(self, n: int, generator: torch.Generator) -> Memory:
        """`n` samples drawn uniformly without replacement; all of them, in random order, where fewer are stored.

        Raises:
            InputError: If the buffer is empty or n is below 1.
        """
        if self._size == 0 or n < 1:
            raise InputError(f"expected a buffer with samples and at least 1 to draw, got {self._size} and {n}")
        return self._read(torch.randperm(self._size, generator=generator)[:n])

    def contents(self) -> Memory:
        """Everything, in the order of the slots.

        Raises:
            InputError: If the buffer is empty.
        """
        if self._size == 0:
            raise InputError("expected a buffer with samples, got an empty one")
        return self._read(torch.arange(self._size))

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of the slots in use and of the counters."""
        columns = {name: column[: self._size].clone() for name, column in self._columns.items()}
        return {"capacity": self.capacity, "columns": columns, "counters": self._counters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a snapshot.

        Raises:
            InputError: If it comes from a buffer of another capacity.
        """
        if state["capacity"] != self.capacity:
            raise InputError(f"expected the state of a buffer of capacity {self.capacity}, got one of {state['capacity']}")
        self._columns, self._shapes, self._size = {}, {}, 0
        for name, stored in state["columns"].items():
            self._size = len(stored)
            self._allocate(name, stored)
            self._columns[name][: self._size] = stored
        self._restore(state["counters"])

    def _counters(self) -> dict[str, Any]:
        return {}

    def _restore(self, counters: Mapping[str, Any]) -> None:
        """Set the counters from what `_counters` gave and from the columns."""

    def _read(self, index: Tensor) -> Memory:
        rows = {name: column.index_select(0, index) for name, column in self._columns.items() if name[0] != "_"}
        return Memory(rows.pop("x"), rows.pop("y"), rows.pop("task"), index, rows)

    def _rows(self, x: Tensor, y: Tensor, task: Tensor, extras: Mapping[str, Tensor] | None, **own: Tensor) -> dict[str, Array]:
        """The batch as arrays, checked against what is stored already."""
        rows = {"x": x, "y": y, "task": task, **(extras or {})}
        if len(rows) < 3 + len(extras or {}) or any(name[:1] in ("", "_") for name in rows):
            raise InputError(f"expected names of extras other than x, y, task and '_...', got {sorted(extras or {})}")
        if len(y) == 0 or any(len(row) != len(y) for row in (*rows.values(), *own.values())):
            sizes = {name: tuple(row.shape) for name, row in {**rows, **own}.items()}
            raise InputError(f"expected as many rows everywhere, and at least one, got {sizes}")
        arrays = {name: as_array(row) for name, row in rows.items()}
        shapes = {name: row.shape[1:] for name, row in arrays.items()}
        if self._shapes and shapes != self._shapes:
            raise InputError(f"expected rows of the names and shapes stored already, {self._shapes}, got {shapes}")
        return arrays

    def _write(self, slots: Array, rows: Mapping[str, Array], positions: Array) -> None:
        """Put `rows[positions]` into `slots`. Where a slot occurs twice, the later row stays, as numpy promises."""
        for name, row in rows.items():
            if name not in self._columns:
                self._allocate(name, torch.from_numpy(row[:0]))
            self._columns[name].numpy()[slots] = row[positions]

    def _allocate(self, name: str, like: Tensor) -> None:
        self._columns[name] = like.new_zeros((self.capacity, *like.shape[1:]), device="cpu")
        if name[0] != "_":
            self._shapes[name] = tuple(like.shape[1:])

    def _own(self, name: str) -> Array:
        """A column of the buffer's own, slots in use only; empty before the first sample."""
        return self._columns[name][: self._size].numpy() if name in self._columns else np.zeros(0, np.int64)


def as_array(tensor: Tensor) -> Array:
    """The values on the CPU, sharing memory where they can; bfloat16 becomes float32, because numpy has none."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
