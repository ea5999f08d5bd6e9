"""Carries out a merge: which rule holds for each tensor, passes, threads, and a row a tensor that says what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.merging.method import MergeMethod
from shiftproof.benchmark.merging.pool import mapped, one_thread_each
from shiftproof.benchmark.merging.sources import BLOCK, Blocks, InMemory, InTurn, TensorSource, count, is_finite, mean as mean

Rule = Literal["spectral", "elementwise", "average", "copied", "unchanged"]
STATISTICS = ("running_mean", "running_var")  # of normalization layers; a sum of their differences can turn negative
SAME = "no expert differs from the base"
RUN = 1 << 20  # elements that `scan` is handed at a time: each call has a cost of its own, such as a histogram
OVERFLOW = "without overflow"  # how torch tells that a number of Python's does not fit a dtype
IN_FLIGHT = 256 * 2**20  # bytes that all threads share, however many, unless one tensor alone takes more


@dataclass(frozen=True)
class TensorRow:
    """What was done with a tensor.

    Attributes:
        rule: How it was merged; "unchanged" where no expert differs from the base.
        why: Why a tensor was not left to the method; empty if it was.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    why: str = ""


@dataclass(frozen=True)
class Merging:
    """A merge that is about to be carried out.

    A method with `blockwise = True` promises that an element of its merge depends on nothing but that element of base and
    experts (and on the facts), and that `combine` may be given a partial for each run of a tensor: where the merge is written
    in parts, `scan` and `merge` are handed runs of elements, (N,). What it merges by singular vectors stays whole. One with
    `streams = True` promises to need no more of `experts` than its length and an iteration, and of each nothing after the next
    has come: each is read when its turn comes, and may take the place of the one before. One with `is_ready(facts)` is asked
    after its rounds whether these facts will do; until they do, more passes follow.

    Attributes:
        base: Before fine-tuning.
        experts: After it, with the names and shapes of the base.
        is_shared: False for names that are private to an expert: they stay the base's.
        dtype: What the method computes in; None = float64 for float64 tensors and float32 for every other.
        device: Where it computes.
        jobs: Threads, each with one tensor at a time, the largest first.
    """

    method: MergeMethod
    base: TensorSource
    experts: Sequence[TensorSource]
    is_shared: Callable[[str], bool] = lambda name: True
    dtype: torch.dtype | None = None
    device: str = "cpu"
    jobs: int = 1

    def rule(self, name: str) -> tuple[Rule, str]:
        """What holds for a tensor before it is read, and why where it is not left to the method."""
        dtype = self.base.dtype(name)
        if not self.is_shared(name):
            return "copied", "private"
        if not dtype.is_floating_point:
            return "copied", "complex" if dtype.is_complex else "integer"
        if name.rpartition(".")[2] in STATISTICS:
            return "average", "running statistics"
        return self.method.path(name, self.base.shape(name)), ""

    def run(
        self,
        write: Callable[[str, Tensor], None],
        progress: Callable[[str], None] = lambda name: None,
        write_part: Callable[[str, int, Tensor], None] | None = None,
    ) -> list[TensorRow]:
        """Merge every tensor and hand it to `write`, in any order and from several threads.

        Args:
            write: Takes the merged tensor in the base's dtype.
            progress: Told after each tensor of each pass.
            write_part: Takes the merged elements, (N,), from a position on; they are overwritten later. Without it every
                tensor is merged as a whole.

        Raises:
            InputError: If a merged tensor is not finite, or a tensor of an expert is not.
        """
        names = sorted(self.base.names(), key=lambda name: -count(self.base.shape(name)))
        own = [name for name in names if not self.rule(name)[1]]
        blocks = Blocks((self.base, *self.experts), self.run_of_merge) if write_part else None
        facts: Any = None

        def finish(name: str) -> TensorRow:
            if blocks and write_part and self.in_blocks(name):
                row = self._merge_blocks(name, facts, blocks, write_part)
            else:
                merged, row = self._merge(name, facts)
                write(name, merged)
            progress(name)
            return row

        with one_thread_each(self.jobs):
            position = 0
            while position < self.method.rounds or not self._is_ready(facts):
                found = self._scan(own, facts, position == 0, blocks is not None, progress)
                facts = self.method.combine(found, facts)
                position += 1
            held = (lambda name: self.held(name, self.run_of_merge)) if blocks else self.held
            rows = {row.name: row for row in mapped(finish, names, held, self.jobs, IN_FLIGHT)}
        return [rows[name] for name in self.base.names()]

    def _scan(
        self, names: Sequence[str], facts: Any, is_first: bool, in_runs: bool, progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """What one pass finds, by name of the tensor, and where a tensor is scanned in runs by name and start of the run."""
        totals = {name: count(self.base.shape(name)) for name in names}
        steps = {name: RUN if in_runs and self.in_blocks(name) else max(1, total) for name, total in totals.items()}
        items = [(name, start) for name, total in totals.items() for start in range(0, max(1, total), steps[name])]
        runs = Blocks((self.base, *self.experts), RUN)

        def scan(item: tuple[str, int]) -> Any:
            name, start = item
            is_run = in_runs and self.in_blocks(name)
            stored = runs.read(name, start, totals[name]) if is_run else None
            base, experts = self._run(name, is_first, stored) if stored else self._whole(name, is_first)
            found = self.method.scan(name, base, experts, facts)
            if start == 0:
                progress(name)
            return found

        found = mapped(scan, items, lambda item: self.held(item[0], steps[item[0]]), self.jobs, IN_FLIGHT)
        partials = dict(zip(items, found, strict=True))
        return {f"{name}[{start}:]" if start else name: partials[name, start] for name, start in sorted(partials)}

    @property
    def run_of_merge(self) -> int:
        """Elements that are merged at a time where a method allows it; an accelerator wants more than a processor's cache."""
        return BLOCK if self.device == "cpu" else RUN

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor may be merged one run of elements after the other."""
        rule, why = self.rule(name)
        return bool(why) or (rule != "spectral" and bool(getattr(self.method, "blockwise", False)))

    def held(self, name: str, run: int | None = None) -> int:
        """Bytes while a tensor is merged, `run` elements at a time where it may be; half as much again for singular vectors."""
        elements = count(self.base.shape(name))
        each = min(elements, run) if run and self.in_blocks(name) else elements
        held = self._dtype(name).itemsize * each * (2 + len(self.experts))
        return held * 3 // 2 if self.rule(name)[0] == "spectral" else held

    def _is_ready(self, facts: Any) -> bool:
        return not self.method.rounds or bool(getattr(self.method, "is_ready", lambda facts: True)(facts))

    def _is_new(self, name: str) -> bool:
        """Whether no pass before the merge goes over a tensor."""
        return not self.method.rounds or bool(self.rule(name)[1])

    def _dtype(self, name: str) -> torch.dtype:
        return self.dtype or (torch.float64 if self.base.dtype(name) == torch.float64 else torch.float32)

    def _whole(self, name: str, is_first: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """Base and experts of a tensor, read, on the device, and checked where this is the first pass over it."""
        base = self._computable(name, is_first, self.base, self.base.read(name))
        if getattr(self.method, "streams", False):
            return base, InTurn([partial(self._borrowed, name, is_first, source) for source in self.experts])
        return base, [self._computable(name, is_first, source, source.read(name)) for source in self.experts]

    def _borrowed(self, name: str, is_first: bool, source: TensorSource) -> Tensor:
        return self._computable(name, is_first, source, source.borrow(name))

    def _run(self, name: str, is_first: bool, stored: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of a run of elements that was read, as `_whole` gives them."""
        base, *experts = map(partial(self._computable, name, is_first), (self.base, *self.experts), stored)
        return base, experts

    def _computable(self, name: str, is_first: bool, source: TensorSource, stored: Tensor) -> Tensor:
        tensor = stored.to(self.device, self._dtype(name))
        if is_first and not is_finite(tensor):
            raise InputError(f"expected finite values, got NaN or infinity in {name!r} of {source.label}")
        return tensor

    def _merge(self, name: str, facts: Any) -> tuple[Tensor, TensorRow]:
        rule, why = self.rule(name)
        shape = self.base.shape(name)
        if rule == "copied":
            return self.base.read(name), TensorRow(name, shape, rule, why)
        base, experts = self._whole(name, self._is_new(name))
        if all(torch.equal(base, expert) for expert in experts):
            return self.base.read(name), TensorRow(name, shape, "unchanged", SAME)
        return self._merged(name, base, experts, facts), TensorRow(name, shape, rule, why)

    def _merge_blocks(self, name: str, facts: Any, blocks: Blocks, write: Callable[[str, int, Tensor], None]) -> TensorRow:
        rule, why = self.rule(name)
        shape = self.base.shape(name)
        total = count(shape)
        is_new = self._is_new(name)
        row = TensorRow(name, shape, rule, why)
        if rule != "copied" and not blocks.is_changed(name, total):
            row = TensorRow(name, shape, "unchanged", SAME)
        kept = row.rule in ("copied", "unchanged")
        for start in blocks.starts(total):
            stored = blocks.read(name, start, total, 1 if kept else None)
            write(name, start, stored[0] if kept else self._merged(name, *self._run(name, is_new, stored), facts))
        return row

    def _by_method(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        expected = f"expected a finite merge of {name!r}"
        try:
            return self.method.merge(name, base, experts, facts)
        except (RuntimeError, LinAlgError) as error:
            if OVERFLOW in str(error):
                raise InputError(f"{expected}, got a factor that {base.dtype} cannot hold; take a smaller one") from error
            if all(is_finite(expert - base) for expert in experts):
                raise
            raise InputError(f"{expected}, got an expert that is farther from the base than {base.dtype} can hold") from error

    def _merged(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """Of a tensor or a run of its elements, in the base's dtype and back from the device."""
        merged = mean(experts) if self.rule(name)[1] else self._by_method(name, base, experts, facts)
        if merged.shape != base.shape:
            raise InputError(f"expected {tuple(base.shape)} from the merge of {name!r}, got {tuple(merged.shape)}")
        dtype = self.base.dtype(name)
        stored = merged.to("cpu", dtype)
        if not is_finite(stored):
            where = f", which {dtype} cannot hold" if is_finite(merged) else ""
            raise InputError(f"expected a finite merge of {name!r}, got NaN or infinity{where}")
        return stored


def merge_states(
    method: MergeMethod, base: StateDict, experts: Sequence[StateDict], is_shared: Callable[[str], bool] = lambda name: True
) -> tuple[StateDict, list[TensorRow]]:
    """Merge state dicts that lie in memory.

    Returns:
        The merged state dict in the order of the base's, and a row a tensor.
    """
    merged: StateDict = {}
    sources = [InMemory(expert, f"expert {position}") for position, expert in enumerate(experts, 1)]
    rows = Merging(method, InMemory(base, "the base"), sources, is_shared).run(merged.__setitem__)
    return {name: merged[name] for name in base}, rows


def spectral_share(method: MergeMethod, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Share of the parameters that the method merges by their singular vectors, in [0, 1]."""
    elements: Counter[str] = Counter()
    for name, shape in shapes.items():
        elements[method.path(name, shape)] += count(shape)
    return elements["spectral"] / max(1, elements.total())
