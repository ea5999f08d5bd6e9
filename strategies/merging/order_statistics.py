"""Exact order statistics of values that are spread over many tensors, without a copy of the values.

A first pass counts a sample by the upper 16 bits of the float32 pattern, which sort as the values do; that tells a few bins
between which the wanted rank must lie. A second pass collects what lies there, some 1 % of the values of a trained network, and
counts what lies below. Should the rank lie elsewhere after all, both passes are made again over everything, and then it cannot.
Several rows of values (one an expert) are searched side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 1 << 16
NEGATIVE = BINS // 2  # patterns from here on have the sign bit, and sort the other way round
STRIDE = 17  # one value in so many is sampled; coprime to every usual width, or whole columns would be left out
WHOLE = 1 << 16  # values of a tensor below which all are counted

Ranks = Callable[[int], Sequence[int]]
"""The wanted 0-based ranks out of the number of values of a row."""
Blocks = Callable[[Tensor, Sequence[Tensor]], Iterable[Tensor]]
"""The values that are searched, out of base and experts: at least one (D, B), float32 or float64, finite; B may differ."""


class Tally(NamedTuple):
    """How often keys occur.

    Attributes:
        keys: (K,) ascending and distinct: bins in the first pass, values in the second.
        counts: (K,) int64, positive.
    """

    keys: NDArray[Any]
    counts: NDArray[np.int64]


class Span(NamedTuple):
    """Bins from `low` to `high`, both included."""

    low: int
    high: int


class Found(NamedTuple):
    """What the second pass knows of a row and a span."""

    below: int
    inside: Tally
    total: int


@dataclass(frozen=True)
class Search:
    """Where a search stands: `scan` every tensor, then let `combined` tell how to go on, until there are values.

    Attributes:
        spans: Where to collect, by row and rank; None while it is counted.
        is_whole: Everything is counted and not a sample.
        values: The order statistics by row and rank.
    """

    spans: Sequence[Sequence[Span]] | None = None
    is_whole: bool = False
    values: list[list[float]] | None = None

    def scan(self, base: Tensor, experts: Sequence[Tensor], blocks: Blocks) -> Any:
        """What a tensor, or a run of one, contributes to this pass."""
        if self.spans is not None:
            return collect(blocks(base, experts), self.spans)
        stride = 1 if self.is_whole or base.numel() < WHOLE else STRIDE
        base, *experts = (tensor.reshape(-1)[::stride] for tensor in (base, *experts))
        return count_bins(blocks(base, experts), stride)

    def combined(self, parts: Iterable[Any], ranks: Ranks) -> Search:
        """The search after a pass, out of what every scan found."""
        if self.spans is None:
            return replace(self, spans=find_spans(parts, ranks, (lambda total: 0) if self.is_whole else slack))
        values = settle(parts, ranks)
        return Search(is_whole=True) if values is None else replace(self, values=values)


def order_statistics(base: Tensor, experts: Sequence[Tensor], blocks: Blocks, ranks: Ranks) -> list[list[float]]:
    """Those of one tensor, by row and rank."""
    search = Search()
    while search.values is None:
        search = search.combined([search.scan(base, experts, blocks)], ranks)
    return search.values


def count_bins(blocks: Iterable[Tensor], weight: int = 1) -> list[Tally]:
    """First pass: of each row, how many values lie in each bin, each counted `weight` times."""
    totals: list[Tensor] = []
    for block in blocks:
        totals = totals or [torch.zeros(BINS, dtype=torch.int64) for _ in block]
        for total, patterns in zip(totals, _patterns(block), strict=True):
            found = torch.bincount(torch.from_numpy(patterns))  # releases the GIL, which numpy's does not
            total[: len(found)] += found
    return [_ascending(total.numpy() * weight) for total in totals]


def slack(total: int) -> int:
    """By how much a rank may be off that a sample tells: six standard deviations of a random one, and a little more."""
    return math.ceil(0.001 * total + 3 * math.sqrt(STRIDE * total))


def find_spans(parts: Iterable[Sequence[Tally]], ranks: Ranks, slack: Callable[[int], int]) -> list[list[Span]]:
    """Between the passes: where the wanted ranks lie, by row and rank.

    Args:
        parts: What `count_bins` found in each tensor.
        slack: By how much a rank may be off, out of how many values there are; a span that comes so near an end goes on to it.
    """
    return [_spans(together(row), ranks, slack) for row in zip(*parts, strict=True)]


def collect(blocks: Iterable[Tensor], spans: Sequence[Sequence[Span]]) -> list[list[Found]]:
    """Second pass: the values inside the spans and how many lie below, by row and span."""
    limits = [[_limits(span) for span in row] for row in spans]
    inside: list[list[list[NDArray[Any]]]] = [[[] for _ in row] for row in spans]
    below = [[0] * len(row) for row in spans]
    total = 0
    for block in blocks:
        total += block.shape[1]
        for at, (values, rounded) in enumerate(zip(block.cpu().numpy(), block.float().cpu().numpy(), strict=True)):
            for position, (low, high) in enumerate(limits[at]):
                is_below, is_within = rounded < low, rounded <= high
                below[at][position] += int(np.count_nonzero(is_below))
                is_within ^= is_below
                inside[at][position].append(values[is_within])
    # Equal values become one here: a frozen layer would otherwise be collected whole.
    tallies = [[Tally(*np.unique(np.concatenate(parts), return_counts=True)) for parts in row] for row in inside]
    return [[Found(*each, total) for each in zip(*row, strict=True)] for row in zip(below, tallies, strict=True)]


def settle(parts: Iterable[Sequence[Sequence[Found]]], ranks: Ranks) -> list[list[float]] | None:
    """After the passes: the order statistics by row and rank; None if one lies outside its span.

    Args:
        parts: What `collect` found in each tensor.
    """
    rows = [list(zip(*row, strict=True)) for row in zip(*parts, strict=True)]  # by row and rank, a `Found` a tensor
    values: list[list[float]] = []
    for row in rows:
        wanted = ranks(sum(found.total for found in row[0]))
        below = [sum(found.below for found in each) for each in row]
        picked = [
            _picked([found.inside for found in each], rank - first)
            for each, rank, first in zip(row, wanted, below, strict=True)
        ]
        if None in picked:
            return None
        values.append([float(value) for value in picked if value is not None])
    return values


def together(tallies: Sequence[Tally]) -> Tally:
    """The sum of tallies."""
    keys, position = np.unique(np.concatenate([tally.keys for tally in tallies]), return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    np.add.at(counts, position, np.concatenate([tally.counts for tally in tallies]))
    return Tally(keys, counts)


def _spans(row: Tally, ranks: Ranks, slack: Callable[[int], int]) -> list[Span]:
    total = int(row.counts.sum())
    margin = slack(total)
    spans = []
    for rank in ranks(total):
        first, last = rank - margin, rank + margin
        low = 0 if margin and first <= 0 else int(_at(row, first))
        spans.append(Span(low, BINS - 1 if margin and last >= total - 1 else int(_at(row, last))))
    return spans


def _picked(tallies: Sequence[Tally], rank: int) -> Any:
    """The value of a 0-based rank; None if there is none, and 0 of nothing at all."""
    keys, counts = (np.concatenate(parts) for parts in zip(*tallies, strict=True))
    total = int(counts.sum())
    if not 0 <= rank < total:
        return None if total or rank else 0.0
    if total < 8 * len(keys):
        return np.partition(np.repeat(keys, counts), rank)[rank]  # without a sort
    return _at(together(tallies), rank)


def _at(tally: Tally, rank: int) -> Any:
    """The key that holds a 0-based rank; of nothing, 0."""
    return tally.keys[int(np.searchsorted(tally.counts.cumsum(), rank, side="right"))] if len(tally.keys) else 0


def _patterns(values: Tensor) -> NDArray[np.int32]:
    """(...) in [0, BINS): rounding to float32 and cutting off its lower bits both keep the order."""
    # Shifts and comparisons are numpy's: torch takes twice as long for them. Adding 0 makes -0 equal to it.
    return ((values.float() + 0).cpu().numpy().view(np.uint32) >> 16).view(np.int32)


def _limits(span: Span) -> tuple[np.float32, np.float32]:
    """The least and the greatest float32 of a span; infinity where its bins hold no numbers."""
    low, high = (bin_ - NEGATIVE if bin_ >= NEGATIVE else BINS - 1 - bin_ for bin_ in span)  # patterns
    least = np.uint32((low << 16) + (BINS - 1 if span.low < NEGATIVE else 0)).view(np.float32)
    greatest = np.uint32((high << 16) + (BINS - 1 if span.high >= NEGATIVE else 0)).view(np.float32)
    return np.nan_to_num(least, nan=-np.inf), np.nan_to_num(greatest, nan=np.inf)


def _ascending(counts: NDArray[np.int64]) -> Tally:
    """Counts by pattern as counts by bin, the bins numbered by ascending value."""
    counts = np.concatenate([counts[: NEGATIVE - 1 : -1], counts[:NEGATIVE]])
    bins = np.flatnonzero(counts).astype(np.int32)
    return Tally(bins, counts[bins])
