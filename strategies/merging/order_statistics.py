"""Exact order statistics of values that are spread over many tensors, in two passes and without a copy of the values.

The first pass counts values by the upper 16 bits of their float32 pattern, which sort as the values do; that tells which bin
holds the wanted rank. The second pass collects what lies in that bin: with 7 bits of mantissa less than 1 % of the values of a
trained network. Several rows of values (one an expert) are searched side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 1 << 16
NEGATIVE = BINS // 2  # patterns from here on have the sign bit, and sort the other way round


class Tally(NamedTuple):
    """How often keys occur.

    Attributes:
        keys: (K,) ascending and distinct: bins in the first pass, values in the second.
        counts: (K,) int64, positive.
    """

    keys: NDArray[Any]
    counts: NDArray[np.int64]


class Place(NamedTuple):
    """Where an order statistic lies: the bin, and its 0-based rank among the values of that bin."""

    bin: int
    rank: int


def count_bins(blocks: Iterable[Tensor]) -> list[Tally]:
    """First pass: of each row, how many values lie in each bin.

    Args:
        blocks: At least one (D, B) float32 or float64 without NaN; B may differ.
    """
    totals: list[Tensor] = []
    for block in blocks:
        totals = totals or [torch.zeros(BINS, dtype=torch.int64) for _ in block]
        for total, patterns in zip(totals, _patterns(block), strict=True):
            found = torch.bincount(torch.from_numpy(patterns))  # releases the GIL, which numpy's does not
            total[: len(found)] += found
    return [_ascending(total.numpy()) for total in totals]


def find_bins(parts: Iterable[Sequence[Tally]], ranks: Callable[[int], Sequence[int]]) -> list[list[Place]]:
    """Between the passes: where the wanted ranks lie.

    Args:
        parts: What `count_bins` found in each tensor.
        ranks: The 0-based ranks out of the number of values of a row.

    Returns:
        The places by row and rank.
    """
    rows = [together(row) for row in zip(*parts, strict=True)]
    return [[Place(*_at(row, rank)) for rank in ranks(int(row.counts.sum()))] for row in rows]


def collect(blocks: Iterable[Tensor], places: Sequence[Sequence[Place]]) -> list[list[Tally]]:
    """Second pass: the values inside the bins, by row and place.

    Args:
        blocks: The same values as in the first pass, in any order.
    """
    found: list[list[list[Tally]]] = [[[] for _ in row] for row in places]
    for block in blocks:
        for values, patterns, row, tallies in zip(block.cpu().numpy(), _patterns(block), places, found, strict=True):
            for place, inside in zip(row, tallies, strict=True):
                # Equal values become one at once: a frozen layer would otherwise be collected whole.
                inside.append(Tally(*np.unique(values[patterns == _pattern(place.bin)], return_counts=True)))
    return [[together(inside) for inside in tallies] for tallies in found]


def settle(parts: Iterable[Sequence[Sequence[Tally]]], places: Sequence[Sequence[Place]]) -> list[list[float]]:
    """After the passes: the order statistics by row and rank.

    Args:
        parts: What `collect` found in each tensor.
    """
    rows = zip(*parts, strict=True)
    return [
        [float(_at(together(inside), place.rank)[0]) for place, inside in zip(wanted, zip(*row, strict=True), strict=True)]
        for wanted, row in zip(places, rows, strict=True)
    ]


def order_statistics(blocks: Callable[[], Iterable[Tensor]], ranks: Callable[[int], Sequence[int]]) -> list[list[float]]:
    """Both passes over the blocks of one tensor: the order statistics by row and rank."""
    places = find_bins([count_bins(blocks())], ranks)
    return settle([collect(blocks(), places)], places)


def together(tallies: Sequence[Tally]) -> Tally:
    """The sum of tallies."""
    keys, position = np.unique(np.concatenate([tally.keys for tally in tallies]), return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    np.add.at(counts, position, np.concatenate([tally.counts for tally in tallies]))
    return Tally(keys, counts)


def _at(tally: Tally, rank: int) -> tuple[Any, int]:
    """The key that holds a 0-based rank, and the rank inside it; of nothing, (0, 0)."""
    if not len(tally.keys):
        return 0, 0
    up_to = tally.counts.cumsum()
    index = int(np.searchsorted(up_to, rank, side="right"))
    return tally.keys[index], rank - int(up_to[index] - tally.counts[index])


def _patterns(values: Tensor) -> NDArray[np.int32]:
    """(...) in [0, BINS): rounding to float32 and cutting off its lower bits both keep the order."""
    # Shifts and comparisons are numpy's: torch takes twice as long for them.
    return (values.float().cpu().numpy().view(np.uint32) >> 16).view(np.int32)


def _pattern(bin_: int) -> int:
    """The pattern of a bin."""
    return int(bin_) - NEGATIVE if bin_ >= NEGATIVE else BINS - 1 - int(bin_)


def _ascending(counts: NDArray[np.int64]) -> Tally:
    """Counts by pattern as counts by bin, the bins numbered by ascending value."""
    counts = np.concatenate([counts[: NEGATIVE - 1 : -1], counts[:NEGATIVE]])
    bins = np.flatnonzero(counts).astype(np.int32)
    return Tally(bins, counts[bins])
