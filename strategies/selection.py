"""Who stays in a buffer: pure functions of counts, losses and draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def reservoir_slots(seen: int, capacity: int, draws: Array) -> Array:
    """Where algorithm R puts the next samples of a stream.

    Args:
        seen: Samples before these.
        capacity: Slots.
        draws: (B,) float64, uniform in [0, 1).

    Returns:
        (B,) int64, a slot, or -1 for a sample that is passed over. Later entries overwrite earlier ones.
    """
    counted = np.arange(seen + 1, seen + len(draws) + 1)  # samples so far, each included
    slot: Array = (draws * counted).astype(np.int64)
    slot[slot >= capacity] = -1
    if seen < capacity:
        slot[: capacity - seen] = counted[: capacity - seen] - 1
    return slot


def loss_bins(losses: Array, low: float, high: float, bins: int) -> Array:
    """(N,) int64, which of `bins` equal intervals of [low, high] each of (N,) float64 losses lies in; all 0 if low == high."""
    width = (high - low) / bins
    if width == 0:
        return np.zeros(len(losses), np.int64)
    return np.minimum(((losses - low) / width).astype(np.int64), bins - 1)


def lower_fullest(counts: Array, keep: int) -> Array:
    """Counts after taking one at a time from the largest, the first of equals, until `keep` are left.

    Args:
        counts: (G,) int64.
        keep: At least 0.

    Returns:
        (G,) int64; `counts` themselves where they add up to no more than `keep`.
    """
    levels = np.arange(counts.max(initial=0) + 1)
    level = int(np.searchsorted(np.minimum(counts, levels[:, None]).sum(1), keep, side="right")) - 1
    left = np.minimum(counts, level)
    taller = np.flatnonzero(counts > level)
    left[taller[max(0, len(taller) - (keep - int(left.sum()))) :]] += 1
    return left


def within_quota(groups: Array, quota: Array, order: Array) -> Array:
    """(N,) bool, True for the first quota[g] members of each group g.

    Args:
        groups: (N,) int64, values in [0, G).
        quota: (G,) int64; below 0 counts as 0.
        order: (N,) int64, a permutation; who comes first.
    """
    ranked = order[np.argsort(groups[order], kind="stable")]  # group after group, each in the order asked for
    sizes = np.bincount(groups, minlength=len(quota))
    rank = np.arange(len(groups)) - np.repeat(sizes.cumsum() - sizes, sizes)
    chosen = np.zeros(len(groups), bool)
    chosen[ranked] = rank < quota[groups[ranked]]
    return chosen
