"""Domains of the digits: renditions that differ as photo, sketch and clip art do, in integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from shiftproof.benchmark import ArrayData
from shiftproof.datasets.renditions import WHITE, Renderer, move
from shiftproof.datasets.splits import Array, digits

Rendition = Callable[[Array, Array], Array]
"""(N, S, S) uint8 grey digits and (N, 3, S, S) int16 noise to (N, 3, S, S) int32 pictures, clipped later."""


def draw(drawer: Renderer, row: int, index: Array, rendition: Rendition) -> ArrayData:
    """Pictures of digits in a rendition, with their ten classes.

    Args:
        row: Row of the split, which says shifts and noise.
        index: (N,) int, which digits.
    """
    noise = drawer.noise[drawer.split.noise_index[row, index]].astype(np.int32)
    pictures = rendition(move(drawer.grey[index], drawer.offset(row, index)), noise)
    labels = digits()[1][index].astype(np.int64)
    return ArrayData(torch.from_numpy(np.clip(pictures, 0, 255).astype(np.uint8)), torch.from_numpy(labels))


def neighbourhood(grey: Array) -> Array:
    """(N, S, S, 9): every pixel with its neighbours, edges repeated."""
    windows = sliding_window_view(np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge"), (3, 3), axis=(1, 2))
    return windows.reshape(*grey.shape, 9)


def plain(grey: Array, noise: Array) -> Array:
    """White on black: what the base sees, and no domain."""
    return _tinted(grey.astype(np.int32), WHITE) + noise


def outline(grey: Array, noise: Array) -> Array:
    """Contours: how much brighter the brightest pixel of each neighbourhood is, over a pale digit."""
    contour = neighbourhood(grey).max(-1).astype(np.int32) - grey
    return _tinted(3 * contour // 2 + grey // 2, WHITE) + noise


def thick(grey: Array, noise: Array) -> Array:
    """A broad brush in yellow on blue."""
    broad = neighbourhood(grey).max(-1).astype(np.int32)
    return _tinted(broad, (255, 220, 40)) + _tinted(255 - broad, (10, 20, 70)) + noise


def hatched(grey: Array, noise: Array) -> Array:
    """Diagonal strokes: two of four diagonals are left out."""
    size = grey.shape[-1]
    strokes = (np.add.outer(np.arange(size), np.arange(size)) % 4 < 2).astype(np.int32)
    return _tinted(grey.astype(np.int32) * strokes, (230, 255, 230)) + noise


def textured(grey: Array, noise: Array) -> Array:
    """Upon a coarse check of greens."""
    size = grey.shape[-1]
    check = np.add.outer(np.arange(size) // 3, np.arange(size) // 3) % 2 * 90
    return _tinted(np.maximum(grey.astype(np.int32), check), (180, 255, 120)) + noise


def faint(grey: Array, noise: Array) -> Array:
    """A third of the contrast, on light grey."""
    return _tinted(178 + grey.astype(np.int32) * 3 // 10, WHITE) + noise


def slanted(grey: Array, noise: Array) -> Array:
    """Sheared to the left by a pixel in two, in red."""
    size = grey.shape[-1]
    rows = np.arange(size)
    columns = np.arange(size) + (rows[:, None] - size // 2) // 2
    inside = (columns >= 0) & (columns < size)
    sheared = grey[:, rows[:, None], columns.clip(0, size - 1)] * inside
    return _tinted(sheared.astype(np.int32), (255, 90, 60)) + noise


DOMAINS: dict[str, Rendition] = {
    "outline": outline,
    "thick": thick,
    "hatched": hatched,
    "textured": textured,
    "faint": faint,
    "slanted": slanted,
}


def _tinted(grey: Array, colour: tuple[int, int, int]) -> Array:
    """(N, 3, S, S): a grey picture in a colour."""
    tinted: Array = (grey[:, None] * np.array(colour, dtype=np.int32)[:, None, None] + 127) // 255
    return tinted
