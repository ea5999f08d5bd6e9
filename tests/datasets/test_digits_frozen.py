"""The frozen split and its hashes."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest

from shiftproof.benchmark import InputError
from shiftproof.datasets import splits
from shiftproof.datasets.frozen.make import freeze


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A copy of the shipped file and its manifest."""
    for name in (splits.FILE, splits.MANIFEST):
        with as_file(files("shiftproof.datasets.frozen").joinpath(name)) as path:
            shutil.copy(path, tmp_path / name)
    return tmp_path


def test_drawing_seed_0_again_gives_the_shipped_arrays() -> None:
    frozen, drawn = splits.load().arrays(), splits.draw(0).arrays()
    assert frozen.keys() == drawn.keys()
    for name, array in frozen.items():
        assert array.dtype == drawn[name].dtype
        assert np.array_equal(array, drawn[name])


def test_freezing_again_gives_arrays_that_the_shipped_manifest_accepts(tmp_path: Path) -> None:
    freeze(tmp_path)
    assert splits.load(tmp_path).sha256() == splits.load().sha256()
    assert (tmp_path / splits.MANIFEST).read_bytes() == files("shiftproof.datasets.frozen").joinpath(
        splits.MANIFEST
    ).read_bytes()


@pytest.mark.parametrize("position", [0, 1000, 150_000, -1])
def test_one_flipped_byte_in_the_file_is_refused(shipped: Path, position: int) -> None:
    content = bytearray((shipped / splits.FILE).read_bytes())
    content[position] ^= 1
    (shipped / splits.FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"frozen file of digits\.npz: expected sha256"):
        splits.load(shipped)


def test_an_untouched_copy_is_accepted(shipped: Path) -> None:
    assert splits.load(shipped).sha256() == splits.load().sha256()


def test_a_missing_file_is_refused_with_what_to_do(shipped: Path) -> None:
    (shipped / splits.FILE).unlink()
    with pytest.raises(InputError, match="install shiftproof again"):
        splits.load(shipped)


def test_other_arrays_under_a_manifest_with_the_old_array_hash_are_refused(shipped: Path) -> None:
    manifest = shipped / splits.MANIFEST
    manifest.write_text(manifest.read_text().replace(splits.load().sha256(), "0" * 64))
    with pytest.raises(InputError, match="frozen arrays"):
        splits.load(shipped)


def test_three_tenths_of_every_class_are_held_out() -> None:
    _, labels = splits.digits()
    for digit in range(10):
        members = splits.split(0).held_out[labels == digit]
        assert members.sum() == round(0.3 * len(members))


def test_orders_are_permutations_and_differ_between_tasks() -> None:
    order = splits.split(0).order
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(1797), (8, 1)))
    assert len({row.tobytes() for row in order}) == 8


def test_noise_is_nearly_normal() -> None:
    noise = splits.split(0).noise.astype(float) / splits.NOISE_STD
    assert abs(noise.mean()) < 0.01  # 196,608 values: the mean has a standard deviation of 0.002
    assert abs(noise.std() - 1) < 0.01
    assert abs((np.abs(noise) < 1.0).mean() - 0.6827) < 0.02  # within one standard deviation, but for the rounding to 1/32


def test_split_seeds_draw_different_splits_and_seed_0_is_the_frozen_one() -> None:
    hashes = {splits.split(seed).sha256() for seed in range(3)}
    assert len(hashes) == 3
    assert splits.split(0).sha256() == splits.load().sha256()


def test_frozen_arrays_cannot_be_written_to() -> None:
    for array in (*splits.split(0).arrays().values(), *splits.split(1).arrays().values(), *splits.digits()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
