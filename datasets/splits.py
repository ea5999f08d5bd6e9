"""Frozen splits of scikit-learn's digits: who is held out, in what order, how shifted, under which noise.

Everything random is drawn as raw PCG64 words and turned into numbers by integer arithmetic: numpy guarantees the words for
ever, but not what its distributions make of them, so another numpy or another machine draws the same arrays.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from shiftproof.benchmark import InputError

Array = NDArray[Any]

FILE, MANIFEST = "digits.npz", "digits.json"
REMEDY = "install shiftproof again, or restore them with 'python -m shiftproof.datasets.frozen.make'"
DIGITS_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"  # of pixels and labels, see `digits`
ROWS = 8  # tasks that have an order, shifts and noise of their own
PATTERNS, PATTERN_SIZE = 256, 16
NOISE_STD = 32  # of the patterns' int8 values


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """What is frozen about the 1,797 digits; a row is a task.

    Attributes:
        held_out: (1797,) bool, True for test digits: 30 % of every class.
        order: (8, 1797) int16, a permutation of the digits; a task takes its samples from the front.
        shift: (8, 1797, 2) uint8, uniform; becomes pixels down and to the right by `Renderer`.
        noise_index: (8, 1797) uint8, which noise pattern lies over the digit.
        noise: (256, 3, 16, 16) int8, nearly normal with a standard deviation of 32.
    """

    held_out: Array
    order: Array
    shift: Array
    noise_index: Array
    noise: Array

    def arrays(self) -> dict[str, Array]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def sha256(self) -> str:
        """Hash over names, dtypes, shapes and values, little-endian whatever the machine."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            digest.update(f"{name}{little.dtype.str}{little.shape}".encode())
            digest.update(little.tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def digits() -> tuple[Array, Array]:
    """The 1,797 digits that ship with scikit-learn.

    Returns:
        (1797, 8, 8) uint8 pixels in 0..16 and (1797,) int64 labels in 0..9, both read-only.

    Raises:
        InputError: If the installed scikit-learn ships other digits, since the splits are positions in these.
    """
    bunch = load_digits()
    pixels, labels = bunch.images.astype(np.uint8), bunch.target.astype("<i8")
    found = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if found != DIGITS_SHA256:
        raise InputError(
            f"scikit-learn's digits: expected sha256 {DIGITS_SHA256[:12]}, got {found[:12]}; install another scikit-learn"
        )
    return _read_only(pixels), _read_only(labels.astype(np.int64))


@lru_cache(maxsize=8)
def split(split_seed: int) -> DigitsSplit:
    """The frozen split for seed 0; for any other seed one that is drawn in the same way."""
    return load() if split_seed == 0 else draw(split_seed)


def load(folder: Traversable | None = None) -> DigitsSplit:
    """Read the frozen split and compare its hashes with the manifest.

    Args:
        folder: Where file and manifest lie; the package's own by default.

    Raises:
        InputError: If one of the two is missing, or the bytes of the file or its arrays are not those of the manifest.
    """
    folder = folder or files("shiftproof.datasets.frozen")
    try:
        manifest = json.loads(folder.joinpath(MANIFEST).read_text(encoding="utf-8"))
        content = folder.joinpath(FILE).read_bytes()
    except OSError as error:
        raise InputError(f"expected the frozen files {FILE} and {MANIFEST}, got none ({error.strerror}); {REMEDY}") from error
    _compare("file", manifest["sha256"], hashlib.sha256(content).hexdigest())
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        frozen = DigitsSplit(**{field.name: _read_only(archive[field.name]) for field in fields(DigitsSplit)})
    _compare("arrays", manifest["arrays_sha256"], frozen.sha256())
    return frozen


def draw(split_seed: int) -> DigitsSplit:
    """Draw a split; `draw(0)` is what the frozen file holds.

    Every array has a word stream of its own, keyed by (split_seed, position), so that none shifts another.
    """
    _, labels = digits()
    count = len(labels)
    streams = [np.random.PCG64(np.random.SeedSequence((split_seed, position))) for position in range(5)]
    held_out = np.zeros(count, dtype=np.bool_)
    by_chance = _permutation(streams[0], count)
    for digit in range(10):
        members = by_chance[labels[by_chance] == digit]
        held_out[members[: (3 * len(members) + 5) // 10]] = True
    order = np.stack([_permutation(streams[1], count) for _ in range(ROWS)])
    shift = _bytes(streams[2], ROWS * count * 2).reshape(ROWS, count, 2)
    noise_index = _bytes(streams[3], ROWS * count).reshape(ROWS, count)
    arrays = (held_out, order, shift, noise_index, _noise(streams[4]))
    return DigitsSplit(*(_read_only(array) for array in arrays))


def _noise(words: np.random.PCG64) -> Array:
    """(256, 3, 16, 16) int8: a sum of twelve bytes is nearly normal, mean 1530, standard deviation 256 (Irwin-Hall)."""
    shape = (PATTERNS, 3, PATTERN_SIZE, PATTERN_SIZE)
    total = _bytes(words, 12 * int(np.prod(shape))).reshape(12, *shape).sum(axis=0, dtype=np.int32) - 1530
    scaled: Array = (total * NOISE_STD + 128) >> 8
    return scaled.clip(-127, 127).astype(np.int8)


def _permutation(words: np.random.PCG64, count: int) -> Array:
    return np.argsort(words.random_raw(count), kind="stable").astype(np.int16)


def _bytes(words: np.random.PCG64, count: int) -> Array:
    raw: Array = words.random_raw(-(-count // 8)).astype("<u8")
    return raw.view(np.uint8)[:count]


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _compare(what: str, expected: str, found: str) -> None:
    if found != expected:
        raise InputError(f"frozen {what} of {FILE}: expected sha256 {expected[:12]}, got {found[:12]}; {REMEDY}")
