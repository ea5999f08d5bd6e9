"""Pictures of digits in integer arithmetic, so that every machine hashes the same pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from shiftproof.datasets.splits import NOISE_STD, PATTERN_SIZE, Array, DigitsSplit, digits, split

# The two inks of a colour axis, chosen to be as bright as each other or complementary.
AXES = (
    ((255, 0, 0), (0, 255, 0)),  # red, green
    ((0, 0, 255), (255, 255, 0)),  # blue, yellow
    ((255, 0, 255), (0, 255, 255)),  # magenta, cyan
    ((255, 128, 0), (0, 128, 255)),  # orange, azure
)
WHITE = (255, 255, 255)


def inks(axis: int, saturation: int) -> Array:
    """The two inks of an axis: (2, 3) uint8.

    Args:
        axis: Which pair of `AXES`.
        saturation: 0..255; 255 gives the pure colours, less adds the same share of white to both, 0 leaves two whites.
    """
    pure = np.array(AXES[axis], dtype=np.int32)
    return (255 - ((255 - pure) * saturation + 127) // 255).astype(np.uint8)


def enlarge(pixels: Array, size: int) -> Array:
    """(N, 8, 8) uint8 in 0..16 to (N, size, size) uint8 in 0..255: each pixel repeated, then smoothed with (1, 2, 1) / 4.

    Args:
        pixels: The digits.
        size: A multiple of 8; for `size // 8` times there are `size // 8 - 1` rounds of smoothing.
    """
    factor = size // 8
    grey = ((pixels.astype(np.int32) * 255 + 8) // 16).repeat(factor, axis=1).repeat(factor, axis=2)
    for _ in range(factor - 1):
        rim = np.pad(grey, ((0, 0), (1, 1), (0, 0)), mode="edge")
        grey = (rim[:, :-2] + 2 * grey + rim[:, 2:] + 2) >> 2
        rim = np.pad(grey, ((0, 0), (0, 0), (1, 1)), mode="edge")
        grey = (rim[:, :, :-2] + 2 * grey + rim[:, :, 2:] + 2) >> 2
    return grey.astype(np.uint8)


def move(pictures: Array, offset: Array) -> Array:
    """Shift every picture; black comes in from outside.

    Args:
        pictures: (N, S, S) uint8.
        offset: (N, 2) int, pixels down and to the right.
    """
    reach = int(np.abs(offset).max(initial=0))
    if reach == 0:
        return pictures
    size = pictures.shape[-1]
    padded = np.pad(pictures, ((0, 0), (reach, reach), (reach, reach)))
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))  # (N, 2 * reach + 1, 2 * reach + 1, S, S)
    moved: Array = windows[np.arange(len(pictures)), reach - offset[:, 0], reach - offset[:, 1]]
    return moved


@dataclass(frozen=True, eq=False)
class Renderer:
    """Draws digits in any ink, with the shift and the noise that the split holds for a (row, digit).

    Attributes:
        split: The frozen split.
        grey: (1797, S, S) uint8, every digit enlarged.
        noise: (256, 3, S, S) int16, the split's patterns at the wanted amplitude.
        shift: Largest shift in pixels.
    """

    split: DigitsSplit
    grey: Array
    noise: Array
    shift: int

    def offset(self, row: int, index: Array) -> Array:
        """(N, 2) int32, pixels down and to the right, within -shift..shift."""
        # With 2 * shift + 1 much below 256 every offset is as likely as another to within 4 %.
        offset: Array = (self.split.shift[row, index].astype(np.int32) * (2 * self.shift + 1) >> 8) - self.shift
        return offset

    def draw(self, row: int, index: Array, ink: Array) -> Tensor:
        """Pictures of digits: (N, 3, S, S) uint8.

        Args:
            row: Row of the split, the task.
            index: (N,) int, which digits.
            ink: (N, 3) or (1, 3) uint8, red, green and blue of each picture.
        """
        grey = move(self.grey[index], self.offset(row, index)).astype(np.uint16)
        coloured = (grey[:, None] * ink.astype(np.uint16)[:, :, None, None] + np.uint16(127)) // np.uint16(255)
        noisy = self.noise[self.split.noise_index[row, index]]
        noisy += coloured.astype(np.int16)
        return torch.from_numpy(np.clip(noisy, 0, 255, out=noisy).astype(np.uint8))


@lru_cache(maxsize=4)
def renderer(split_seed: int, size: int, noise: int, shift: int) -> Renderer:
    """A renderer for a split.

    Args:
        split_seed: As for `splits.split`.
        size: Pixels a side, a multiple of 8; above 16 the noise patterns are laid side by side.
        noise: Standard deviation of the noise in grey levels, 0..255.
        shift: Largest shift in pixels.
    """
    frozen = split(split_seed)
    repeats = -(-size // PATTERN_SIZE)
    scaled = (frozen.noise.astype(np.int32) * noise + NOISE_STD // 2) // NOISE_STD
    patterns = np.tile(scaled.astype(np.int16), (1, 1, repeats, repeats))[:, :, :size, :size]
    return Renderer(frozen, enlarge(digits()[0], size), patterns, shift)
