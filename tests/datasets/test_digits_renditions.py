"""The pixels."""

import numpy as np
import pytest
from scipy import ndimage

from shiftproof.datasets.renditions import WHITE, enlarge, inks, move, renderer
from shiftproof.datasets.splits import digits, split


@pytest.mark.parametrize(("size", "rounds"), [(8, 0), (16, 1), (24, 2)])
def test_enlarging_is_repeating_and_smoothing(size: int, rounds: int) -> None:
    pixels = digits()[0][:50]
    expected = np.kron(pixels, np.ones((1, size // 8, size // 8))) * 255 / 16
    for _ in range(rounds):
        for axis in (1, 2):
            expected = ndimage.convolve1d(expected, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    # Each of the at most 2 * rounds + 1 roundings is off by at most one half.
    assert np.abs(enlarge(pixels, size) - expected).max() <= rounds + 0.5


def test_black_and_full_ink_survive_enlarging() -> None:
    flat = np.array([np.zeros((8, 8)), np.full((8, 8), 16)], dtype=np.uint8)
    assert np.unique(enlarge(flat, 32)).tolist() == [0, 255]


@pytest.mark.parametrize("offset", [(0, 0), (1, 0), (0, -1), (2, -2)])
def test_moving_is_a_shift_that_lets_black_in(offset: tuple[int, int]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    moved = move(pictures, np.tile(offset, (4, 1)))
    assert np.array_equal(moved, ndimage.shift(pictures, (0, *offset), order=0, mode="constant"))


def test_every_picture_moves_by_its_own_offset() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    offsets = np.array([(0, 0), (1, -1), (-1, 1)])
    together = move(pictures, offsets)
    assert all(np.array_equal(together[i : i + 1], move(pictures[i : i + 1], offsets[i : i + 1])) for i in range(3))


def test_inks_go_from_pure_colours_to_white() -> None:
    assert inks(0, 255).tolist() == [[255, 0, 0], [0, 255, 0]]
    assert inks(0, 55).tolist() == [[255, 200, 200], [200, 255, 200]]
    assert inks(3, 0).tolist() == [list(WHITE), list(WHITE)]


@pytest.mark.parametrize("shift", [1, 2])
def test_offsets_are_uniform_up_to_the_largest_shift(shift: int) -> None:
    drawer = renderer(0, 16, 0, shift)
    # A digit that is one pixel of ink shows where it went.
    dot = np.zeros_like(drawer.grey)
    dot[:, 8, 8] = 255
    pictures = type(drawer)(drawer.split, dot, drawer.noise, shift).draw(0, np.arange(1797), np.array([WHITE], dtype=np.uint8))
    _, rows, columns = pictures[:, 0].nonzero(as_tuple=True)
    for where in (rows, columns):
        counts = np.bincount(where - 8 + shift, minlength=2 * shift + 1)
        assert len(counts) == 2 * shift + 1
        assert np.abs(counts / 1797 - 1 / len(counts)).max() < 0.05


def test_noise_has_the_wanted_amplitude() -> None:
    drawer = renderer(0, 16, 26, 0)
    grey = np.full_like(drawer.grey, 128)
    pictures = type(drawer)(drawer.split, grey, drawer.noise, 0).draw(0, np.arange(500), np.array([WHITE], dtype=np.uint8))
    noise = pictures.numpy().astype(float) - 128
    assert abs(noise.mean()) < 0.5
    assert noise.std() == pytest.approx(26, rel=0.02)


def test_a_digit_has_another_noise_and_shift_in_another_task() -> None:
    frozen = split(0)
    same = (frozen.noise_index[0] == frozen.noise_index[1]) & (frozen.shift[0] == frozen.shift[1]).all(axis=1)
    assert same.mean() < 0.01


def test_noise_patterns_cover_pictures_larger_than_themselves() -> None:
    picture = renderer(0, 40, 60, 0).draw(0, np.arange(1), np.array([WHITE], dtype=np.uint8))
    assert picture.shape == (1, 3, 40, 40)
    assert picture[0, :, 32:, 32:].float().std() > 0
