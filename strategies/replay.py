"""Rehearsal buffers over raw inputs: reservoir, balanced over annotated groups, and binned by loss.

All of them live on the CPU, in memory that is allocated once; what comes in from another device is copied. They draw from the
generator of the call (a CPU generator) and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies.selection import loss_bins, lower_fullest, reservoir_slots, within_quota
from shiftproof.strategies.storage import Array, Buffer, Memory, as_array

__all__ = ["GroupBalancedBuffer", "LossBinnedBuffer", "Memory", "ReservoirBuffer"]


class ReservoirBuffer(Buffer):
    """A uniform sample of everything offered so far: algorithm R (Vitter, ACM TOMS 11(1), 1985)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._seen = 0

    def add(
        self, x: Tensor, y: Tensor, task: Tensor, generator: torch.Generator, extras: Mapping[str, Tensor] | None = None
    ) -> None:
        """Offer a batch; the outcome is that of offering its samples one after another.

        Args:
            x: (B, ...) inputs of any dtype.
            y: (B,) int64.
            task: (B,) int64.
            generator: Decides who stays.
            extras: (B, ...) tensors to store beside them, of the same names and widths in every call.

        Raises:
            InputError: If lengths differ, or names or shapes differ from those of earlier calls.
        """
        rows = self._rows(x, y, task, extras)
        draws = torch.rand(len(y), dtype=torch.float64, generator=generator).numpy()
        slots = reservoir_slots(self._seen, self.capacity, draws)
        positions = np.flatnonzero(slots >= 0)
        if len(positions):
            self._write(slots[positions], rows, positions)
        self._seen += len(y)
        self._size = min(self._seen, self.capacity)

    def _counters(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def _restore(self, counters: Mapping[str, Any]) -> None:
        self._seen = counters["seen"]


class GroupBalancedBuffer(Buffer):
    """Balanced over (class, group) cells, greedily (Prabhu et al., ECCV 2020; with groups: Lee et al., ICLR workshop 2024).

    A sample is taken while its cell holds fewer than capacity // cells, counting the cells met so far; where the buffer is
    full, it takes the place of a random sample of the largest cell (the lowest id of equals). Nothing is replaced within a
    cell, so offer each sample once.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._count = np.zeros(0, np.int64)  # samples stored of each cell; a cell once seen never gets empty

    def add(
        self,
        x: Tensor,
        y: Tensor,
        task: Tensor,
        cell: Tensor,
        generator: torch.Generator,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Offer a batch; the outcome is that of offering its samples one after another.

        Args:
            x: (B, ...) inputs of any dtype.
            y: (B,) int64.
            task: (B,) int64.
            cell: (B,) int64 from 0, what to balance over; make it unique over tasks to balance over tasks, too.
            generator: Decides who is evicted.
            extras: As in `ReservoirBuffer.add`.

        Raises:
            InputError: If there are more cells than slots, an id is negative, or as in `ReservoirBuffer.add`.
        """
        rows = self._rows(x, y, task, extras, cell=cell)
        cells = rows["_cell"] = as_array(cell)
        if cells.min() < 0:
            raise InputError(f"expected cell ids from 0, got {cells.min()}")
        if cells.max() >= len(self._count):
            self._count = np.pad(self._count, (0, int(cells.max()) + 1 - len(self._count)))
        for piece in self._pieces(cells):
            self._add_piece(rows, piece, generator)

    def _pieces(self, cells: Array) -> list[Array]:
        """Positions of the batch, cut where a new cell arrives: it lowers the cap for what follows."""
        everything = np.arange(len(cells))
        if (self._count[cells] > 0).all():
            return [everything]
        present, first = np.unique(cells, return_index=True)
        newcomers = np.sort(first[self._count[present] == 0])
        return [piece for piece in np.split(everything, newcomers) if len(piece)]

    def _add_piece(self, rows: Mapping[str, Array], piece: Array, generator: torch.Generator) -> None:
        cells = rows["_cell"][piece]
        number = np.count_nonzero(self._count) + int(self._count[cells[0]] == 0)
        if number > self.capacity:
            raise InputError(f"expected a capacity of at least one slot a cell, got {self.capacity} for {number} cells")
        room = self.capacity // number - self._count
        if (room[cells] <= 0).all():
            return
        taken = piece[within_quota(cells, room, np.arange(len(cells)))]
        free = np.arange(self._size, self.capacity)
        if len(taken) > len(free):
            keep = lower_fullest(self._count, self.capacity - len(taken))
            stays = within_quota(self._own("_cell"), keep, torch.randperm(self._size, generator=generator).numpy())
            free, self._count = np.concatenate([np.flatnonzero(~stays), free]), keep
        self._write(free[: len(taken)], rows, taken)
        self._count = self._count + np.bincount(rows["_cell"][taken], minlength=len(self._count))
        self._size = int(self._count.sum())

    def _restore(self, counters: Mapping[str, Any]) -> None:
        self._count = np.bincount(self._own("_cell"))


class LossBinnedBuffer(Buffer):
    """The buffer of Learning without Shortcuts (thesis 5.3.2): as many samples of high loss as of low loss, for each task.

    `mode="population"` is the text. Call `populate` once per task, after the warm-up: budget capacity // t for task t, an
    equal share for each of `bins` equal intervals of [L_min, L_max]. Which samples fill a bin is not said; here it is a
    random choice without duplicates. How older tasks make room is not said either; here each is cut down to capacity // t,
    a random sample of its fullest bin at a time.

    `mode="running"` is the released code. Call `offer` at every step and `end_task` after a task: bins over the range seen
    so far in the task, widened by each batch before it is binned; (capacity // bins) // t insertions a bin, in order of
    arrival, the same sample as often as it comes; slots are filled first, then overwritten at random over the whole buffer,
    whatever the task.

    Args:
        capacity: Slots.
        bins: Intervals of the loss; 1 is a random sample that is balanced over tasks.
        mode: Text or released code.
        redistribute: In population mode, hand slots that a bin has no samples for to the others; the text leaves them empty.
    """

    def __init__(
        self, capacity: int, bins: int = 4, mode: Literal["population", "running"] = "population", redistribute: bool = False
    ) -> None:
        super().__init__(capacity)
        if bins < 1 or mode not in ("population", "running"):
            raise InputError(f"expected bins of at least 1 and mode 'population' or 'running', got {bins} and {mode!r}")
        self.bins = bins
        self.mode = mode
        self.redistribute = redistribute
        self._tasks = 0  # tasks that are done with
        self._inserted = 0  # the rest is for the running mode: insertions ever, and of this task range and bins
        self._range = (np.inf, -np.inf)
        self._filled = np.zeros(bins, np.int64)

    def populate(
        self,
        x: Tensor,
        y: Tensor,
        task: Tensor,
        losses: Tensor,
        generator: torch.Generator,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Cut older tasks and take the samples of a new one.

        Args:
            x: (N, ...) inputs of any dtype, the whole training set of the task.
            y: (N,) int64.
            task: (N,) int64, stored; the budget counts calls, because tasks may share an id.
            losses: (N,) target losses after the warm-up, any scale.
            generator: Decides who is taken and who is evicted.
            extras: As in `ReservoirBuffer.add`.

        Raises:
            InputError: If a loss is not finite, a bin's share is below 1, the mode is another, or as in `ReservoirBuffer.add`.
        """
        rows, values, share = self._admit("population", x, y, task, losses, extras)
        if share < 1:
            wanted = (self._tasks + 1) * self.bins
            raise InputError(f"expected a capacity of at least tasks x bins = {wanted}, got {self.capacity}")
        budget = self.capacity // (self._tasks + 1)
        bins = loss_bins(values, float(values.min()), float(values.max()), self.bins)
        available = np.bincount(bins, minlength=self.bins)
        quota = lower_fullest(available, budget) if self.redistribute else np.minimum(available, share)
        chosen = np.flatnonzero(within_quota(bins, quota, torch.randperm(len(y), generator=generator).numpy()))
        self._shrink(budget, generator)
        rows.update(_bin=bins, _origin=np.full_like(bins, self._tasks))
        self._write(np.arange(self._size, self._size + len(chosen)), rows, chosen)
        self._size += len(chosen)
        self._tasks += 1

    def offer(
        self,
        x: Tensor,
        y: Tensor,
        task: Tensor,
        losses: Tensor,
        generator: torch.Generator,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Offer a batch of the current task. With more tasks x bins than slots nothing is inserted, as released.

        Args:
            x: (B, ...) inputs of any dtype.
            y: (B,) int64.
            task: (B,) int64.
            losses: (B,) target losses as recorded; the released code has 0 here until its loss pass.
            generator: Decides who is overwritten.
            extras: As in `ReservoirBuffer.add`.

        Raises:
            InputError: If a loss is not finite, the mode is another, or as in `ReservoirBuffer.add`.
        """
        rows, values, share = self._admit("running", x, y, task, losses, extras)
        low, high = self._range
        self._range = low, high = min(low, float(values.min())), max(high, float(values.max()))
        bins = loss_bins(values, low, high, self.bins)
        room = share - self._filled
        if (room[bins] <= 0).all():
            return
        taken = np.flatnonzero(within_quota(bins, room, np.arange(len(bins))))
        appended = np.arange(self._inserted, max(self._inserted, min(self._inserted + len(taken), self.capacity)))
        drawn = torch.randint(self.capacity, (len(taken) - len(appended),), generator=generator).numpy()
        rows.update(_bin=bins, _origin=np.full_like(bins, self._tasks))
        self._write(np.concatenate([appended, drawn]), rows, taken)
        self._filled = self._filled + np.bincount(bins[taken], minlength=self.bins)
        self._inserted += len(taken)
        self._size = min(self._inserted, self.capacity)

    def end_task(self) -> None:
        """Close the current task of the running mode: counters and range start anew."""
        if self.mode != "running":
            raise InputError("expected mode 'running', got 'population', where `populate` closes the task")
        self._tasks += 1
        self._range = (np.inf, -np.inf)
        self._filled = np.zeros(self.bins, np.int64)

    def composition(self) -> Tensor:
        """(t, bins) int64, how many samples are stored of each task, in the order of arrival, and bin."""
        cells = self._own("_origin") * self.bins + self._own("_bin")
        tasks = max(self._tasks, int(self._own("_origin").max(initial=-1)) + 1)
        return torch.from_numpy(np.bincount(cells, minlength=tasks * self.bins).reshape(tasks, self.bins))

    def _admit(
        self, mode: str, x: Tensor, y: Tensor, task: Tensor, losses: Tensor, extras: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Array], Array, int]:
        """The batch as arrays, its losses as float64, and how many samples of a task a bin may hold."""
        if self.mode != mode:
            raise InputError(f"expected a buffer of mode {mode!r} for this call, got one of {self.mode!r}")
        rows = self._rows(x, y, task, extras, losses=losses)
        values = as_array(losses).astype(np.float64)
        if not np.isfinite(values).all():
            raise InputError("expected finite losses, got NaN or infinity: the model diverged before its buffer was filled")
        return rows, values, self.capacity // (self._tasks + 1) // self.bins  # the same as capacity // bins // tasks

    def _shrink(self, budget: int, generator: torch.Generator) -> None:
        if self._size == 0:
            return
        keep = np.stack([lower_fullest(row, budget) for row in self.composition().numpy()]).ravel()
        cells = self._own("_origin") * self.bins + self._own("_bin")
        stays = np.flatnonzero(within_quota(cells, keep, torch.randperm(self._size, generator=generator).numpy()))
        for column in self._columns.values():
            column.numpy()[: len(stays)] = column.numpy()[stays]
        self._size = len(stays)

    def _counters(self) -> dict[str, Any]:
        low, high = self._range
        return {"tasks": self._tasks, "inserted": self._inserted, "low": low, "high": high, "filled": self._filled.tolist()}

    def _restore(self, counters: Mapping[str, Any]) -> None:
        self._tasks, self._inserted = counters["tasks"], counters["inserted"]
        self._range = (counters["low"], counters["high"])
        self._filled = np.array(counters["filled"], np.int64)
