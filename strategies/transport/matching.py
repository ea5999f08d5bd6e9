"""Weight matching: coordinate ascent over permutations, one linear assignment problem at a time.

Ainsworth et al., Git Re-Basin, ICLR 2023, arXiv:2209.04836, algorithm 1; with attention heads kept apart as in the thesis,
section 8.2.1, algorithms 1 and 2. The objective is eq. 7.5, the inner product of both models over all matched tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.alignment import STATISTICS, Alignment, Search, inner_product
from shiftproof.benchmark.transporting.method import Progress, silent
from shiftproof.benchmark.transporting.specification import PermutationSpec, Slot
from shiftproof.strategies.transport.assignment import assign, moved, picked, units
from shiftproof.strategies.transport.attention import best_heads, compose, spectral_distance

TOLERANCE = 1e-8  # of the objective's part; products in single precision do not tell less apart


@dataclass(frozen=True)
class MatchConfig:
    """How permutations are searched for."""

    heads: Literal["spectral", "brute-force", "identity"] = "spectral"  # which head goes to which; thesis table 8.4
    biases: bool = True  # biases, norms, class token and positions count; eq. 7.5 shows weights alone, the code has them
    attention_biases: bool = False  # those of queries, keys and values count; not in the released code
    include_out_proj: bool = False  # the output projection counts for heads and units; in the released code, not in eq. 8.1
    order: Literal["forward", "backward", "random"] = "forward"  # of the permutations in a sweep; random draws each anew
    order_seed: Annotated[int, Ge(0)] = 89  # released
    schedule: Literal["alternate", "released"] = "alternate"  # released: units within heads only after all heads have settled
    max_sweeps: Annotated[int, Ge(1)] = 100  # released


class Matching:
    """One search for the permutations of `source` that bring it next to `target`.

    Products are taken in single precision, or in double where the models are. Singular values are computed once, since
    permutations do not change them (thesis 8.5.1). A permutation is visited only if one that it depends on has changed since:
    otherwise its assignment problem is the one that it has solved already.
    """

    def __init__(
        self,
        source: StateDict,
        target: StateDict,
        specification: PermutationSpec,
        config: MatchConfig,
        progress: Progress = silent,
    ) -> None:
        self.source, self.target = source, target
        self.specification = specification
        self.config = config
        self.progress = progress
        self.permutations = specification.identity()
        self.matched = {name: self._matched(name) for name in specification.sizes}
        self.readers = {name: self._readers(name) for name in specification.sizes}
        self.stale = set(specification.sizes)
        self.parts = dict.fromkeys(sorted({slot.tensor for slots in self.matched.values() for slot in slots}), 0.0)
        self.touched = set(self.parts)  # tensors whose part of the objective is to be taken again
        self.orders: dict[str, Tensor] = {}  # (H,) int64 of each attention: head h comes from head order[h]
        self.is_intra = config.schedule == "alternate"
        self.seconds = dict.fromkeys(("singular values", "products", "assignments"), 0.0)
        self.visits = 0

    def run(self) -> Alignment:
        """Sweep until nothing improves."""
        generator = torch.Generator().manual_seed(self.config.order_seed)
        for name in self.specification.heads:
            self.orders[name] = self._inter_head(name)
            if self.is_intra:
                self.permutations[name] = compose(self.orders[name], self._in_place(name))
        objective, converged = [self.objective()], False
        for sweep in range(self.config.max_sweeps):
            names = self._sweep_order(generator)
            improved = {name for name in names if self._visit(sweep, name)}
            objective.append(self.objective())
            if not improved:
                converged = True
                break
            attentions = [name for name in names if name in self.specification.heads]
            if not self.is_intra and not improved.issuperset(attentions[-1:]):
                self.is_intra = True
                self.stale.update(attentions)
        search = Search(tuple(objective), converged, self.visits, dict(self.seconds))
        return Alignment(self.specification, dict(self.permutations), search)

    def objective(self) -> float:
        """Inner product of the target and the permuted source over all matched tensors, eq. 7.5."""
        for name in self.touched:
            theirs = self.specification.apply_to(name, self.source[name], self.permutations)
            self.parts[name] = inner_product(self.target[name], theirs)
        self.touched.clear()
        return sum(self.parts.values())

    def similarity(self, name: str, order: Tensor) -> Tensor:
        """(G, n / G, n / G) inner products of units of the target with units of the source, over all matched tensors.

        Args:
            order: (G,) int64, the group of the source that each group of the target's units is compared with: heads, or
                all units as one group.
        """
        groups = len(order)
        total: Tensor | None = None
        for slot in self.matched[name]:
            ours = units(self.target[slot.tensor], slot)
            theirs = units(moved(self.source[slot.tensor], slot, self.specification, self.permutations), slot)
            ours = ours.reshape(groups, -1, ours.shape[1])  # (G, n / G, rest)
            theirs = theirs.reshape(groups, -1, theirs.shape[1])
            part = ours @ (theirs if groups == 1 else theirs[order]).mT
            total = part if total is None else total.add_(part)
        assert total is not None  # every permutation acts on a tensor
        return total

    def _visit(self, sweep: int, name: str) -> bool:
        """Solve the assignment problem of one permutation; True where that improves it."""
        if name not in self.stale:
            return False
        self.stale.discard(name)
        self.visits += 1
        self.progress(sweep, name)
        found = self._best(name)
        if found is None:
            return False
        self.permutations[name] = found
        self.stale |= self.readers[name]
        self.touched.update(slot.tensor for slot in self.specification.slots[name] if slot.tensor in self.parts)
        return True

    def _best(self, name: str) -> Tensor | None:
        """A better permutation given all others; None where the present one is as good."""
        is_attention = name in self.specification.heads
        if is_attention and not self.is_intra:
            found = compose(self.orders[name], self._in_place(name))
            return None if found.equal(self.permutations[name]) else found
        searches_heads = is_attention and self.config.heads == "brute-force"
        order = self.orders[name] if is_attention and not searches_heads else torch.zeros(1, dtype=torch.int64)
        with self._timed("products"):
            similarity = self.similarity(name, order)
        with self._timed("assignments"):
            if searches_heads:
                found = best_heads(similarity[0], self.specification.heads[name])
            else:
                found = compose(order, torch.stack([assign(block) for block in similarity]))
        size = similarity.shape[1]
        old, new = (p.reshape(len(order), size) % size for p in (self.permutations[name], found))
        reached, present = picked(similarity, new), picked(similarity, old)
        gain = float(reached.sum() - present.sum())
        return found if gain > TOLERANCE * float(reached.abs().sum()) else None

    def _inter_head(self, name: str) -> Tensor:
        """(H,) int64, the head of the source for each of the target's, eq. 8.2."""
        count = self.specification.heads[name]
        if self.config.heads != "spectral":
            return torch.arange(count)
        with self._timed("singular values"):
            return assign(-spectral_distance(self.source, self.target, self._projections(name), count))

    def _projections(self, name: str) -> list[Slot]:
        """Queries, keys and values, and the output projection where it counts."""
        matrices = (slot for slot in self.specification.slots[name] if len(self.specification.axes[slot.tensor]) > 1)
        return [slot for slot in matrices if slot.axis == 0 or self.config.include_out_proj]

    def _matched(self, name: str) -> tuple[Slot, ...]:
        """The slots that count for a permutation."""
        slots = [slot for slot in self.specification.slots[name] if not slot.tensor.endswith(STATISTICS)]
        vectors = [slot for slot in slots if sum(side > 1 for side in self.source[slot.tensor].shape) < 2]
        if name in self.specification.heads:
            return (*self._projections(name), *(vectors if self.config.attention_biases else ()))
        weights = [slot for slot in slots if slot not in vectors]
        return tuple(slots if self.config.biases or not weights else weights)

    def _readers(self, name: str) -> set[str]:
        """The permutations whose assignment problem depends on this one."""
        return {
            other
            for other, slots in self.matched.items()
            for slot in slots
            for axis, runs in enumerate(self.specification.axes[slot.tensor])
            if axis != slot.axis and any(run.permutation == name for run in runs)
        }

    def _in_place(self, name: str) -> Tensor:
        """(H, n / H) int64, units that stay where they are in their head."""
        count = self.specification.heads[name]
        return torch.arange(self.specification.sizes[name] // count).expand(count, -1)

    def _sweep_order(self, generator: torch.Generator) -> list[str]:
        names = list(self.specification.sizes)
        if self.config.order == "random":
            return [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
        return names[::-1] if self.config.order == "backward" else names

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started
